"""Focal binary cross-entropy with soft labels, as DHSA trains its boundary predictor: Xiong et al. (2025, arXiv 2510.24606). Code read
for numbers (no licence): xiongsiheng/DHSA @ cc8e9c7, `legacy/boundary_predictor/loss.py`. The focal factor is that of Lin et al.,
"Focal Loss for Dense Object Detection" (2017, arXiv 1708.02002).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import require, require_name, require_tensor


def soft_label_transform(ratio: Tensor, alpha: float = 4.0, beta: float = 0.0) -> Tensor:
    """Ratios in (0, inf) as probabilities: sigmoid(alpha * (log(ratio + 1e-6) - beta)).

    A ratio of 1 gives 1/2 with beta = 0. The authors' training script clamps ratios to at least 1, takes alpha = 2, beta = log 2
    and makes labels hard at 1/2, so that a ratio above 2 is a boundary.
    """
    require_tensor("ratio", ratio, floating=True)
    return torch.sigmoid(alpha * (torch.log(ratio + 1e-6) - beta))


def focal_bce(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    pos_weight: float | Tensor | None = None,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy times (1 - p_t)^gamma: what is already right counts little.

    p_t = p y + (1 - p)(1 - y) with p = sigmoid(logit), which also serves soft targets y. gamma = 0 is plain cross-entropy.

    Args:
        logits, targets: of one shape; targets in [0, 1] (bool is fine).
        mask: True where an entry counts, broadcastable. None: everywhere.
        pos_weight: factor on the positive part of the cross-entropy, a number or broadcastable.
        gamma: >= 0.
        reduction: "mean" over the entries that count (0 when none does), "sum", or "none" (0 where masked).
    """
    require_tensor("logits", logits, floating=True)
    require_tensor("targets", targets)
    require(targets.shape == logits.shape, "targets", f"shape {tuple(targets.shape)}", f"logits' {tuple(logits.shape)}")
    require(gamma >= 0, "gamma", gamma, "a number >= 0")
    require_name("reduction", reduction, ("mean", "sum", "none"))
    targets = targets.to(logits.dtype)
    weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    p = torch.sigmoid(logits)
    right = p * targets + (1 - p) * (1 - targets)
    counts = torch.ones_like(logits) if mask is None else mask.to(logits.dtype).expand(logits.shape)
    loss = (1 - right).pow(gamma) * entropy * counts
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum().clamp(min=1.0)
