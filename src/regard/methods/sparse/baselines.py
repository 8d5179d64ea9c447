"""The baselines that everyone compares with: dense attention and a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..._checks import require_int
from ...ops import masks
from ...ops.masks import Mask
from ..call import AttentionCall, Method


@dataclass
class Dense(Method):
    """The model as it is: claims no seam, changes nothing. What the others are measured against."""


@dataclass
class SlidingWindow(Method):
    """Every token sees only the last `window` tokens, itself included (and, in bidirectional models, as many ahead).

    The cache still holds everything; for one that lets go of what is out of reach see `StreamingLLM`.

    Args:
        window: tokens >= 1. A window of at least the context changes nothing.
        sink: tokens at the start that stay visible to everybody (0: none). Left padding is not counted.
        layers: layers to treat (negative from the end); None = all.
    """

    window: int = 1024
    sink: int = 0
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        require_int("window", self.window, 1)
        require_int("sink", self.sink, 0)

    def mask(self, call: AttentionCall) -> Mask:
        local = masks.sliding_window(self.window)
        if self.sink == 0:
            return local
        if call.mask is None:
            return local | masks.sink(self.sink)
        return local | masks.prefix(call.start + self.sink)
