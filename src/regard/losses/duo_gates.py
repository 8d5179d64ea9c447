"""DuoAttention's gate learning: one gate per kv head mixes full and streaming attention, distilled from the dense model.

Xiao et al. 2024 (ICLR 2025), arXiv 2410.10819; numbers from mit-han-lab/duo-attention (MIT). These are the parts of the objective as
functions; the training over passkeys is `fit_duo`.
"""

from __future__ import annotations

from torch import Tensor

from .._checks import require, require_name, require_tensor
from ..ops import masks
from ..ops.attention import attention


def duo_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    sink: int = 128,
    recent: int = 256,
    full: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """gate * full attention + (1 - gate) * streaming attention, by head. Causal.

    Args:
        q: (B, H, N, D). k, v: (B, Hkv, N, D). gates: (Hkv,), clamped to [0, 1] here; query heads share their kv head's gate.
        sink, recent: what streaming attention sees: kv <= q and (kv < sink or q - kv < recent).
        full: (B, H, N, D), the full branch. The released code takes the TEACHER's attention output here (its own hidden states, no
            gradient); None: full attention of these very q, k, v, as the paper writes.
    Returns:
        (B, H, N, D).
    """
    require_tensor("gates", gates, dims=1, floating=True)
    require(len(gates) == k.shape[1], "gates", f"{len(gates)} gates", f"one a kv head, {k.shape[1]}")
    if full is None:
        full = attention(q, k, v, mask=masks.causal, scale=scale)
    stream = attention(q, k, v, mask=(masks.sink(sink) | masks.sliding_window(recent)) & masks.causal, scale=scale)
    gate = gates.clamp(0, 1).repeat_interleave(q.shape[1] // k.shape[1]).view(1, -1, 1, 1)
    return gate * full + (1 - gate) * stream


def duo_distillation_loss(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled positions of the mean squared difference of final hidden states.

    Args:
        teacher, student: (B, N, C) hidden states after the last norm; no gradient reaches the teacher.
        labels: (B, N); positions with labels >= 0 count (-100 elsewhere, as in language modelling).
    """
    chosen = labels >= 0
    require(bool(chosen.any()), "labels", "no label >= 0", "at least one labelled position")
    difference = (teacher.detach()[chosen] - student[chosen]).float()
    return difference.square().mean(-1).sum() / chosen.sum()


def duo_gate_penalty(gates: Tensor) -> Tensor:
    """Mean absolute gate; the runs of the paper weigh it by 0.05."""
    return gates.abs().mean()


def duo_lr_factor(step: int, steps: int, *, schedule: str = "trapezoid") -> float:
    """Learning-rate factor at `step` of `steps`: up over the first fifth (from 0.1), flat, down over the last fifth (to 0.1)."""
    require_name("schedule", schedule, ("trapezoid",))
    require(steps >= 1 and 0 <= step < steps, "step", step, f"0 <= step < steps = {steps}")
    fifth = max(1, steps // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))
