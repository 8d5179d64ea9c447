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


def test_the_real_digits():
    pytest.importorskip("sklearn")
    data = digits()
    assert (
        data.learn.shape == (1438, 1, 8, 8)
        and len(data.kept) == 359
        and set(data.kept_labels.tolist()) == set(range(10))
    )


def test_a_data_set_that_datasets_reads(tmp_path, monkeypatch):
    """The real package, on a local folder."""
    pytest.importorskip("datasets")
    from PIL import Image

    from regard.testbeds.images import hub_images
    from regard.testbeds.texts import ByteText

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, shade in (("dark", 10), ("light", 240)):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (6, 4), (shade, shade, number)).save(
                tmp_path / "pictures" / "train" / name / f"{number}.png"
            )
    found = hub_images(str(tmp_path / "pictures"), size=8, share=0.34)
    assert found.learn.shape == (4, 3, 8, 8) and found.kept.shape == (2, 3, 8, 8) and len(found.classes) == 2
    for image, label in zip(found.learn, found.learn_labels):
        assert (float(image[0].mean()) > 0.5) == bool(label)
    assert len(hub_images(str(tmp_path / "pictures"), size=8, limit=3, share=0.0).learn) == 3
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("one line\nanother line\n")
    assert bytes(ByteText(f"hf:{tmp_path / 'words'}", share=0.0).learn.tolist()) == b"one line\nanother line"
    with pytest.raises(ValueError, match="columns"):
        hub_images(str(tmp_path / "words"))
