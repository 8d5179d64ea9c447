"""Recurrent form: one token after the other, a state and nothing else. What decoding does."""

from __future__ import annotations

import torch
from torch import Tensor

from .tensors import accumulate_dtype, expand_heads


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_(t-1) + k_t^T v_t and o_t = q_t S_t. log_decay: None, (B, H, N) or (B, H, N, D).

    Outputs (B, H, N, Dv) in `dtype`, and the last state in the accumulation dtype, always a new tensor.
    """
    batch, heads, length, dim = q.shape
    acc = accumulate_dtype(q.dtype)
    groups = heads // k.shape[1]
    running = q.new_zeros(batch, heads, dim, v.shape[-1], dtype=acc) if state is None else state.to(acc)
    outs = []
    for t in range(length):
        left = expand_heads(k[:, :, t].to(acc), groups)[..., None]  # (B, H, D, 1)
        right = expand_heads(v[:, :, t].to(acc), groups)[:, :, None]  # (B, H, 1, Dv)
        if log_decay is not None:
            kept = log_decay[:, :, t].to(acc).exp()
            running = running * (kept[..., None] if log_decay.dim() == 4 else kept[..., None, None])
        running = running + left * right
        outs.append((q[:, :, t, None].to(acc) @ running).to(dtype))
    out = torch.cat(outs, dim=2) if outs else q.new_zeros(batch, heads, 0, v.shape[-1], dtype=dtype)
    return out, running
