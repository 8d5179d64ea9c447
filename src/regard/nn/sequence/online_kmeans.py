"""Centroids that follow the data while a layer trains: the state of content-routed attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_fraction, require_int
from ...ops import kmeans

Items = tuple[Tensor, Tensor | None]
"""Tokens (B, H, N, D) and which of them count, bool (B, H, N), or None for all."""


class OnlineKMeans(nn.Module):
    """One set of centroids a head, kept up to date by moving averages (or by gradient).

    Args:
        num_heads, num_clusters, head_dim: sizes of `means` (H, C, D).
        decay: share of the old averages that a training step keeps. ema: False makes `means` a parameter, which `loss` trains.
        eps: smoothing of the counts.

    State: `means`; with `ema` also the buffers `ema_count` (H, C) and `ema_means` (H, C, D), the averaged counts and sums.
    """

    means: Tensor
    ema_count: Tensor
    ema_means: Tensor

    def __init__(
        self,
        num_heads: int,
        num_clusters: int,
        head_dim: int,
        *,
        decay: float = 0.99,
        ema: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_clusters", num_clusters), ("head_dim", head_dim)):
            require_int(name, value, 1)
        self.decay, self.ema, self.eps = require_fraction("decay", decay), bool(ema), eps
        means = F.layer_norm(torch.randn(num_heads, num_clusters, head_dim), (head_dim,), eps=1e-6)
        if not ema:
            self.means = nn.Parameter(means)
            return
        self.register_buffer("means", means)
        self.register_buffer("ema_count", torch.zeros(num_heads, num_clusters))
        self.register_buffer("ema_means", means.clone())

    def affinity(self, x: Tensor) -> Tensor:
        """Products of tokens (B, H, N, D) with the centroids, (B, H, N, C), without a gradient."""
        with torch.no_grad():
            return kmeans.cluster_affinity(x, self.means)

    def loss(self, x: Tensor, nearest: Tensor, commitment: float, keep: Tensor | None = None) -> Tensor:
        """`commitment` times the mean squared distance of the tokens to their centroids, by which tokens move; without `ema` also
        the same distance with weight 1, by which the centroids move.

        Args:
            x: (B, H, N, D). nearest: int64 (B, H, N). keep: bool (B, H, N), tokens that count (None: all).
        """
        heads = torch.arange(x.shape[1], device=x.device)[:, None]
        assigned = self.means[heads, nearest].to(x.dtype)
        loss = commitment * _distance(x, assigned.detach(), keep)
        return loss if self.ema else loss + _distance(x.detach(), assigned, keep)

    @torch.no_grad()
    def update(
        self, items: list[Items], nearest: list[Tensor], *, together: bool = False, mixed_counts: bool = False
    ) -> None:
        """A step of the moving averages for each of `items` in turn; `means` follow at the end.

        Args:
            nearest: int64 (B, H, N) for each of `items`. together: one step, for the mean of them all.
            mixed_counts: count as the Routing Transformer's released code does, by a reshape that deals tokens out to heads in turn.
        """
        require(self.ema, "ema", False, "True: without moving averages the centroids are trained by `loss`")
        clusters = self.means.shape[1]
        totals = []
        for (x, keep), near in zip(items, nearest):
            counts, sums = kmeans.cluster_totals(x.detach(), near, clusters, keep)
            if mixed_counts:
                weight = torch.ones_like(near) if keep is None else keep.long()
                head = torch.arange(near.numel(), device=near.device) % self.means.shape[0]
                counts = (
                    torch.zeros_like(counts)
                    .flatten()
                    .index_add(0, head * clusters + near.flatten(), weight.flatten().to(counts.dtype))
                )
                counts = counts.view(-1, clusters)
            totals.append((counts, sums))
        if together:
            counts, sums = (torch.stack(each).mean(0) for each in zip(*totals))
            totals = [(counts, sums)]
        for counts, sums in totals:
            kmeans.ema_kmeans_step(self.means, self.ema_count, self.ema_means, counts, sums, self.decay, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.means.shape)}, decay={self.decay}, ema={self.ema}"


def _distance(x: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    square = (x - y).square()
    if keep is None:
        return square.mean()
    return square.mul(keep[..., None]).sum() / (keep.sum() * x.shape[-1]).clamp(min=1)
