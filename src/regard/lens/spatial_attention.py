"""How attention in a vision transformer spreads over the image: strength by distance, and the mean pattern around a query.

Paper: Li, Wang, Dai, Wang, Yuan, Yeh, Zhang, Ma 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (IEEE
TVCG, arXiv 2303.13731). No code was published. Its abstract names the analyses; where it leaves a formula open, the docstrings say what
is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from .head_scores import HeadScores
from .record import Record

__all__ = ["hop_distances", "hop_profile", "hop_strength", "prefix_mass", "relative_attention_map"]

METRICS = ("chebyshev", "euclidean")
Grid = tuple[int, int]


def hop_distances(grid: Grid, metric: str = "chebyshev") -> Tensor:
    """Distance between all patches of a grid (height, width), int64 (N, N): "chebyshev" (rings of squares), or "euclidean", rounded."""
    require_name("metric", metric, METRICS)
    height, width = (require_int("grid", side, 1) for side in grid)
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    if metric == "chebyshev":
        return torch.maximum(dy, dx)
    return (dy.square() + dx.square()).double().sqrt().round().long()


def hop_strength(
    weights: Tensor,
    grid: Grid,
    *,
    metric: str = "chebyshev",
    prefix: int | None = None,
    per_neighbour: bool = False,
    renormalise: bool = False,
) -> Tensor:
    """Attention that patches give to patches at distance 0, 1, 2, ...: (..., K + 1), K the largest distance in the grid.

    Args:
        weights: (..., N, N), patches in rows of the grid, behind `prefix` other tokens (class, registers).
        prefix: their number; None: all but the patches.
        per_neighbour: the mean over the patches at a distance, not their sum, so that distances compare; of queries that have some there.
        renormalise: rows over the patches alone are made to sum to 1.

    Without either, the sum over distances and the mass that patches give to the prefix are 1 together. NaN: no pair at that distance.
    """
    inner = _patches(weights, grid, prefix)[0]
    if renormalise:
        total = inner.sum(-1, keepdim=True)
        inner = inner / torch.where(total > 0, total, 1.0)
    distance = hop_distances(grid, metric).to(inner.device)
    strengths = []
    for hop in range(int(distance.max()) + 1):
        ring = distance == hop
        counts = ring.sum(-1)
        mass = (inner * ring).sum(-1)
        if per_neighbour:
            some = counts > 0
            mass = torch.where(some, mass / counts.clamp(min=1), 0.0).sum(-1) / some.sum().clamp(min=1)
            strengths.append(mass if bool(some.any()) else torch.full_like(mass, torch.nan))
        else:
            strengths.append(mass.mean(-1))
    return torch.stack(strengths, dim=-1)


def prefix_mass(weights: Tensor, grid: Grid, prefix: int | None = None) -> tuple[Tensor, Tensor]:
    """(mass that the prefix tokens, class and the like, give to patches, mass that patches give to them): means over queries, (...)."""
    _, whole, prefix = _patches(weights, grid, prefix)
    if prefix == 0:
        zero = whole.sum((-2, -1)) * 0.0
        return zero, zero
    return whole[..., :prefix, prefix:].sum(-1).mean(-1), whole[..., prefix:, :prefix].sum(-1).mean(-1)


def relative_attention_map(weights: Tensor, grid: Grid, prefix: int | None = None) -> Tensor:
    """The mean pattern around a query: (..., 2 height - 1, 2 width - 1), the query in the middle.

    Entry (dy, dx) is the mean, over the queries whose neighbour there lies in the image, of what they give to it. Attention that depends
    on the offset alone comes back as its kernel.
    """
    inner = _patches(weights, grid, prefix)[0]
    height, width = grid
    tall, broad = 2 * height - 1, 2 * width - 1
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    place = ((y - y[:, None] + height - 1) * broad + (x - x[:, None] + width - 1)).flatten().to(inner.device)
    flat = inner.flatten(-2)
    sums = flat.new_zeros(*flat.shape[:-1], tall * broad).index_add(-1, place, flat)
    return (sums / torch.bincount(place, minlength=tall * broad)).unflatten(-1, (tall, broad))


def hop_profile(
    record: Record, grid: Grid, *, metric: str = "chebyshev", per_neighbour: bool = False, prefix: int | None = None
) -> dict[str, HeadScores]:
    """Strength by distance of every head, the mean over images: "hop 0", "hop 1", ..., "mean distance", "prefix to patches", "patches to
    prefix", each a table (L, H). "mean distance" is in hops, over the mass on patches.

    Args:
        record: `regard.record(vit, ...)` of images. Others as in `hop_strength`.
    """
    rows = []
    for layer in record.layers:
        weights = record.weights(layer)
        given, got = prefix_mass(weights, grid, prefix)
        shares = hop_strength(weights, grid, metric=metric, prefix=prefix, renormalise=True)
        mean = (shares * torch.arange(shares.shape[-1], device=shares.device)).sum(-1)
        shown = hop_strength(weights, grid, metric=metric, prefix=prefix, per_neighbour=per_neighbour)
        rows.append(torch.cat([shown, mean[..., None], given[..., None], got[..., None]], -1).mean(0).cpu())
    table = torch.stack(rows)
    hops = table.shape[-1] - 3
    names = [*(f"hop {hop}" for hop in range(hops)), "mean distance", "prefix to patches", "patches to prefix"]
    info = {"metric": metric, "per_neighbour": per_neighbour, "grid": list(grid)}
    return {name: HeadScores(table[..., i].clone(), name=name, info=info) for i, name in enumerate(names)}


def _patches(weights: Tensor, grid: Grid, prefix: int | None) -> tuple[Tensor, Tensor, int]:
    """Weights among patches, all of them in at least float32, and the number of tokens before the patches."""
    require_tensor("weights", weights, floating=True)
    count = grid[0] * grid[1]
    square = weights.dim() >= 2 and weights.shape[-1] == weights.shape[-2] >= count
    require(
        square,
        "weights",
        f"shape {tuple(weights.shape)}",
        f"(..., N, N), N >= {count} patches of the grid {tuple(grid)}",
    )
    before = weights.shape[-1] - count if prefix is None else require_int("prefix", prefix)
    require(before + count <= weights.shape[-1], "prefix", before, f"at most {weights.shape[-1] - count}")
    whole = weights.to(torch.promote_types(weights.dtype, torch.float32))[..., : before + count, : before + count]
    return whole[..., before:, before:], whole, before
