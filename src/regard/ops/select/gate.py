"""From the scores of a learned gate to block maps and selections, by SeerAttention's rules.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024, arXiv 2410.13276). Code read for numbers (MIT):
microsoft/SeerAttention @ aba03e3, `seer_attn/modules/common.py` and `decode_sparse/attn_gate_inf.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_fraction, require_int, require_tensor


def gate_block_map(
    scores: Tensor,
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    dense_last: int = 0,
    diagonal: bool = False,
    visible: Tensor | None = None,
) -> Tensor:
    """The key blocks that a prompt's query blocks look at.

    Args:
        scores: (B, H, nQ, nK) of the gate: probabilities for a threshold, any monotone scores for a ratio.
        threshold: keep what is above it. ratio: of the causal triangle: the best floor((1 - sqrt(1 - ratio)) nK) of each row, at
            least 1, of which the future ones are then dropped. Exactly one of the two.
        dense_last: query blocks at the end that look at everything.
        visible: bool (nQ, nK), the blocks that begin at or before the query block's end; None: query block i ends where key block
            i + nK - nQ does. diagonal: whether each query block keeps its own key block. As released it may lose it.
    Returns:
        bool (B, H, nQ, nK), causal.
    """
    require_tensor("scores", scores, dims=4, floating=True)
    require_int("dense_last", dense_last, 0)
    if (threshold is None) == (ratio is None):
        raise bad_value("threshold, ratio", (threshold, ratio), "exactly one of them")
    rows, columns = scores.shape[2:]
    if threshold is not None:
        kept = scores > threshold
    else:
        count = max(1, int((1 - math.sqrt(1 - require_fraction("ratio", ratio))) * columns))
        best = scores.topk(min(count, columns), dim=-1).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    if dense_last:
        kept[:, :, max(0, rows - dense_last) :] = True
    if visible is None:
        visible = torch.ones(rows, columns, dtype=torch.bool, device=kept.device).tril_(columns - rows)
    if diagonal:  # the last block that is visible
        kept = kept.scatter(-1, (visible.sum(-1, keepdim=True) - 1).clamp(min=0).expand(*kept.shape[:3], 1), True)
    return kept & visible


def decode_block_map(
    scores: Tensor, *, threshold: float | None = None, topk: int | None = None, visible: Tensor | None = None
) -> Tensor:
    """The key blocks that one token looks at: those above `threshold`, or the best `topk`, and always the last one.

    Args:
        scores: (B, Hkv, nK), probabilities for a threshold. visible: bool, broadcastable, for `topk`: blocks that there are.
    Returns:
        bool (B, Hkv, nK).
    """
    require_tensor("scores", scores, dims=3, floating=True)
    if (threshold is None) == (topk is None):
        raise bad_value("threshold, topk", (threshold, topk), "exactly one of them")
    if threshold is not None:
        kept = scores > threshold
    else:
        count = require_int("topk", topk, 0)
        kept = torch.ones_like(scores, dtype=torch.bool)
        if count < scores.shape[-1]:
            kept = torch.zeros_like(kept).scatter_(-1, scores.topk(count, dim=-1).indices, True)
        if visible is not None:
            kept = kept & visible
    require(scores.shape[-1] > 0, "scores", "no block", "at least one")
    kept[..., -1] = True
    return kept
