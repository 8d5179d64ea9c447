"""Additive scores, v . tanh(q + k): how well queries and keys go together by a small network in place of a product.

Bahdanau, Cho, Bengio 2015 (ICLR, arXiv 1409.0473). The projections of queries and keys are made outside, once each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_tensor

_PIECE = 1 << 24  # entries of tanh(...) at a time where no gradient is wanted


def additive_scores(queries: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """queries (B, M, A), keys (B, N, A), v (A,) -> (B, M, N), v . tanh(queries_i + keys_j)."""
    for name, tensor in (("queries", queries), ("keys", keys)):
        require_tensor(name, tensor, dims=3, floating=True)
        require(tensor.shape[2] == v.shape[0], name, f"shape {tuple(tensor.shape)}", f"(B, n, {v.shape[0]})")
    step = max(1, queries.shape[1])
    if not torch.is_grad_enabled():
        step = max(1, min(step, _PIECE // max(1, keys.numel())))
    return torch.cat([torch.tanh(keys[:, None] + some[:, :, None]) @ v for some in queries.split(step, dim=1)], dim=1)
