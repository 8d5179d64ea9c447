"""Labelled images to train small vision models on: scikit-learn's digits, a local folder of class folders, a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_fraction, require_int
from .texts import hub_rows

__all__ = ["Images", "digits", "hub_images", "image_folder"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Images:
    """Images (N, C, H, W) in [0, 1] and their classes (N,), shuffled by a fixed seed; the last part is held out.

    Attributes: learn, learn_labels, kept, kept_labels; classes, their names.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str], share: float = 0.2) -> None:
        require(
            len(images) == len(labels) > 1,
            "images",
            f"{len(images)} with {len(labels)} labels",
            "two or more, a label each",
        )
        require_fraction("share", share)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        cut = len(images) - round(share * len(images))
        self.learn, self.learn_labels = images[order[:cut]], labels[order[:cut]]
        self.kept, self.kept_labels = images[order[cut:]], labels[order[cut:]]
        self.classes = classes

    def batches(self, batch: int, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
        """number -> (images (batch, C, H, W), labels (batch,)), drawn from their own seed: what `train` takes."""
        require_int("batch", batch, 1)

        def make(number: int) -> tuple[Tensor, Tensor]:
            drawn = torch.Generator().manual_seed(seed * 1_000_003 + number)
            chosen = torch.randint(len(self.learn), (batch,), generator=drawn)
            return self.learn[chosen], self.learn_labels[chosen]

        return make


def digits(share: float = 0.2) -> Images:
    """The 1797 handwritten digits of scikit-learn, (1, 8, 8) each. Raises ImportError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits: needs scikit-learn (pip install scikit-learn)") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return Images(images, torch.from_numpy(found.target).long(), [str(n) for n in range(10)], share)


def image_folder(path: str | Path, size: int = 32, share: float = 0.2) -> Images:
    """A folder with a folder a class: RGB images, scaled to size x size.

    Raises ValueError where there is no such folder or no image in it; ImportError without Pillow.
    """
    require_int("size", size, 1)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image_folder: needs Pillow (pip install pillow)") from error
    root = Path(path)
    classes = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    files = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise bad_value("path", str(path), f"a folder with a folder a class, holding images ({', '.join(SUFFIXES)})")
    images = []
    for file, _ in files:
        with Image.open(file) as image:
            images.append(_pixels(image, size))
    return Images(torch.stack(images), torch.tensor([number for _, number in files]), classes, share)


def hub_images(name: str, size: int = 32, share: float = 0.2, limit: int = 10_000) -> Images:
    """A Hugging Face data set of images, "NAME", "NAME//CONFIG" or "NAME//CONFIG:SPLIT": RGB, scaled to size x size.

    Its columns "image" (or "img") and "label" (or "fine_label") of at most `limit` rows; NAME may be a local folder that `datasets` reads.

    Raises ValueError where a row has no such columns, or there are no rows; ImportError without the package `datasets`.
    """
    require_int("size", size, 1)
    require_int("limit", limit, 1)
    images, labels = [], []
    for row in islice(hub_rows(name), limit):
        image = next((row[key] for key in ("image", "img") if row.get(key) is not None), None)
        label = next((row[key] for key in ("label", "fine_label") if row.get(key) is not None), None)
        if image is None or label is None:
            raise bad_value("name", f"{name}, with columns {sorted(row)}", "a data set with images and labels")
        images.append(_pixels(image, size))
        labels.append(label)
    if not images:
        raise bad_value("name", name, "a data set with rows")
    classes = sorted(set(labels), key=lambda label: (str(type(label)), label))
    numbers = torch.tensor([classes.index(label) for label in labels])
    return Images(torch.stack(images), numbers, [str(label) for label in classes], share)


def _pixels(image: Any, size: int) -> Tensor:
    raw = bytearray(image.convert("RGB").resize((size, size)).tobytes())
    return torch.frombuffer(raw, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).float() / 255
