"""Parallel form: every pair of tokens at once. Quadratic in time and memory; the plainest differentiable form."""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import cumulative_decay
from .tensors import accumulate_dtype, expand_heads


def parallel_causal(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) in `dtype`, and the state after the last token. log_decay: None, (B, H, N) or (B, H, N, D)."""
    batch, heads, length = q.shape[:3]
    acc = accumulate_dtype(q.dtype)
    groups = heads // k.shape[1]
    q, k, v = q.to(acc), expand_heads(k.to(acc), groups), expand_heads(v.to(acc), groups)
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if log_decay is None:
        scores = (q @ k.transpose(-1, -2)).masked_fill(~past, 0)
        reach, left = q, k
    else:
        total = cumulative_decay(log_decay)
        total = total if total.dim() == 4 else total[..., None]
        channels = total.shape[-1]

        def weight(channel: int) -> Tensor:
            column = total[..., channel : channel + 1]
            return (column - column.transpose(-1, -2)).masked_fill(~past, float("-inf")).exp().to(acc)

        if channels == 1:
            scores = (q @ k.transpose(-1, -2)) * weight(0)
        else:  # channel by channel: N x N numbers at a time instead of N x N x D
            scores = q.new_zeros(batch, heads, length, length)
            for c in range(channels):
                scores = scores + q[..., c, None] * weight(c) * k[..., None, :, c]
        reach = q * total.exp().to(acc)
        left = k * (total[:, :, -1:] - total).exp().to(acc)
    out = scores @ v
    end = left.transpose(-1, -2) @ v
    if state is not None:
        state = state.to(acc)
        out = out + reach @ state
        if log_decay is not None and length:
            state = total[:, :, -1:].exp().to(acc).transpose(-1, -2) * state
        end = end + state
    return out.to(dtype), end


def everything(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The non-causal form: every query (B, H, N, D) reads the one state of all keys (B, Hkv, M, D)."""
    batch, heads, length, dim = q.shape
    acc = accumulate_dtype(q.dtype)
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    total = k.to(acc).transpose(-1, -2) @ v.to(acc)  # (B, Hkv, D, Dv): a group shares it
    if state is None:
        grouped = q.to(acc).reshape(batch, kv_heads, groups * length, dim)
        out = (grouped @ total).reshape(batch, heads, length, v.shape[-1])
        return out.to(dtype), expand_heads(total, groups)
    total = state.to(acc) + expand_heads(total, groups)
    return (q.to(acc) @ total).to(dtype), total
