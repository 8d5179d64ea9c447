"""Masks that cut the sequence into blocks and shift them: bands of blocks, and groups that some heads see shifted by half.

Made through the functions in `masks.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import bad_type, require, require_int, require_name, require_tensor
from .mask_base import Bounds, Mask

SHIFTS = ("none", "clip", "cyclic")


class BlockLocal(Mask):
    """Own block and `left` blocks before it."""

    frozen = True

    def __init__(self, size: int, left: int) -> None:
        self.size = require_int("size", size, 1)
        self.left = require_int("left", left, 0)

    def _back(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx // self.size - kv_idx // self.size

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        back = self._back(q_idx, kv_idx)
        return (back >= 0) & (back <= self.left)

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        least, most = self._back(q_lo, kv_hi), self._back(q_hi, kv_lo)
        return (most >= 0) & (least <= self.left), (least >= 0) & (most <= self.left)

    def __repr__(self) -> str:
        return f"block_local({self.size}, left={self.left})"


class PerRow(Mask):
    """A mask of its own for each batch row: `number[b]` says which of `masks`."""

    varies_batch = True

    def __init__(self, masks: list[Mask], number: Tensor) -> None:
        require(len(masks) > 0, "masks", masks, "at least one mask")
        require_tensor("number", number, dims=1)
        self.masks, self.number = masks, number
        self.varies_head = any(mask.varies_head for mask in masks)

    def _pick(self, b: Tensor, values: list[Tensor]) -> Tensor:
        number = self.number.to(b.device)[b]
        out = torch.zeros((), dtype=torch.bool, device=b.device)
        for i, value in enumerate(values):
            out = out | ((number == i) & value)
        return out

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self._pick(b, [mask.keep(b, h, q_idx, kv_idx) for mask in self.masks])

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        pairs = [mask.bounds(b, h, q_lo, q_hi, kv_lo, kv_hi) for mask in self.masks]
        return self._pick(b, [some for some, _ in pairs]), self._pick(b, [every for _, every in pairs])

    def __repr__(self) -> str:
        return f"per_row({len(self.number)} rows, {len(self.masks)} kinds)"


def shifted_heads(num_heads: int, shift_heads: float) -> int:
    """How many of the heads, the LAST ones, are shifted: half of nine is five, as in the released S2-Attn."""
    if isinstance(shift_heads, bool) or not isinstance(shift_heads, (int, float)):
        raise bad_type("shift_heads", shift_heads, "a share of the heads in [0, 1]")
    require(0.0 <= shift_heads <= 1.0, "shift_heads", shift_heads, "a share of the heads in [0, 1]")
    return num_heads - math.floor(num_heads * (1.0 - shift_heads) + 1e-9)


class ShiftedGroup(Mask):
    """Groups of tokens, causal inside; the last heads see them moved by half a group."""

    def __init__(
        self, num_heads: int, group: int, shift: str, shift_heads: float, sink: int, length: int | None
    ) -> None:
        self.num_heads = require_int("num_heads", num_heads, 1)
        self.group = require_int("group", group, 1)
        self.shift = require_name("shift", shift, SHIFTS)
        self.sink = require_int("sink", sink, 0)
        self.moved = 0 if shift == "none" else shifted_heads(num_heads, shift_heads)
        self.length = None if length is None else require_int("length", length, 0)
        if shift == "cyclic":
            require(
                length is not None, "length", length, "the length of the sequence: cyclic groups wrap around its end"
            )
            require(group % 2 == 0, "group", group, "an even number of tokens for cyclic groups as a mask")
            assert length is not None
            require(length % group == 0, "length", length, f"a multiple of the group, {group}")
        self.frozen, self.varies_head = True, 0 < self.moved < num_heads

    def _ahead(self, h: Tensor) -> Tensor:
        """By how much the groups of head `h` begin before a multiple of the group."""
        return torch.where(h >= self.num_heads - self.moved, self.group // 2, 0)

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ahead = self._ahead(h)
        if self.shift == "cyclic":
            assert self.length is not None
            query, key = (q_idx - ahead) % self.length, (kv_idx - ahead) % self.length
            kept = (query // self.group == key // self.group) & (query >= key)
            return kept | ((kv_idx < self.sink) & (q_idx >= kv_idx))
        kept = (q_idx + ahead) // self.group == (kv_idx + ahead) // self.group
        return (kept | (kv_idx < self.sink)) & (q_idx >= kv_idx)

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        ahead = self._ahead(h)
        if self.shift == "cyclic":
            return super().bounds(b, h, q_lo, q_hi, kv_lo, kv_hi)
        q_first, q_last = (q_lo + ahead) // self.group, (q_hi + ahead) // self.group
        k_first, k_last = (kv_lo + ahead) // self.group, (kv_hi + ahead) // self.group
        some = (q_first <= k_last) & (k_first <= q_last) | (kv_lo < self.sink)
        every = (q_first == q_last) & (k_first == k_last) & (q_first == k_first) | (kv_hi < self.sink)
        return some & (q_hi >= kv_lo), every & (q_lo >= kv_hi)

    def __repr__(self) -> str:
        return f"shifted_group({self.num_heads}, {self.group}, shift={self.shift!r}, sink={self.sink})"
