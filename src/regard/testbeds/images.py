"""Labelled images to train small vision models on: scikit-learn's digits, or any local folder of class folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .._checks import bad_value, require, require_fraction, require_int

__all__ = ["Images", "digits", "image_folder"]

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
            raw = bytearray(image.convert("RGB").resize((size, size)).tobytes())
        images.append(torch.frombuffer(raw, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).float() / 255)
    return Images(torch.stack(images), torch.tensor([number for _, number in files]), classes, share)
