"""Images from folders and from scikit-learn."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from regard.testbeds.images import digits, image_folder


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for number in range(3):
            image.new("RGB", (9, 7), color).save(tmp_path / name / f"{number}.png")
    data = image_folder(tmp_path, size=4, share=0.34)
    assert data.classes == ["blue", "red"] and data.learn.shape == (4, 3, 4, 4) and len(data.kept) == 2
    for picture, label in zip(data.learn, data.learn_labels):
        assert torch.equal(picture.mean((1, 2)), torch.tensor([1.0, 0, 0] if label == 1 else [0, 0, 1.0]))
    with pytest.raises(ValueError, match="path"):
        image_folder(tmp_path / "red")


def test_digits(monkeypatch):
    made = types.ModuleType("sklearn.datasets")
    rng = np.random.default_rng(0)
    found = types.SimpleNamespace(images=rng.integers(0, 17, (20, 8, 8)).astype(float), target=np.arange(20) % 10)
    made.load_digits = lambda: found
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", made)
    data = digits(share=0.25)
    assert data.learn.shape == (15, 1, 8, 8) and data.learn.max() <= 1 and len(data.kept_labels) == 5
    for image, label in zip(data.kept, data.kept_labels):
        assert any(np.allclose(found.images[n] / 16, image[0]) and found.target[n] == label for n in range(20))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="scikit-learn"):
        digits()
