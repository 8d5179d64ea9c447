"""Recycled attention over a whole sequence at once, as it is trained: chunks of queries share what their first one reads most.

Xu, Goyal, Choi 2024, arXiv 2411.05787 (no code could be had; continued pre-training with the pattern of decoding is the paper's, the
form for a whole sequence ours). Decoding itself is `regard.RecycledAttention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from . import masks
from .attention import attention
from .reference import accumulation_dtype
from .selection import Selection

_BLOCK_ELEMENTS = 1 << 22  # scores of first queries held at once


def recycled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int,
    stride: int,
    group: str = "max",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention in which every `stride`-th query reads everything before it and the others what that one read most.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv), of one length.
        budget: keys that a chunk shares, for each kv head: those with the highest weight in the row of its first query. stride: length
            of a chunk. A query after the first of its chunk reads the shared keys and the tokens after that first one, itself included.
        group: how the rows of the query heads of one kv head are joined: "max", "mean" or "sum".
        scale: factor on q k^T, default D ** -0.5. backend: for `attention`.

    Returns:
        (B, H, N, Dv). Differentiable in q, k and v; which keys are chosen is not. stride=1 or budget >= N is causal attention.

    Raises:
        ValueError, TypeError: shapes that do not fit, `budget` or `stride` below 1.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
    length = q.shape[2]
    require(k.shape[2] == length, "k", f"{k.shape[2]} keys", f"as many as queries, {length}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise bad_value("k", f"{k.shape[1]} kv heads", f"a divisor of q's {q.shape[1]} heads")
    require_int("budget", budget, 1)
    require_int("stride", stride, 1)
    require_name("group", group, ("max", "mean", "sum"))
    if stride == 1 or budget >= length:
        return attention(q, k, v, mask=masks.causal, scale=scale, backend=backend)
    first = torch.arange(0, length, stride, device=q.device)
    shared = _most_read(q.detach(), k.detach(), first, budget, group, q.shape[-1] ** -0.5 if scale is None else scale)
    own = first[:, None] + torch.arange(1, stride, device=q.device)
    own = own.masked_fill(own >= length, -1).expand(*shared.shape[:2], -1, -1)
    chosen = Selection(torch.cat([shared, own], -1), block_q=stride, block_k=1, q_len=length, kv_len=length)
    out = attention(q, k, v, selection=chosen, mask=masks.causal, scale=scale, backend=backend)
    before = masks.from_function(lambda b, h, i, j: j <= first[i])
    full = attention(q[:, :, first], k, v, mask=before, q_offset=0, scale=scale, backend=backend)
    return out.index_copy(2, first, full)


@torch.no_grad()
def _most_read(q: Tensor, k: Tensor, first: Tensor, budget: int, group: str, scale: float) -> Tensor:
    """The `budget` keys that each query of `first` reads most, (B, Hkv, chunks, budget), -1 where there are fewer."""
    batch, heads, length, dim = q.shape
    dtype, kv_heads = accumulation_dtype(q.dtype), k.shape[1]
    keys, found = k.to(dtype).transpose(-1, -2), []
    position = torch.arange(length, device=q.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * length))
    for rows in first.split(step):
        grouped = q[:, :, rows].to(dtype).reshape(batch, kv_heads, -1, dim) * scale
        scores = (grouped @ keys).unflatten(2, (-1, len(rows)))
        weights = torch.softmax(scores.masked_fill(position > rows[:, None], -torch.inf), -1)
        joined = weights.amax(2) if group == "max" else weights.sum(2)  # a mean chooses as a sum does
        joined = joined.masked_fill(position > rows[:, None], -1.0)
        top = joined.topk(budget, dim=-1)
        found.append(top.indices.masked_fill(top.values < 0, -1))
    return torch.cat(found, 2)
