"""Attention sinks in one head's weights, and taking weight from them.

Paper: Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration" (ICML 2024, arXiv 2406.15765). Authors' code, read for numbers: GATECH-EIC/ACT (`models/llama_modelling_aug.py`).

A key is a sink for a head if the queries that may see it give it more than `threshold` in the mean. All sinks but the first (the
opening token, whose sink the model needs) keep a share `beta` of their weight; what is freed goes to the other keys of the row, in
proportion to what they had.

What differs from the authors' code: it works on the first sample of a batch alone and knows no padding; ours on all, and rows and keys
that are padding do not count. Its last line sets entry (0, 0) of the map to 1. In a prompt that is what stands there anyway; in a decode
step it overwrites the one row, which then sums to more than 1, and the freed weight is dealt to the sinks too. `variant="released"` does
so; the default, "paper", treats every row alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_fraction, require_name, require_tensor

__all__ = ["calibrate_sinks", "key_means", "sink_keys"]


def key_means(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Mean weight that each key gets from the queries that may see it, (..., M).

    Args:
        weights: (..., N, M). visible: bool, broadcastable to it, which query counts for which key; None: causal, the queries last.
    """
    require_tensor("weights", weights, floating=True)
    require(weights.dim() >= 2, "weights", f"shape {tuple(weights.shape)}", "(..., N, M)")
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    q_len, kv_len = weights.shape[-2:]
    if visible is None:
        visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=weights.device).tril(kv_len - q_len)
    counts = visible.sum(-2)
    return torch.where(visible, wide, 0.0).sum(-2) / counts.clamp(min=1)


def sink_keys(
    weights: Tensor, threshold: float = 0.1, *, relative: bool = False, visible: Tensor | None = None
) -> Tensor:
    """Which keys are sinks, bool (..., M): those with a mean weight above `threshold`.

    Args:
        weights, visible: as in `key_means`. relative: the bound is `threshold` / (number of keys), the paper's form; else `threshold`
            itself, the code's.
    """
    require(threshold >= 0, "threshold", threshold, "a number >= 0")
    means = key_means(weights, visible)
    if not relative:
        return means > threshold
    if visible is None:
        return means > threshold / max(1, weights.shape[-1])
    return means > threshold / visible.any(-2).sum(-1, keepdim=True).clamp(min=1)


def calibrate_sinks(
    weights: Tensor,
    beta: float = 0.4,
    threshold: float = 0.1,
    *,
    relative: bool = False,
    visible: Tensor | None = None,
    variant: str = "paper",
) -> Tensor:
    """Leave all sinks but the first a share `beta` of their weight, and deal what is freed to the other keys.

    Args:
        weights: softmax weights (..., N, M), one map a head; rows sum to 1, or to 0. Not modified.
        beta: in [0, 1]; 1 changes nothing. threshold, relative, visible: as in `sink_keys`.
        variant: "paper", or "released" (see above; the two differ in maps of one row).

    Returns:
        (..., N, M) in the dtype of `weights`; sums of rows are kept ("paper"), and so are ratios among keys that are no sinks. A row
        that has weight on sinks alone stays as it is.
    """
    require_fraction("beta", beta)
    require_name("variant", variant, ("paper", "released"))
    sinks = sink_keys(weights, threshold, relative=relative, visible=visible)
    sinks &= sinks.cumsum(-1) > 1  # the first one found is spared, whichever it is
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    table = sinks[..., None, :]
    freed = (1.0 - beta) * torch.where(table, wide, 0.0).sum(-1, keepdim=True)
    share = torch.where(table, 0.0, wide)
    if variant == "released":
        share = torch.cat([wide[..., :1, :], share[..., 1:, :]], dim=-2)
    total = share.sum(-1, keepdim=True)
    out = torch.where(table, beta * wide, wide) + freed * share / torch.where(total > 0, total, 1.0)
    out = torch.where(total > 0, out, wide)
    if variant == "released":
        out = torch.cat([torch.cat([torch.ones_like(out[..., :1, :1]), out[..., :1, 1:]], -1), out[..., 1:, :]], -2)
    return out.to(weights.dtype)
