"""Online k-means per head, and clusters of equal size: what content-routed attention groups its tokens by.

Routing Transformer, Roy et al. (2020, TACL 2021, arXiv 2003.05997). Code read for numbers: google-research/google-research @ 0c1bbe5
`routing_transformer/utils.py` (Apache-2.0) and the community's lucidrains/routing-transformer @ 3f6c461 (MIT).

Vectors and centroids lie on a sphere (normalised by the caller), so the nearest centroid is the one with the largest product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import require, require_int, require_tensor


def cluster_affinity(x: Tensor, means: Tensor) -> Tensor:
    """x (B, H, N, D) against centroids (H, C, D): products (B, H, N, C)."""
    require_tensor("x", x, dims=4, floating=True)
    require_tensor("means", means, dims=3, floating=True)
    fits = means.shape[0] == x.shape[1] and means.shape[2] == x.shape[3]
    require(fits, "means", f"shape {tuple(means.shape)}", f"({x.shape[1]}, C, {x.shape[3]}), one set a head")
    return torch.einsum("bhnd,hcd->bhnc", x, means.to(x.dtype))


def balanced_clusters(affinity: Tensor, width: int, *, keep: Tensor | None = None, strided: bool = False) -> Tensor:
    """Clusters of equal size: each centroid takes the tokens nearest to it, so that a token may be in several or in none.

    Args:
        affinity: (B, H, N, C). width: tokens a cluster; fewer where there are fewer.
        keep: bool (B, N), False for tokens that no cluster may take (padding).
        strided: instead of the nearest, tokens spread evenly over the order by affinity, the nearest first: every (N // width)-th.
    Returns:
        int64 (B, H, C, min(width, N)), ascending; -1 at the end where too few tokens are kept. Equal affinities: the earlier token.
    """
    require_tensor("affinity", affinity, dims=4, floating=True)
    require_int("width", width, 1)
    batch, _, length, _ = affinity.shape
    width = min(width, length)
    scores = affinity.detach().transpose(2, 3)
    if keep is not None:
        fits = keep.dtype == torch.bool and keep.shape == (batch, length)
        require(fits, "keep", f"{keep.dtype} {tuple(keep.shape)}", f"bool ({batch}, {length})")
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    if not strided:
        return _nearest(scores, width, keep)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    count = torch.full((batch, 1), length, device=order.device) if keep is None else keep.sum(-1, keepdim=True)
    size = count.clamp(max=width)  # members of each cluster, (B, 1)
    rank = torch.arange(width, device=order.device)
    place = rank * torch.where(size > 0, count // size.clamp(min=1), 0)
    chosen = order.gather(-1, place[:, None, None].expand(*order.shape[:3], -1).clamp(max=max(length - 1, 0)))
    chosen = torch.where((rank < size)[:, None, None], chosen, length).sort(dim=-1).values
    return torch.where(chosen == length, -1, chosen)


def _nearest(scores: Tensor, width: int, keep: Tensor | None) -> Tensor:
    """Numbers of the `width` largest of each row (..., N), ascending; a sort of whole rows would take ten times as long."""
    if width == 0:
        return scores.new_empty((*scores.shape[:3], 0), dtype=torch.long)
    least = scores.topk(width, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    taken = scores >= least
    if bool((taken.sum(-1) != width).any()):  # equal ones at the end: the earlier; not a number: last of all
        scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
        least = scores.topk(width, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        taken, level = scores >= least, scores == least
        room = width - (scores > least).sum(-1, keepdim=True)
        taken = taken & (~level | (level.cumsum(-1) <= room))
    if keep is None:
        return taken.nonzero()[:, -1].view(*scores.shape[:3], width)
    taken = taken & keep[:, None, None]
    place = torch.where(taken, taken.cumsum(-1) - 1, width)
    token = torch.arange(scores.shape[-1], device=scores.device).expand_as(place)
    chosen = torch.full((*scores.shape[:3], width + 1), -1, dtype=torch.long, device=scores.device)
    return chosen.scatter_(-1, place, token)[..., :width]


def cluster_totals(x: Tensor, nearest: Tensor, clusters: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many tokens each cluster is nearest to, and their sum, over the whole batch.

    Args:
        x: (B, H, N, D). nearest: int64 (B, H, N) in [0, clusters). keep: bool (B, H, N), tokens that count.
    Returns:
        counts (H, clusters) and sums (H, clusters, D), in x's dtype.
    """
    heads, dim = x.shape[1], x.shape[3]
    weight = torch.ones_like(x[..., 0]) if keep is None else keep.to(x.dtype)
    place = nearest.transpose(0, 1).reshape(heads, -1)
    counts = x.new_zeros(heads, clusters).scatter_add(1, place, weight.transpose(0, 1).reshape(heads, -1))
    rows = (x * weight[..., None]).transpose(0, 1).reshape(heads, -1, dim)
    sums = x.new_zeros(heads, clusters, dim).scatter_add(1, place[..., None].expand(-1, -1, dim), rows)
    return counts, sums


@torch.no_grad()
def ema_kmeans_step(
    means: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float = 0.99,
    eps: float = 1e-5,
) -> None:
    """One step of online k-means by moving averages, in place: `means` becomes the averaged sum over the smoothed averaged count.

    Args:
        means, ema_means: (H, C, D). ema_count: (H, C). counts, sums: of this step, as `cluster_totals` gives them.
        decay: share of the old averages that stays. eps: added to each count before they are scaled back to their total.
    """
    ema_count.lerp_(counts.to(ema_count.dtype), 1.0 - decay)
    ema_means.lerp_(sums.to(ema_means.dtype), 1.0 - decay)
    total = ema_count.sum(-1, keepdim=True)
    smoothed = (ema_count + eps) / (total + ema_count.shape[-1] * eps) * total
    means.copy_((ema_means / smoothed.clamp(min=torch.finfo(smoothed.dtype).tiny)[..., None]).to(means.dtype))


def spherical_kmeans_step(x: Tensor, means: Tensor, nearest: Tensor | None = None) -> Tensor:
    """New centroids (H, C, D) of unit length from tokens x (B, H, N, D); one that is nearest to no token stays.

    Args:
        nearest: int64 (B, H, N); default: by the largest product with `means`.
    """
    if nearest is None:
        nearest = cluster_affinity(x, means).argmax(-1)
    counts, sums = cluster_totals(x, nearest, means.shape[1])
    return torch.where(counts[..., None] == 0, means.to(x.dtype), F.normalize(sums, dim=-1))


@torch.no_grad()
def spherical_kmeans(
    x: Tensor, clusters: int, *, iterations: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """Centroids (H, clusters, D) of tokens x (B, H, N, D): tokens drawn at random, then `iterations` steps.

    The tokens drawn are the same numbers for all heads; with fewer tokens than clusters some are drawn several times.
    """
    require_tensor("x", x, dims=4, floating=True)
    require_int("clusters", clusters, 1)
    require_int("iterations", iterations, 0)
    batch, heads, length, dim = x.shape
    require(batch * length > 0, "x", "no tokens", "at least one")
    where = x.device if generator is None else generator.device
    if batch * length >= clusters:
        drawn = torch.randperm(batch * length, generator=generator, device=where)[:clusters]
    else:
        drawn = torch.randint(batch * length, (clusters,), generator=generator, device=where)
    means = x.transpose(0, 1).reshape(heads, -1, dim)[:, drawn.to(x.device)]
    for _ in range(iterations):
        means = spherical_kmeans_step(x, means)
    return means
