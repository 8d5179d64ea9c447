"""Masks: who may look at whom, fixed in advance.

A mask is a callable `mask(b, h, q_idx, kv_idx) -> bool` over index tensors that broadcast together (FlexAttention's
`mask_mod`), where `q_idx` and `kv_idx` are absolute positions. Masks compose with `&`, `|` and `~`:

    local = sliding_window(512) & causal | sink(4) & causal

A mask can also bound itself over rectangles of positions (`bounds`), which is how the block backends learn which tiles
are empty, full or mixed without ever making the N x M matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .._checks import bad_type, require, require_int
from .mask_base import Bounds, DenseMask, FunctionMask, Mask, as_mask, index_grid
from .mask_bernoulli import DistanceBernoulli
from .mask_groups import BlockLocal, PerRow, ShiftedGroup
from .mask_intervals import Intervals, Window
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
from .mask_neighborhood import Neighborhood, grid_axes

__all__ = [
    "Bounds",
    "Mask",
    "as_mask",
    "block",
    "block_local",
    "causal",
    "dense",
    "dilated",
    "distance_bernoulli",
    "document",
    "everything",
    "from_function",
    "head_sharded",
    "index_grid",
    "intervals",
    "neighborhood",
    "padding",
    "per_head",
    "per_row",
    "prefix",
    "shifted",
    "shifted_group",
    "sink",
    "sliding_window",
    "window",
]


everything: Mask = Everything()
"""Every query sees every key."""

causal: Mask = Causal()
"""A query at position p sees keys at positions <= p."""


def sliding_window(window: int) -> Mask:
    """Keys nearer than `window` tokens, on either side: `|q - kv| < window`. With `& causal`: `window` keys, own one included."""
    return SlidingWindow(window)


def window(left: int | None = None, right: int | None = None) -> Mask:
    """Keys from `left` before the query to `right` behind it, `q - left <= kv <= q + right`; None: no limit on that side."""
    return Window(left, right)


def intervals(first: Tensor, last: Tensor) -> Mask:
    """The query at position p sees keys first[p] to last[p], both inclusive; nothing where first > last. (N,) or (B, N) integers."""
    return Intervals(first, last)


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


def block_local(size: int, left: int = 1) -> Mask:
    """A query sees its own block of `size` positions and the `left` blocks before it (with `& causal`: no later ones of its own)."""
    return BlockLocal(size, left)


def shifted_group(
    num_heads: int,
    group: int,
    *,
    shift: str = "clip",
    shift_heads: float = 0.5,
    sink: int = 0,
    length: int | None = None,
) -> Mask:
    """Causal attention inside groups of `group` tokens; the last heads have their groups moved by half a group.

    Args:
        num_heads: query heads. group: tokens a group, counted from position 0.
        shift: "none": no head is moved. "clip": the moved heads have groups [0, group/2), [group/2, 3 group/2), ... and a short last
            one, so nothing wraps around. "cyclic": the end of the sequence and its first half group make one group in which these
            first tokens SEE THE END (LongLoRA's S2-Attn as released); needs `length` and an even group.
        shift_heads: share of the heads that is moved, the last ones.
        sink: tokens at the start that every later query sees, in every head.
        length: of the sequence, for "cyclic".

    Source: Chen et al. 2023 (LongLoRA, arXiv 2309.12307), Zhang 2024 (SinkLoRA, arXiv 2406.05678).
    """
    return ShiftedGroup(num_heads, group, shift, shift_heads, sink, length)


def dense(tensor: Tensor, *, q_offset: int | None = None) -> Mask:
    """A mask from a bool tensor, (N, M) or (B|1, H|1, N|1, M). Row r is the query at position `r + q_offset` (default M - N)."""
    return DenseMask(tensor, q_offset)


def per_head(masks: list[Mask]) -> Mask:
    """A mask of its own for each query head, in order."""
    return PerHead([as_mask(mask) for mask in masks])


def per_row(masks: list[Mask], number: Tensor) -> Mask:
    """A mask of its own for each batch row: row b has `masks[number[b]]`, `number` (B,) integers."""
    return PerRow([as_mask(mask) for mask in masks], number)


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


def neighborhood(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    tile: int | Sequence[int] | None = None,
) -> Neighborhood:
    """Neighborhood attention on a grid: each token sees the `kernel_size` nearest ones along every axis.

    Positions are the tokens of the grid, row-major. Windows are shifted inwards at the borders (every query of an axis that is not
    causal sees exactly `kernel_size` keys along it); an even kernel has one key more on the left. Positions behind the grid are extra
    keys (registers, text) that everybody sees; give `attention()` `q_offset=0` with them.

    Args:
        shape: lengths of the grid, 1 to 3 of them. The others: one value for all axes, or one an axis.
        kernel_size: keys along the axis; kernel_size * dilation <= length. stride: queries that share a window, <= kernel_size: with
            stride = kernel_size windows do not overlap (block attention). dilation: distance between neighboring keys of a window.
        is_causal: along this axis a token sees itself and what comes before.
        tile: let positions run tile by tile (of this many tokens an axis) rather than row-major, so that blocks of neighboring positions
            see few blocks; `mask.order` (tokens,) then tells the row-major number of the token at each position.

    Source: Hassani et al. 2024 (arXiv 2403.04690); borders, strides and even kernels as in SHI-Labs/NATTEN.
    """
    axes = grid_axes(shape, kernel_size, stride, dilation, is_causal)
    if tile is None:
        return Neighborhood(axes)
    extents = tuple(tile) if isinstance(tile, Sequence) else (tile,) * len(axes)
    require(len(extents) == len(axes), "tile", tile, f"an int, or {len(axes)} of them")
    return Neighborhood(axes, tuple(require_int("tile", extent, 1) for extent in extents))


def distance_bernoulli(
    block_size: int = 128,
    *,
    gamma: float = 1.0,
    sink: int = 1,
    seed: int = 0,
    group: int = 1,
    per_batch: bool = False,
) -> Mask:
    """Blocks by chance, PrFlashAttention's pattern: D blocks apart with probability 1 / (1 + D)^gamma, their own always.

    Args:
        block_size: tokens a block, counted from position 0. gamma: 0 keeps everything. sink: first blocks that all see.
        seed: the same gives the same draws, whatever the lengths. group: query heads that share draws. per_batch: draws of its own for
            every batch row; else rows share them, and results do not depend on a row's place in the batch.

    Combine with `causal`. Source: arXiv 2410.18441 (the probability is our choice).
    """
    return DistanceBernoulli(block_size, gamma, sink, seed, group, per_batch)


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
