"""Shapes that broadcast together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """What `torch.broadcast_shapes` gives, without the second that its first call spends on importing a symbolic algebra system.

    Raises `ValueError` where they do not fit.
    """
    out = []
    for sizes in zip_longest(*(reversed(tuple(shape)) for shape in shapes), fillvalue=1):
        real = {size for size in sizes if size != 1}
        if len(real) > 1:
            raise ValueError(f"shapes: got {[tuple(shape) for shape in shapes]}, need shapes that broadcast together")
        out.append(real.pop() if real else 1)
    return torch.Size(reversed(out))
