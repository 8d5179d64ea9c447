"""HiP Attention's softmax: over the keys that `hierarchical_topk` finds, the recent window and the sinks.

Paper and code as in `hierarchical_topk.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import require, require_int
from ..masks import Bounds, Mask
from ..selection import Selection
from .choice import Choice
from .hierarchical_topk import hierarchical_topk


def search_window(window: int, group: int) -> int:
    """The `window` to give to `hierarchical_topk` (it counts groups) so that search and window together leave no key out."""
    return window if group == 1 else max(0, window - group + 1) // group


def hierarchical_choice(
    q: Tensor,
    k: Tensor,
    budget: int | float = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    sink: int = 0,
    group: int = 1,
    *,
    representative: str = "first",
    query_dims: int | None = None,
    resolution: int = 1,
    sifters: int = 1,
    q_offset: int | None = None,
    variant: str = "released",
    generator: torch.Generator | None = None,
) -> Choice:
    """Search, then add the window and the sinks: what HiP attends to, for causal attention.

    Args:
        window: every query sees its last `window` keys, itself included; at least `group`.
        sink: keys at the start that everybody sees, rounded up to whole key blocks of `block_k * group`.
        others: as in `hierarchical_topk`.
    """
    require_int("window", window, 1)
    require_int("sink", sink, 0)
    require_int("group", group, 1)
    require(window >= group, "window", window, f"at least group = {group} keys, so that no recent key is left out")
    found = hierarchical_topk(
        q,
        k,
        budget,
        block_q,
        block_k,
        search_window(window, group),
        group,
        representative=representative,
        query_dims=query_dims,
        resolution=resolution,
        sifters=sifters,
        q_offset=q_offset,
        variant=variant,
        generator=generator,
    )
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    return with_window(found, window, sink, offset)


def with_window(found: Selection, window: int, sink: int, q_offset: int) -> Choice:
    """`found`, the last `window` keys of each query (exactly these), and the blocks of the first `sink` keys."""
    size, rows = found.block_k, found.q_len
    device = found.indices.device
    if rows == 0 or found.kv_len == 0:
        return Choice(found)
    first_row = torch.arange(0, rows, found.block_q, device=device)[:, None] + q_offset
    last_row = (first_row + found.block_q).clamp(max=rows + q_offset) - 1
    oldest, newest = (first_row - window + 1).clamp(min=0) // size, last_row // size
    recent = oldest + torch.arange((found.block_q + window - 2) // size + 2, device=device)
    sinks = torch.arange(-(-sink // size), device=device).expand(first_row.shape[0], -1)
    blocks = torch.cat((recent, sinks), dim=1)
    blocks = torch.where(blocks <= newest, blocks, -1)
    shape = (*found.indices.shape[:2], *blocks.shape)
    indices = torch.cat((found.indices, blocks.expand(shape)), dim=-1)
    everything = Selection(indices, block_q=found.block_q, block_k=size, q_len=rows, kv_len=found.kv_len)
    return Choice(everything, _Window(found, window, sinks.shape[1], q_offset, oldest[:, 0]))


class _Window(Mask):
    """Inside the blocks of `with_window`: blocks that only the window brought in are seen by the rows whose window reaches them.

    Which blocks that may be is a short stretch where the window of a query block's first row begins; for each of them a table
    remembers whether it was found, or is a sink, anyway. Blocks before the stretch are in the selection because they were.
    """

    def __init__(self, found: Selection, window: int, sink_blocks: int, q_offset: int, oldest: Tensor) -> None:
        self.window, self.q_offset = window, q_offset
        self.block_q, self.size, self.rows = found.block_q, found.block_k, found.q_len
        self.oldest = oldest  # (nQ,): first block of the window of the query block's first row
        stretch = oldest[:, None] + torch.arange((self.block_q - 2) // self.size + 2, device=oldest.device)
        listed = torch.where(found.indices < 0, found.num_k_blocks, found.indices).contiguous()
        wanted = stretch.expand(*listed.shape[:2], *stretch.shape).contiguous()
        if listed.shape[-1]:
            place = torch.searchsorted(listed, wanted).clamp(max=listed.shape[-1] - 1)
            self.table = listed.gather(-1, place) == wanted
        else:
            self.table = torch.zeros_like(wanted, dtype=torch.bool)
        self.table |= stretch < sink_blocks
        self.varies_batch, self.varies_head = found.indices.shape[0] > 1, found.indices.shape[1] > 1

    def _anyway(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row = (q_idx - self.q_offset).clamp(0, self.rows - 1)
        i = row // self.block_q
        place = kv_idx // self.size - self.oldest.to(i.device)[i]
        b = b if self.varies_batch else torch.zeros_like(b)
        h = h if self.varies_head else torch.zeros_like(h)
        known = self.table.to(i.device)[b, h, i, place.clamp(0, self.table.shape[-1] - 1)]
        return (place < 0) | (known & (place < self.table.shape[-1]))

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx - kv_idx < self.window) | self._anyway(b, h, q_idx, kv_idx)

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        one = (q_lo - self.q_offset) // self.block_q == (q_hi - self.q_offset) // self.block_q
        one = one & (kv_lo // self.size == kv_hi // self.size)
        anyway = self._anyway(b, h, q_lo, kv_lo)
        some = (q_lo - kv_hi < self.window) | anyway | ~one
        every = (q_hi - kv_lo < self.window) | (anyway & one)
        return some, every

    def kind(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Tensor | None:
        """Inside one query block and one key block only the distance matters, once it is known whether the block was found."""
        one = (q_lo - self.q_offset) // self.block_q == (q_hi - self.q_offset) // self.block_q
        one = one & (kv_lo // self.size == kv_hi // self.size)
        return self._anyway(b, h, q_lo, kv_lo).long() if bool(one.all()) else None

    def __repr__(self) -> str:
        return f"window_and_found({self.window})"


def hierarchical_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: int | float = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    sink: int = 0,
    group: int = 1,
    *,
    representative: str = "first",
    query_dims: int | None = None,
    resolution: int = 1,
    sifters: int = 1,
    q_offset: int | None = None,
    variant: str = "released",
    generator: torch.Generator | None = None,
    scale: float | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """HiP Attention: causal softmax attention over the keys of `hierarchical_topk`, the last `window` keys and the first `sink`.

    With `budget` (and window) reaching the whole context it is dense causal attention. Gradients flow through the attention, not
    through the search.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). Queries are the last positions unless `q_offset` says otherwise.
        budget, block_q, block_k, group, representative, query_dims, resolution, sifters, q_offset, variant, generator: of the search,
            see `hierarchical_topk`.
        window: keys that every query sees, itself included, at least `group`. They are not searched.
        sink: keys at the start that everybody sees (rounded up to whole key blocks).
        scale: of the softmax, default D ** -0.5; the search compares raw products.
        backend, options: as in `regard.ops.attention`.
    Returns:
        (B, H, N, Dv).
    """
    choice = hierarchical_choice(
        q,
        k,
        budget,
        block_q,
        block_k,
        window,
        sink,
        group,
        representative=representative,
        query_dims=query_dims,
        resolution=resolution,
        sifters=sifters,
        q_offset=q_offset,
        variant=variant,
        generator=generator,
    )
    return choice.attention(q, k, v, q_offset=q_offset, scale=scale, backend=backend, **options)
