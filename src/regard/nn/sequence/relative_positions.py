"""Learned relative positions on keys and values, Shaw et al. "Self-Attention with Relative Position Representations" (2018,
arXiv 1803.02155), for attention inside small groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelativePositions(nn.Module):
    """Learned vectors for distances clipped to [-reach, reach], added to keys and to values (Shaw et al. 2018)."""

    def __init__(self, reach: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.reach = reach
        self.keys = nn.Parameter(torch.randn(2 * reach + 1, key_dim) * key_dim**-0.5)
        self.values = nn.Parameter(torch.randn(2 * reach + 1, value_dim) * value_dim**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, distance: Tensor, dropout: float) -> Tensor:
        """Attention of q (..., n, d) over k, v (..., m, d) where `keep` (..., n, m); distance int64 (n, m), key minus query."""
        near = distance.clamp(-self.reach, self.reach) + self.reach
        scores = q @ k.mT + torch.einsum("...nd,nmd->...nm", q, self.keys[near])
        weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
        weights = F.dropout(weights, dropout)
        return weights @ v + torch.einsum("...nm,nmd->...nd", weights, self.values[near])
