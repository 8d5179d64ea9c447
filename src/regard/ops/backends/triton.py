"""Block-sparse softmax attention in Triton: reads a `BlockPlan`, skips every block that is not in it, forward and backward.

One program a query block (forward, dq) or key block (dk, dv): no atomics, so results do not depend on scheduling. The kernels live in
`triton_kernels.py`; on a machine without a GPU they run in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plan import BlockPlan, kept_plan

if TYPE_CHECKING:
    from ..attention import AttentionRequest

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuses(request: AttentionRequest) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not request.q.is_cuda and not _interpreted():
        return "triton needs a CUDA GPU (or TRITON_INTERPRET=1 to run its interpreter on the CPU)"
    if request.q.dtype not in _DTYPES:
        return f"its kernels take float32, float16 or bfloat16, not {request.q.dtype}"
    if request.score_mod is not None:
        return "its kernels have no score_mod"
    if request.bias is not None:
        return "its kernels have no bias"
    if request.dropout > 0.0:
        return "its kernels have no dropout"
    if max(request.q.shape[3], request.v.shape[3]) > 256:
        return f"head_dim {max(request.q.shape[3], request.v.shape[3])} is beyond its 256"
    if request.q.numel() == 0 or request.k.numel() == 0 or request.v.numel() == 0:
        return "its kernels are not defined on empty tensors"
    selection = request.selection
    if selection is not None:
        for name in ("block_q", "block_k"):
            size = getattr(selection, name)
            if size & (size - 1) or not 16 <= size <= 128:
                return f"selection {name}={size} is not a power of two between 16 and 128"
    return None


def suits(request: AttentionRequest) -> bool:
    return True


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    plan = kept_plan(
        request.mask,
        request.selection,
        batch=request.q.shape[0],
        num_heads=request.q.shape[1],
        num_kv_heads=request.k.shape[1],
        q_len=request.q.shape[2],
        kv_len=request.k.shape[2],
        q_offset=request.q_offset,
        block_q=64,
        block_k=64,
        device=request.q.device,
    )
    return attention_over_plan(request.q, request.k, request.v, plan, request.scale)


def attention_over_plan(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over exactly the blocks of `plan`: (out (B, H, N, Dv) in q's dtype, lse (B, H, N) float32). Differentiable."""
    return _Attention.apply(q, k, v, plan, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
        from . import triton_kernels as kernels

        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        kernels.launch_forward(q, k, v, out, lse, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        from . import triton_kernels as kernels

        grad_out, grad_lse = grads
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        # d lse / d s = p, so a gradient on lse enters exactly where rowsum(dO * O) leaves.
        delta = (grad_out.float() * out.float()).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse.float().masked_fill(lse == -torch.inf, 0.0)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernels.launch_backward(q, k, v, grad_out, lse, delta, dq, dk, dv, ctx.plan, ctx.scale)
        return dq, dk, dv, None, None
