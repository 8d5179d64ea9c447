"""The specification: every softmax-attention op in eager PyTorch, short, slow, differentiable, float64-safe.

Backends are faster ways to these numbers. Half types are computed in float32; a row with nothing to attend to gives zeros,
`lse = -inf` and zero gradients. (State ops have theirs in `state/reference.py`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .masks import Mask, index_grid
from .selection import Selection


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    bias: Tensor | None = None,
    selection: Selection | None = None,
    q_offset: int,
    scale: float,
) -> Tensor:
    """Scores before the softmax, (B, H, N, M), -inf where nothing may be seen."""
    batch, num_heads, q_len, _ = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).reshape(batch, num_kv_heads, num_heads // num_kv_heads, q_len, q.shape[3])
    scores = torch.einsum("bkgnd,bkmd->bkgnm", grouped, k.to(dtype)).reshape(batch, num_heads, q_len, kv_len) * scale
    b, h, qi, ki = index_grid(batch, num_heads, q_len, kv_len, q_offset, q.device)
    if score_mod is not None:
        scores = torch.broadcast_to(score_mod(scores, b, h, qi, ki), scores.shape)
    if bias is not None:
        scores = scores + bias.to(dtype)
    keep = scores != -torch.inf
    if mask is not None:
        keep = keep & mask.keep(b, h, qi, ki)
    if selection is not None:
        chosen = selection.to(q.device).materialize()
        if chosen.shape[1] not in (1, num_heads):
            chosen = chosen.repeat_interleave(num_heads // num_kv_heads, dim=1)
        keep = keep & chosen
    return scores.masked_fill(~keep, -torch.inf)


def softmax_with_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its log-sum-exp; rows that are all -inf give zeros and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    empty = (scores == -torch.inf).all(-1)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return weights, lse.masked_fill(empty, -torch.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    bias: Tensor | None = None,
    selection: Selection | None = None,
    q_offset: int,
    scale: float,
    dropout: float = 0.0,
    return_lse: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention by its definition. Arguments as in `regard.ops.attention`, all resolved."""
    scores = attention_scores(
        q, k, mask=mask, score_mod=score_mod, bias=bias, selection=selection, q_offset=q_offset, scale=scale
    )
    weights, lse = softmax_with_lse(scores)
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout)
    out = weighted_values(weights, v)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Head outputs (B, H, N, Dv) from weights (B, H, N, M) and values (B, Hkv, M, Dv)."""
    batch, num_heads, q_len, kv_len = weights.shape
    grouped = weights.reshape(batch, v.shape[1], num_heads // v.shape[1], q_len, kv_len)
    out = torch.einsum("bkgnm,bkme->bkgne", grouped, v.to(weights.dtype))
    return out.reshape(batch, num_heads, q_len, v.shape[-1])


def merge_lse(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the union of disjoint key sets, from the partial results.

    Args:
        outs: partial outputs, each (..., N, Dv). lses: their log-sum-exps, each (..., N), natural log; -inf where a part is empty.
    Returns:
        merged output and log-sum-exp.
    """
    stacked = torch.stack([lse.to(accumulation_dtype(lse.dtype)) for lse in lses])
    weights, lse = softmax_with_lse(stacked.movedim(0, -1))
    out = sum(weights[..., i, None] * part.to(weights.dtype) for i, part in enumerate(outs))
    return torch.as_tensor(out).to(outs[0].dtype), lse


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The same in tiles, forward and backward, as FlashAttention defines it; arguments of `regard.ops.flash_tiles.tiled_attention`."""
    from .flash_tiles import tiled_attention  # it stands on this file

    return tiled_attention(q, k, v, **options)


def attention_cascade(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """The same as a cascade of Einsums of one, two or three passes over the keys; arguments of `regard.ops.attention_cascade`."""
    from .cascades import attention_cascade as run

    return run(q, k, v, **options)
