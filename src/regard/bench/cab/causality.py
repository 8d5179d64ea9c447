"""The causality test of CAB: does the output on a prefix equal the prefix of the output?

CAB (Zhang et al. 2023, arXiv 2210.07661); code read for numbers: Shark-NLP/CAB @ 0e49696, `scripts/attention_pattern/`, whose rule (sum of
absolute differences of a token's output at most 1e-4, every length of the second half) is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require_int, require_name

__all__ = ["causal_ops", "causality_test", "leaks"]

Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def leaks(
    op: Op | nn.Module,
    pattern: str = "CS",
    *,
    length: int = 48,
    context: int = 64,
    batch: int = 1,
    num_heads: int = 2,
    head_dim: int = 16,
    seed: int = 0,
) -> float:
    """Largest sum of absolute differences, over prefixes of `length`, between a token's output in the prefix and in the whole.

    op: a function (q, k, v) -> out on (batch, num_heads, N, head_dim), or a layer (x) or (x, context) -> out on (B, N, dim), with dim
        its attribute; a layer is put into eval mode for the test.
    pattern: "CS" cuts queries, keys and values together; "CC" cuts the queries and keeps `context` keys.
    """
    require_name("pattern", pattern, ("CS", "CC"))
    require_int("length", length, 2)
    if not callable(op):
        raise bad_type("op", op, "a function (q, k, v) -> out, or a layer")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(op, nn.Module):
        dim = getattr(op, "dim", num_heads * head_dim)
        x, other = (
            torch.randn(batch, length, dim, generator=generator),
            torch.randn(batch, context, dim, generator=generator),
        )

        def run(size: int) -> Tensor:
            return op(x[:, :size], other) if pattern == "CC" else op(x[:, :size])
    else:
        q, k, v = torch.randn(3, batch, num_heads, max(length, context), head_dim, generator=generator)

        def run(size: int) -> Tensor:
            keys = context if pattern == "CC" else size
            out = op(q[:, :, :size], k[:, :, :keys], v[:, :, :keys])
            return out.transpose(1, 2).flatten(2)

    layer = op if isinstance(op, nn.Module) else nn.Module()
    training = layer.training
    layer.eval()
    with torch.no_grad():
        whole = run(length)
        sizes = range(length // 2 + 1, length + 1)
        found = [float((run(size)[:, -1] - whole[:, size - 1]).abs().sum()) for size in sizes]
    layer.train(training)
    return max(found)


def causality_test(op: Op | nn.Module, tol: float = 1e-4, pattern: str = "CS", **options: Any) -> bool:
    """Whether `op` may be used causally: `leaks(op, pattern, **options) <= tol`."""
    return leaks(op, pattern, **options) <= tol


def causal_ops() -> dict[str, Op]:
    """Our own ops in causal use, (q, k, v) -> out, by a name for the table; those said not to be causal stand among them on purpose."""
    from ... import ops
    from ...ops import masks, select, state

    def random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = state.orthogonal_projection(16, q.shape[-1], generator=torch.Generator().manual_seed(0))
        return ops.linear_attention(
            state.softmax_features(q, w, query=True), state.softmax_features(k, w, query=False), v, normalize=True
        )

    def even_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        edges = select.even_boundaries(k.shape[2], 4)[None]
        return select.chunk_topk_attention(q, k, v, edges, budget=16, block_q=8, local=4, sink=2, instruction=0)

    def neighbourhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ops.neighborhood_attention(q, k, v, kernel_size=7, is_causal=True).transpose(1, 2)

    def hyper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return ops.hyper_attention(q, k, v, causal=True, block_size=8, samples=8, min_len=16, generator=draw)

    windowed = masks.sliding_window(8) & masks.causal
    return {
        "attention, causal": partial(ops.attention, mask=masks.causal),
        "attention, no mask": ops.attention,
        "attention, window": partial(ops.attention, mask=windowed),
        "attention, sinks and window": partial(
            ops.attention, mask=(masks.sliding_window(8) | masks.sink(2)) & masks.causal
        ),
        "flash attention, causal": partial(ops.flash_attention, causal=True),
        "tiled attention, causal": partial(ops.tiled_attention, mask=masks.causal, block_q=8, block_k=8),
        "neighbourhood, causal": neighbourhood,
        "linear attention": partial(ops.linear_attention, feature_map="elu+1", normalize=True),
        "linear attention, not causal": partial(
            ops.linear_attention, feature_map="elu+1", normalize=True, causal=False
        ),
        "random features, keys scaled by their maximum": random_features,
        "lightning attention": ops.lightning_attention,
        "block top-k, one query a block": partial(select.block_topk_attention, block_q=1, block_k=8, topk=3),
        "block top-k, 8 queries a block": partial(select.block_topk_attention, block_q=8, block_k=8, topk=3),
        "hierarchical top-k (HiP)": partial(select.hierarchical_topk_attention, budget=16, block_q=8, window=8),
        "chunk top-k (DHSA), even chunks": even_chunks,
        "HyperAttention, causal": hyper,
        "shifted groups (S2-Attn)": partial(ops.shifted_group_attention, group=8),
    }
