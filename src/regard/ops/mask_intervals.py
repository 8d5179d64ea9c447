"""Masks by intervals: every query sees one stretch of keys, given by its ends or by how far it looks to either side."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int, require_tensor
from .mask_base import Mask
from .range_extremes import range_extremes, range_table


class Window(Mask):
    """Keys from `left` before the query to `right` behind it; None: no limit on that side."""

    frozen = relative = True

    def __init__(self, left: int | None, right: int | None) -> None:
        self.left = None if left is None else require_int("left", left, -(1 << 62))
        self.right = None if right is None else require_int("right", right, -(1 << 62))

    def keep(self, b, h, q_idx, kv_idx):
        ahead = kv_idx - q_idx
        kept = ahead == ahead
        if self.left is not None:
            kept = kept & (ahead >= -self.left)
        return kept if self.right is None else kept & (ahead <= self.right)

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        nearest, farthest = kv_lo - q_hi, kv_hi - q_lo
        some = every = nearest == nearest
        if self.left is not None:
            some, every = some & (farthest >= -self.left), every & (nearest >= -self.left)
        if self.right is not None:
            some, every = some & (nearest <= self.right), every & (farthest <= self.right)
        return some, every

    def __repr__(self) -> str:
        return f"window({self.left}, {self.right})"


class Intervals(Mask):
    """The query at position p of batch row b sees keys first[b, p] .. last[b, p], both inclusive; none where first > last."""

    frozen = True

    def __init__(self, first: Tensor, last: Tensor) -> None:
        for name, ends in (("first", first), ("last", last)):
            require_tensor(name, ends)
            require(ends.dim() in (1, 2), name, f"shape {tuple(ends.shape)}", "(N,) or (B, N)")
            require(not ends.is_floating_point() and ends.dtype != torch.bool, name, ends.dtype, "integers")
        require(first.shape == last.shape, "last", f"shape {tuple(last.shape)}", f"first's {tuple(first.shape)}")
        require(first.shape[-1] > 0, "first", f"shape {tuple(first.shape)}", "at least one query")
        self.varies_batch = first.dim() == 2 and first.shape[0] > 1
        self.ends = torch.stack([first, last]).reshape(2, -1, first.shape[-1]).long()  # a copy: the mask can be kept
        self._ranges: Tensor | None = None

    def _row(self, b: Tensor) -> Tensor:
        return b if self.varies_batch else torch.zeros_like(b)

    def keep(self, b, h, q_idx, kv_idx):
        first, last = self.ends.to(q_idx.device)
        row, query = self._row(b), q_idx.clamp(0, first.shape[1] - 1)
        return (first[row, query] <= kv_idx) & (kv_idx <= last[row, query])

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        if self._ranges is None:
            self._ranges = range_table(self.ends.flatten(0, 1))
        ranges, row, rows = self._ranges.to(q_lo.device), self._row(b), self.ends.shape[1]
        first_min, first_max = range_extremes(ranges, row, q_lo, q_hi)
        last_min, last_max = range_extremes(ranges, row + rows, q_lo, q_hi)
        return (first_min <= kv_hi) & (kv_lo <= last_max), (first_max <= kv_lo) & (kv_hi <= last_min)

    def __repr__(self) -> str:
        return f"intervals({tuple(self.ends.shape[1:])})"
