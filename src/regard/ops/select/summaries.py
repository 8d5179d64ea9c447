"""Summaries of blocks and chunks of tokens: what selectors score instead of the tokens themselves.

A block has a fixed size, a chunk reaches from one boundary to the next. Both are shared by every selector here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_int, require_name, require_tensor
from ..reference import accumulation_dtype

REDUCTIONS = ("mean", "sum", "max", "min")
SUMMARIES: dict[str, tuple[str, ...]] = {
    "mean": ("mean",),
    "max": ("max",),
    "min": ("min",),
    "minmax": ("max", "min"),
    "maxminmean": ("max", "min", "mean"),
    "centroid": (),
}
"""Kinds of block summary and the reductions they hold side by side along the channels, in this order (a centroid is none of them)."""


def reductions_of(kind: str) -> tuple[str, ...]:
    """The reductions that a kind of summary holds, in order: a name in `SUMMARIES`, or reductions joined by "+" ("max+mean")."""
    parts = tuple(kind.split("+"))
    if len(parts) > 1 and all(part in REDUCTIONS for part in parts):
        return parts
    return SUMMARIES[require_name("kind", kind, SUMMARIES)]


def split_blocks(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """(..., N, D) as blocks (..., ceil(N / block), block, D); what is missing at the ragged end is `fill`."""
    require_int("block", block, 1)
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % block), value=fill)
    return x.unflatten(-2, (-1, block))


def block_summary(x: Tensor, block: int, reduce: str = "mean") -> Tensor:
    """One vector a block of tokens: (..., N, D) -> (..., ceil(N / block), D), float32 for half types.

    Args:
        x: tokens. block: tokens a block; the ragged last block is reduced over the tokens that exist.
        reduce: "mean", "sum", "max" or "min", element by element.
    """
    require_name("reduce", reduce, REDUCTIONS)
    x = x.to(accumulation_dtype(x.dtype))
    if reduce in ("max", "min"):
        blocks = split_blocks(x, block, -torch.inf if reduce == "max" else torch.inf)
        return blocks.amax(-2) if reduce == "max" else blocks.amin(-2)
    total = split_blocks(x, block).sum(-2)
    return total / block_lengths(x.shape[-2], block, x.device)[:, None].to(x.dtype) if reduce == "mean" else total


def block_summaries(x: Tensor, block: int, kind: str = "mean") -> Tensor:
    """What selectors know of each block of keys: (..., N, D) -> (..., ceil(N / block), F), float32 for half types.

    Args:
        x: tokens. block: tokens a block; the ragged last block is summarised over the tokens that exist.
        kind: "mean", "max" or "min" element by element (F = D); "minmax", the maximum and then the minimum (2 D), from which the
            largest score in the block can be bounded (Quest); "maxminmean", those and the mean (3 D, SeerAttention's order);
            several joined by "+" in that order;
            "centroid", the mean direction of the keys at their mean length (D): unlike the mean it does not shrink where keys
            of a block point apart.
    """
    parts = reductions_of(kind)
    if kind == "centroid":
        x = x.to(accumulation_dtype(x.dtype))
        norm = x.norm(dim=-1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny
        direction = torch.nn.functional.normalize(block_summary(x / norm.clamp(min=tiny), block, "sum"), dim=-1)
        return direction * block_summary(norm, block, "mean")
    return torch.cat([block_summary(x, block, part) for part in parts], dim=-1)


def block_lengths(length: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """Tokens in each block of `length` tokens, int64 (ceil(length / block),): `block`, less in the ragged last one."""
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block)


def chunk_of(boundaries: Tensor, length: int) -> Tensor:
    """The chunk that each token belongs to, int64 (B, length), from boundaries (B, C + 1), 0 first and `length` last."""
    tokens = torch.arange(length, device=boundaries.device).expand(boundaries.shape[0], -1).contiguous()
    return torch.searchsorted(boundaries.contiguous(), tokens, right=True) - 1


def chunk_means(x: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token of each chunk.

    Args:
        x: tokens (B, N, D). boundaries: int64 (B, C + 1), ascending, 0 first and N last; equal neighbours are an empty chunk.
    Returns:
        means (B, C, D), zeros for an empty chunk, and chunk lengths (B, C), in x's dtype (float32 for half types).
    """
    x = x.to(accumulation_dtype(x.dtype))
    batch, length, dim = x.shape
    sums = x.new_zeros(batch, boundaries.shape[1] - 1, dim)
    sums.scatter_add_(1, chunk_of(boundaries, length)[..., None].expand(-1, -1, dim), x)
    lengths = boundaries.diff(dim=1).to(x.dtype)
    return sums / lengths.clamp(min=1)[..., None], lengths


def check_boundaries(boundaries: Tensor, batch: int, length: int) -> Tensor:
    """`boundaries`, (C + 1,) or (B|1, C + 1), checked and as int64 (B, C + 1)."""
    require_tensor("boundaries", boundaries)
    require(boundaries.dim() in (1, 2), "boundaries", f"shape {tuple(boundaries.shape)}", "(C + 1,) or (B, C + 1)")
    require(not boundaries.is_floating_point(), "boundaries", boundaries.dtype, "integers")
    boundaries = boundaries.long().reshape(-1, boundaries.shape[-1])
    rows, cuts = boundaries.shape
    require(rows in (1, batch), "boundaries", f"{rows} rows", f"1 or {batch} rows")
    require(cuts >= 2, "boundaries", f"{cuts} cuts", "at least 0 and the length")
    ends = (boundaries[:, 0].tolist(), boundaries[:, -1].tolist())
    fits = set(ends[0]) == {0} and set(ends[1]) == {length}
    require(fits, "boundaries", f"first {ends[0]}, last {ends[1]}", f"0 first and the length, {length}, last")
    require(bool((boundaries.diff(dim=1) >= 0).all()), "boundaries", "cuts out of order", "ascending positions")
    return boundaries.expand(batch, -1)
