"""Attention maps pooled into blocks, without the N x M matrix: what gates and predictors of sparse attention are taught with."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from .masks import Mask, as_mask, causal
from .reference import attention_scores, softmax_with_lse
from .select.summaries import split_blocks

_AT_ONCE = 1 << 23  # scores held at a time


@torch.no_grad()
def pooled_attention_map(
    q: Tensor,
    k: Tensor,
    block: int = 64,
    reduce: str = "max",
    *,
    block_q: int | None = None,
    mask: Mask | None = causal,
    scale: float | None = None,
    q_offset: int | None = None,
    per_kv_head: bool = False,
    normalize: bool = False,
) -> Tensor:
    """The softmax weights of attention, pooled over blocks of queries and keys.

    Query blocks are done a few at a time, each with all the keys it needs; memory grows with N, not with N x M. No gradient.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D).
        block: keys a block. block_q: queries a block, default `block`; 1 leaves the queries as they are.
        reduce: "max": the largest weight in the block; "sum": the weight that falls on the key block, averaged over the queries (rows of
            the map sum to 1); "mean": the average weight of a pair.
        mask: who may look at whom; None: everybody. scale: default D ** -0.5. q_offset: position of query row 0, default M - N.
        per_kv_head: take the largest over the query heads of each kv head as well.
        normalize: divide each row of the map by its sum (rows that see nothing stay zero).
    Returns:
        (B, H, ceil(N / block_q), ceil(M / block)), or with `per_kv_head` (B, Hkv, ...); float32 for half types.
    """
    require_tensor("q", q, dims=4, floating=True)
    require_tensor("k", k, dims=4, floating=True)
    require_int("block", block, 1)
    require_name("reduce", reduce, ("max", "sum", "mean"))
    block_q = block if block_q is None else require_int("block_q", block_q, 1)
    batch, num_heads, rows, dim = q.shape
    kv_heads, length = k.shape[1:3]
    require(
        k.shape[0] == batch and k.shape[3] == dim, "k", f"shape {tuple(k.shape)}", f"({batch}, Hkv, M, {dim}) like q"
    )
    if kv_heads == 0 or num_heads % kv_heads:
        raise bad_value("k", f"{kv_heads} kv heads", f"a divisor of q's {num_heads} heads")
    offset = length - rows if q_offset is None else q_offset
    step = max(1, _AT_ONCE // max(1, batch * num_heads * block_q * length)) * block_q
    blocks = -(-length // block)
    found = []
    for start in range(0, rows, step):
        part = q[:, :, start : start + step]
        end = length
        if mask is causal:  # keys after the last row of this part have no weight
            end = min(length, max(1, offset + start + part.shape[2]))
        scores = attention_scores(
            part,
            k[:, :, :end],
            mask=None if mask is None else as_mask(mask),
            q_offset=offset + start,
            scale=dim**-0.5 if scale is None else scale,
        )
        pooled = _pool(softmax_with_lse(scores)[0], block_q, block, reduce, length)
        found.append(torch.nn.functional.pad(pooled, (0, blocks - pooled.shape[-1])))
    if not found:
        found = [q.new_zeros(batch, num_heads, 0, blocks)]
    out = torch.cat(found, dim=2)
    if per_kv_head:
        out = out.unflatten(1, (kv_heads, -1)).amax(2)
    return out / out.sum(-1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny) if normalize else out


def _pool(weights: Tensor, block_q: int, block_k: int, reduce: str, length: int) -> Tensor:
    """weights (B, H, rows, keys): of the first `keys` of `length` keys."""
    rows, keys = weights.shape[-2:]
    by_key = torch.nn.functional.pad(weights, (0, -keys % block_k)).unflatten(-1, (-1, block_k))
    by_key = by_key.amax(-1) if reduce == "max" else by_key.sum(-1)
    by_block = split_blocks(by_key, block_q)
    if reduce == "max":
        return by_block.amax(-2)
    counts = (rows - torch.arange(0, rows, block_q, device=weights.device)).clamp(max=block_q)[:, None]
    if reduce == "mean":
        counts = counts * (length - torch.arange(0, keys, block_k, device=weights.device)).clamp(max=block_k)
    return by_block.sum(-2) / counts
