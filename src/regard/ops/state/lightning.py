"""Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models.

Qin et al. 2024, arXiv 2401.04658; code read for numbers: OpenNLPLab/lightning-attention (`lightning_attn_func` and its
torch reference). Causal linear attention without normaliser or scale, its past fading by a fixed factor per head and step.

What differs: state in and out, GQA, any width (their check `16 % dim` turns away 1, 2, 4, 8 and 16), float64, and no
cutting of wide keys into pieces; the numbers are the same. The work is done by `linear_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_tensor
from .linear import linear_attention
from .linear_state import LinearState


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None = None,
    *,
    state: LinearState | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """o_t = sum_(j <= t) exp(-slope (t - j)) (q_t . k_j) v_j.

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> (B, H, N, Dv). slope: (H,) or the authors' (H, 1, 1), >= 0, in
    nats per token, a constant of the model (`regard.scores.alibi_slopes`, `regard.ops.state.layer_log_decay`); None
    never forgets. The other arguments, the errors and `return_state` are those of `linear_attention`.
    """
    log_decay = None
    if slope is not None:
        require_tensor("slope", slope, floating=True)
        if slope.dim() not in (1, 3) or slope.numel() != slope.shape[0]:
            raise bad_value("slope", f"shape {tuple(slope.shape)}", "(H,) or (H, 1, 1)")
        slope = slope.reshape(-1)
        require(slope.shape[0] == q.shape[1], "slope", f"{slope.shape[0]} numbers", f"one per head of q ({q.shape[1]})")
        if slope.device.type == "cpu" and not torch.compiler.is_compiling():
            require(bool((slope >= 0).all()), "slope", "a number that is negative or NaN", "numbers >= 0")
        log_decay = -slope
    return linear_attention(
        q, k, v, log_decay=log_decay, state=state, return_state=return_state,
        form=form, chunk_size=chunk_size, lengths=lengths, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
