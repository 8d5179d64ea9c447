"""The noisy top-k gate of sparse mixtures of experts, as the consciousness prior's skeleton uses it to pick few elements of many.

Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538), section 2.1; code read: AI-ON/TheConsciousnessPrior @
5f30aae (no licence), `src/models/consciousness.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import require, require_int, require_tensor
from .reference import accumulation_dtype

__all__ = ["noisy_topk_gate"]

FLOOR = 1e-2


def noisy_topk_gate(
    logits: Tensor,
    k: int,
    noise_logits: Tensor | None = None,
    *,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the k largest logits: (indices (..., k) int64 from the largest, weights (..., k) summing to 1).

    Args:
        logits: (..., n), n >= k >= 1. noise_logits: (..., n): in training, softplus of them + 0.01 is the standard deviation of normal
            noise added to the logits before the choice; None or not training: no noise.

    Gradients reach the chosen logits (and their noise) alone. Half types are computed in float32. Ties go to either.
    """
    require_tensor("logits", logits, floating=True)
    require(logits.dim() > 0, "logits", "no axes", "(..., n)")
    count = logits.shape[-1]
    require(require_int("k", k, 1) <= count, "k", k, f"at most the number of logits ({count})")
    made = logits.to(accumulation_dtype(logits.dtype))
    if noise_logits is not None:
        require_tensor("noise_logits", noise_logits, floating=True)
        shape = tuple(noise_logits.shape)
        require(shape == tuple(logits.shape), "noise_logits", f"shape {shape}", f"shape {tuple(logits.shape)}")
        if training:
            drawn = torch.randn(made.shape, dtype=made.dtype, device=made.device, generator=generator)
            made = made + drawn * (F.softplus(noise_logits.to(made.dtype)) + FLOOR)
    top, indices = made.topk(k, dim=-1)
    return indices, top.softmax(-1).to(logits.dtype)
