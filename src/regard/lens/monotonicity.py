"""Does a row of attention weights rise with its scores? What the softmax does always, and most feature maps do not.

The Hedgehog & the Porcupine (Zhang et al. 2024, arXiv 2402.04347) holds this, beside low entropy (`regard.lens.attention_entropy`), for
what a linear attention needs to stand in for the softmax. The authors show curves; the rank correlation of each row is our figure for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import bad_type, require, require_tensor

__all__ = ["monotonicity"]


def monotonicity(scores: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation of each row of `weights` with the same row of `scores`: 1 where they rise together, -1 the reverse.

    Args:
        scores, weights: (..., N, M): q . k, and what an attention makes of it. mask: bool, broadcastable to them, the keys that a row sees
            (`torch.ones(N, M).tril().bool()` where causal); None: all.

    Returns:
        (..., N) float64; NaN where a row sees fewer than 2 keys. Equal entries rank in the order of their keys.
    """
    require_tensor("scores", scores, floating=True)
    require_tensor("weights", weights, floating=True)
    require(scores.dim() >= 2, "scores", f"shape {tuple(scores.shape)}", "(..., N, M)")
    got, need = f"shape {tuple(weights.shape)}", f"that of scores, {tuple(scores.shape)}"
    require(weights.shape == scores.shape, "weights", got, need)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        require_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise bad_type("mask", mask.dtype, "a bool tensor")
        seen = seen & mask
    count = seen.sum(-1, keepdim=True).double()

    def centred(x: Tensor) -> Tensor:
        order = x.double().masked_fill(~seen, torch.inf).sort(dim=-1, stable=True).indices  # unseen keys rank last
        rank = order.argsort(-1).double()
        return (rank - (count - 1) / 2).masked_fill(~seen, 0)

    a, b = centred(scores), centred(weights)
    found = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return found.masked_fill(count[..., 0] < 2, torch.nan)
