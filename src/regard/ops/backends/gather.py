"""Decoding through a selection: the chosen keys and values are gathered, and the one block of queries attends densely to them.

Reads what was selected and nothing else, whatever the length of the context. Plain differentiable torch, on any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import causal
from ..reference import accumulation_dtype, softmax_with_lse, weighted_values

if TYPE_CHECKING:
    from ..attention import AttentionRequest

_LIMIT = 1 << 24  # numbers gathered, and scores


def refuses(request: AttentionRequest) -> str | None:
    if request.selection is None:
        return "it needs a selection"
    if request.selection.num_q_blocks != 1:
        return f"it serves one block of queries, and the selection has {request.selection.num_q_blocks}"
    if request.q.numel() == 0 or request.k.numel() == 0 or request.v.numel() == 0:
        return "it is not defined on empty tensors"
    return None


def suits(request: AttentionRequest) -> bool:
    selection = request.selection
    assert selection is not None
    batch, num_heads, q_len, head_dim = request.q.shape
    keys = batch * num_heads * selection.indices.shape[-1] * selection.block_k
    return keys * max(q_len, head_dim) <= _LIMIT


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    q, k, v, selection = request.q, request.k, request.v, request.selection
    assert selection is not None
    batch, num_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    blocks = selection.indices[:, :, 0].to(q.device)
    if blocks.shape[1] == 1:
        blocks = blocks.expand(-1, kv_heads, -1)
    heads = blocks.shape[1]  # kv heads, or query heads where each has a list of its own
    if blocks.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3])) + 0 * (q.sum() + k.sum() + v.sum()), _nothing(q)
    place = blocks[..., None] * selection.block_k + torch.arange(selection.block_k, device=q.device)
    place = place.flatten(2).expand(batch, -1, -1)
    there = ((blocks >= 0)[..., None] & (place.unflatten(2, (-1, selection.block_k)) < kv_len)).flatten(2)
    at = place.clamp(0, kv_len - 1)
    owner = torch.arange(heads, device=q.device) // (heads // kv_heads)
    chosen_k, chosen_v = _rows(k, at, owner), _rows(v, at, owner)  # (B, heads, W, D)
    sees_all = request.mask is None or (request.mask is causal and request.q_offset >= kv_len - 1)
    plain = sees_all and request.score_mod is None and request.bias is None and not request.return_lse
    if plain and (not q.is_cuda) and bool(there.all()):
        grouped = q.reshape(batch, heads, -1, q.shape[3])
        out = F.scaled_dot_product_attention(
            grouped, chosen_k, chosen_v, dropout_p=request.dropout, scale=request.scale
        )
        return out.reshape(batch, num_heads, q_len, -1), None
    return _general(request, chosen_k, chosen_v, at, there, sees_all)


def _general(
    request: AttentionRequest, chosen_k: Tensor, chosen_v: Tensor, at: Tensor, there: Tensor, sees_all: bool
) -> tuple[Tensor, Tensor]:
    """With everything that bends or forbids scores, as the reference has it."""
    q = request.q
    batch, num_heads, q_len, _ = q.shape
    heads = chosen_k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).reshape(batch, heads, -1, q.shape[3])
    scores = (grouped @ chosen_k.to(dtype).transpose(-1, -2)).reshape(batch, num_heads, q_len, -1) * request.scale
    at, there = (x.repeat_interleave(num_heads // heads, dim=1)[:, :, None] for x in (at, there))
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(num_heads, device=q.device).view(1, -1, 1, 1)
    row = torch.arange(q_len, device=q.device).view(1, 1, -1, 1) + request.q_offset
    if request.score_mod is not None:
        scores = torch.broadcast_to(request.score_mod(scores, b, h, row, at), scores.shape)
    if request.bias is not None:
        full = request.bias.to(dtype).expand(batch, num_heads, q_len, request.k.shape[2])
        scores = scores + full.gather(-1, at.expand(-1, -1, q_len, -1))
    keep = there & (scores != -torch.inf)
    if not sees_all:
        assert request.mask is not None
        keep = keep & request.mask.keep(b, h, row, at)
    weights, lse = softmax_with_lse(scores.masked_fill(~keep, -torch.inf))
    if request.dropout > 0.0:
        weights = F.dropout(weights, request.dropout)
    return weighted_values(weights, chosen_v).to(q.dtype), lse


def _rows(x: Tensor, at: Tensor, owner: Tensor) -> Tensor:
    """Rows `at` (B, heads, W) of x (B, Hkv, M, D), head h reading x's head owner[h]: (B, heads, W, D).

    By one flat index: everything else that torch offers is several times slower on the CPU.
    """
    batch, kv_heads, length, dim = x.shape
    steps, rest = zip(*(divmod(stride, dim) for stride in x.stride()[:3]))
    rows_apart = x.stride(3) == 1 and not any(rest) and not (torch.is_grad_enabled() and x.requires_grad)
    if rows_apart:  # a cache with room at its end, say: look at its memory as rows, without a copy
        extent = sum(step * (size - 1) for step, size in zip(steps, (batch, kv_heads, length))) + 1
        flat = x.as_strided((extent, dim), (dim, 1))
    else:
        steps, flat = (kv_heads * length, length, 1), x.reshape(-1, dim)
    b = torch.arange(batch, device=x.device)[:, None, None] * steps[0]
    index = at * steps[2] + owner[:, None] * steps[1] + b
    return flat.index_select(0, index.flatten()).reshape(*at.shape, dim)


def _nothing(q: Tensor) -> Tensor:
    return torch.full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
