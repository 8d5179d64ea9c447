"""torch's scaled_dot_product_attention: dense kernels for what is dense or plainly causal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._shapes import broadcast_shape
from ..masks import causal

if TYPE_CHECKING:
    from ..attention import AttentionRequest

MATRIX_LIMIT = 1 << 22  # entries of a mask that may be written down


def _is_causal(request: AttentionRequest) -> bool:
    return request.mask is causal and request.q_offset == 0 and request.q.shape[2] <= request.k.shape[2]


def _sees_all(request: AttentionRequest) -> bool:
    # a single last query, as in decoding, sees every key under a causal mask
    return request.mask is None or (request.mask is causal and request.q_offset >= request.k.shape[2] - 1)


def refuses(request: AttentionRequest) -> str | None:
    if request.score_mod is not None:
        return "sdpa has no score_mod"
    if request.return_lse and not _gives_lse(request):
        return "sdpa returns the log-sum-exp on the cpu alone, without mask matrix, dropout and gradient"
    if request.q.numel() == 0 or request.k.numel() == 0 or request.v.numel() == 0:
        return "sdpa is not defined on empty tensors"
    return None


def is_native(request: AttentionRequest) -> bool:
    """Whether torch's kernels serve the request without a mask matrix."""
    return request.selection is None and request.bias is None and (_sees_all(request) or _is_causal(request))


def _gives_lse(request: AttentionRequest) -> bool:
    """Whether torch's kernel for the CPU, which has the log-sum-exp at hand, serves the request."""
    same = request.k.shape[-1] == request.v.shape[-1]
    plain = request.dropout == 0.0 and same and not request.needs_grad
    return plain and request.q.device.type == "cpu" and is_native(request)


def matrix_size(request: AttentionRequest) -> int:
    """Entries of the mask matrix that the request needs here."""
    batch, num_heads, q_len, _ = request.q.shape
    shape: tuple[int, ...] = (1, 1)
    if request.mask is not None:
        shape = (batch if request.mask.varies_batch else 1, num_heads if request.mask.varies_head else 1)
    if request.selection is not None:
        shape = broadcast_shape(shape, (request.selection.indices.shape[0], 1))
        shape = (shape[0], num_heads if request.selection.indices.shape[1] > 1 else shape[1])
    return shape[0] * shape[1] * q_len * request.k.shape[2]


def suits(request: AttentionRequest) -> bool:
    return is_native(request) or matrix_size(request) <= MATRIX_LIMIT


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    q, k, v = request.q, request.k, request.v
    options: dict[str, Any] = {
        "dropout_p": request.dropout,
        "scale": request.scale,
        "enable_gqa": k.shape[1] != q.shape[1],
    }
    if request.return_lse:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, not _sees_all(request), scale=request.scale)
    if is_native(request):
        return F.scaled_dot_product_attention(q, k, v, is_causal=not _sees_all(request), **options), None
    keep, additive = _matrix(request)
    # A row that may see nothing is NaN in some kernels: let it see everything, then blank it.
    empty = ~keep.any(-1, keepdim=True)
    keep = keep | empty
    attn_mask = keep if additive is None else additive.masked_fill(~keep, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
    return out.masked_fill(empty, 0.0), None


def _matrix(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """Allowed pairs (B|1, H|1, N, M), and the finite part of the bias in q's dtype."""
    batch, num_heads, q_len, _ = request.q.shape
    num_kv_heads, kv_len = request.k.shape[1:3]
    device = request.q.device
    keep = torch.ones((1, 1, q_len, kv_len), dtype=torch.bool, device=device)
    if request.mask is not None:
        keep = keep & request.mask.materialize(
            q_len, kv_len, batch=batch, num_heads=num_heads, q_offset=request.q_offset, device=device
        )
    if request.selection is not None:
        chosen = request.selection.to(device).materialize()
        keep = keep & (
            chosen if chosen.shape[1] in (1, num_heads) else chosen.repeat_interleave(num_heads // num_kv_heads, 1)
        )
    if request.bias is None:
        return keep, None
    forbidden = request.bias == -torch.inf
    keep = keep & ~forbidden
    return keep, request.bias.masked_fill(forbidden, 0.0).to(request.q.dtype)
