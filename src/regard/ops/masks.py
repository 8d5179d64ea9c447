"""Masks: who may look at whom, fixed in advance.

A mask is a callable `mask(b, h, q_idx, kv_idx) -> bool` over index tensors that broadcast together (FlexAttention's
`mask_mod`), where `q_idx` and `kv_idx` are absolute positions. Masks compose with `&`, `|` and `~`:

    local = sliding_window(512) & causal | sink(4) & causal

A mask can also bound itself over rectangles of positions (`bounds`), which is how the block backends learn which tiles
are empty, full or mixed without ever making the N x M matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._checks import bad_type
from .mask_base import Bounds, DenseMask, FunctionMask, Mask, as_mask, index_grid
from .mask_kinds import (
    Block,
    Causal,
    Dilated,
    Document,
    Everything,
    HeadSharded,
    Padding,
    PerHead,
    Prefix,
    Shifted,
    Sink,
    SlidingWindow,
)

__all__ = [
    "Bounds",
    "Mask",
    "as_mask",
    "block",
    "causal",
    "dense",
    "dilated",
    "document",
    "everything",
    "from_function",
    "head_sharded",
    "index_grid",
    "padding",
    "per_head",
    "prefix",
    "shifted",
    "sink",
    "sliding_window",
]


everything: Mask = Everything()
"""Every query sees every key."""

causal: Mask = Causal()
"""A query at position p sees keys at positions <= p."""


def sliding_window(window: int) -> Mask:
    """Keys nearer than `window` tokens, on either side: `|q - kv| < window`. With `& causal`: `window` keys, own one included."""
    return SlidingWindow(window)


def sink(sink: int) -> Mask:
    """The first `sink` keys, for everybody (combine: `(sliding_window(w) | sink(s)) & causal`)."""
    return Sink(sink)


def dilated(dilation: int, window: int | None = None) -> Mask:
    """Keys at distances divisible by `dilation`, at most `window` of them on each side (None: no limit)."""
    return Dilated(dilation, window)


def prefix(lengths: int | Tensor) -> Mask:
    """The first `lengths` keys, for everybody: `prefix(n) | causal` is a prefix language model. An int, or (B,) integers."""
    return Prefix(lengths)


def padding(lengths: Tensor | None = None, *, start: Tensor | None = None) -> Mask:
    """Real keys only: `start[b] <= kv < lengths[b]`, each (B,) integers; `lengths` for right padding, `start` for left padding."""
    return Padding(lengths, start)


def document(ids: Tensor) -> Mask:
    """Packed sequences: a query sees keys with its own document number. `ids` (N,) or (B, N) by absolute position."""
    return Document(ids)


def block(size: int) -> Mask:
    """Block-diagonal: a query sees its own block of `size` positions."""
    return Block(size)


def dense(tensor: Tensor, *, q_offset: int | None = None) -> Mask:
    """A mask from a bool tensor, (N, M) or (B|1, H|1, N|1, M). Row r is the query at position `r + q_offset` (default M - N)."""
    return DenseMask(tensor, q_offset)


def per_head(masks: list[Mask]) -> Mask:
    """A mask of its own for each query head, in order."""
    return PerHead([as_mask(mask) for mask in masks])


def head_sharded(
    num_heads: int,
    block_size: int = 64,
    local_blocks: int | tuple[int, int] = 16,
    stride: int = 8,
    *,
    dense_heads: int = 0,
    homogeneous: bool = False,
    group: int = 1,
    step: int | None = None,
    offset: int = 0,
    causal: bool = True,
    position: str | None = None,
) -> Mask:
    """S2-Attention's heterogeneous context sharding: local blocks plus every `stride`-th block, shifted by head.

    Block (i, j) of kv head h is kept iff j <= i and (i - j < local_blocks or (j + h * step + offset) % stride == 0); inside the
    diagonal block the token-level causal mask applies. Together the heads cover everything when num_heads >= stride. Blocks are
    counted from position 0, so decoding with a cache sees what prefill sees, and a strided column serves all later rows.

    Args:
        num_heads: kv heads. With GQA give `group` = query heads per kv head: the group shares its kv head's pattern.
        block_size: tokens a block. local_blocks: blocks of the local band on the left, own block included (with `causal=False`
            also on the right, or a pair (left, right)).
        stride: blocks between kept columns; 1 is dense.
        dense_heads: the LAST this many kv heads are dense (causal).
        homogeneous: every head uses head 0's columns (the paper's ablation).
        step: shift between neighbouring kv heads. None: max(1, stride // query heads), as released.
        offset: shifts the columns of all heads: head h of a tensor-parallel shard beginning at kv head f has offset f * step.
        causal: False for the bidirectional form.
        position: where strided blocks are counted: "absolute" (from the start; default when causal: few columns have to stay in a
            cache) or "relative" (from the edge of the local band, on both sides; default otherwise, the same for all heads).

    Source: Lin et al. 2024 (arXiv 2407.17678); pattern as in linxihui/dkernel.
    """
    return HeadSharded(
        num_heads, block_size, local_blocks, stride, dense_heads, homogeneous, group, step, offset, causal, position
    )


def shifted(mask: Mask, start: Tensor) -> Mask:
    """`mask` with positions counted from `start[b]` in batch row b, (B,) integers: what left padding needs. Combine with `padding`."""
    return Shifted(as_mask(mask), start)


def from_function(mask_mod: Callable[..., Tensor], *, varies_batch: bool = True, varies_head: bool = True) -> Mask:
    """Any `mask_mod(b, h, q_idx, kv_idx) -> bool tensor`. Correct everywhere, but backends must evaluate it to find empty blocks.

    Say `varies_batch=False` / `varies_head=False` when the answer does not depend on b / h: it is then evaluated once for all.
    """
    if not callable(mask_mod):
        raise bad_type("mask_mod", mask_mod, "a callable (b, h, q_idx, kv_idx) -> bool tensor")
    return FunctionMask(mask_mod, varies_batch, varies_head)
