"""The weights of a linear attention, written down: to look at, to teach by, and for masks that no state can honour."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require_tensor
from .linear import FeatureMapArgument, _check, _features
from .tensors import accumulate_dtype, expand_heads

__all__ = ["linear_attention_weights"]


def linear_attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    feature_map: FeatureMapArgument = None,
    normalize: bool = True,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The weights (B, H, N, M), float32 or float64, that `regard.ops.linear_attention` applies without writing them down.

    Shapes: q (B, H, N, D), k (B, Hkv, M, D). Unlike the op, `causal` takes M > N (queries are the last positions), and `mask`, bool and
    broadcastable to (B, H, N, M), True = may attend, may be anything.

    feature_map, normalize, scale, eps: as `regard.ops.linear_attention`. A row that sees nothing is zero. Quadratic in memory.
    """
    value = k[..., :1] if isinstance(k, Tensor) and k.dim() == 4 else k
    _check(q, k, value, None, False, None)
    fq, fk = _features(q, k, feature_map)
    wide = accumulate_dtype(q.dtype)
    scores = fq.to(wide) @ expand_heads(fk.to(wide), q.shape[1] // k.shape[1]).transpose(-1, -2)
    scores = scores if scale is None else scores * scale
    rows, columns = q.shape[2], k.shape[2]
    if causal:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        mask = seen if mask is None else require_tensor("mask", mask) & seen
    if mask is not None:
        scores = scores.masked_fill(~mask, 0)
    return scores / (scores.sum(-1, keepdim=True) + eps) if normalize else scores
