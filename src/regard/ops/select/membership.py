"""A selection as a mask: for unions with masks (`sliding_window(w) | in_selection(...)`), and for looking at what was selected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import Bounds, Mask
from ..selection import Selection


class InSelection(Mask):
    """Keeps what `selection` looks at. Positions are absolute: query row i is at `i + q_offset`, key j at j.

    A query before row 0 or after the last row, and a key outside the selection's lengths, keep nothing.
    """

    def __init__(self, selection: Selection, *, num_heads: int, num_kv_heads: int, q_offset: int | None = None) -> None:
        indices = selection.for_heads(num_heads, num_kv_heads)
        self.selection = Selection(
            indices,
            block_q=selection.block_q,
            block_k=selection.block_k,
            q_len=selection.q_len,
            kv_len=selection.kv_len,
        )
        self.q_offset = selection.kv_len - selection.q_len if q_offset is None else q_offset
        self.varies_batch, self.varies_head = indices.shape[0] > 1, indices.shape[1] > 1
        self._map: Tensor | None = None

    def _blocks(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query block i looks at key block j, both within range."""
        if self._map is None:  # only made when asked: backends that are given the selection itself never do
            self._map = self.selection.block_map()
        table = self._map.to(i.device)
        b = b if self.varies_batch else torch.zeros_like(b)
        h = h if self.varies_head else torch.zeros_like(h)
        return table[b, h, i, j]

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        chosen, row = self.selection, q_idx - self.q_offset
        inside = (row >= 0) & (row < chosen.q_len) & (kv_idx >= 0) & (kv_idx < chosen.kv_len)
        if chosen.q_len == 0 or chosen.kv_len == 0:
            return inside
        i = row.clamp(0, chosen.q_len - 1) // chosen.block_q
        return inside & self._blocks(b, h, i, kv_idx.clamp(0, chosen.kv_len - 1) // chosen.block_k)

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        """Exact for a rectangle within one query block and one key block; unsure beyond."""
        chosen = self.selection
        low, high = q_lo - self.q_offset, q_hi - self.q_offset
        one = (low >= 0) & (high < chosen.q_len) & (kv_lo >= 0) & (kv_hi < chosen.kv_len)
        one = (
            one
            & (low // chosen.block_q == high // chosen.block_q)
            & (kv_lo // chosen.block_k == kv_hi // chosen.block_k)
        )
        kept = self.keep(b, h, q_lo, kv_lo)
        return kept | ~one, kept & one

    def __repr__(self) -> str:
        return f"in_selection({self.selection!r})"


def in_selection(
    selection: Selection, *, num_heads: int, num_kv_heads: int | None = None, q_offset: int | None = None
) -> Mask:
    """The mask that keeps what `selection` looks at.

    Args:
        selection: any. num_heads, num_kv_heads (default `num_heads`): query and kv heads of the attention it is for.
        q_offset: position of query row 0, default `kv_len - q_len`.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    return InSelection(selection, num_heads=num_heads, num_kv_heads=kv_heads, q_offset=q_offset)
