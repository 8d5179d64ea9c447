"""Dynamic mask attention: every key has a bias of its own, and each query attends to the visible keys with the largest ones.

Shi et al., "Trainable Dynamic Mask Sparse Attention" (2025, arXiv 2508.02124). Code read for numbers: SmallDoges/flash-dmattn @ f024c28
(BSD-3), `benchmarks/forward_equivalence.py`; transformers `models/doge/modeling_doge.py` (Apache-2.0).

What differs: equal biases are told apart by position (the later key wins) where the authors leave it to `torch.topk`; a row with
nothing visible gives zeros and not the mean of all values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from .attention import attention
from .masks import Mask, as_mask, from_function
from .masks import causal as _CAUSAL
from .select.bias_masks import LiveKeys, block_smooth, relu_bias_mask, topk_bias_mask, topk_expiry
from .selection import Selection

SELECTS = ("topk", "relu")


def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    keep: int = 2048,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    select: str = "topk",
    block: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """softmax(scale * q k^T + bias) v over the keys that each query keeps. Queries are the last positions.

    A query keeps the `keep` keys with the largest bias among those it may see. The choice passes no gradient; the bias itself does.
    With a bias per key, the causal choice of all queries is found without an N x M matrix (a key, once outbid, never comes back), and
    blocks in which no key is left are not computed.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        key_bias: (B|1, Hkv, M), or (B|1, Hkv, N|1, M) for one that depends on the query (then with the matrix).
        keep: keys a query and kv head, >= 1; where a query sees fewer it keeps all.
        causal: whether a query sees only keys up to itself. key_mask: bool (B, M), False for keys that do not exist (padding).
        mask: bool, broadcastable to (B, Hkv or H, N, M), what else may be seen (then with the matrix). Heads of a kv head that see
            different keys choose apart.
        select: "topk", or "relu": every key with a bias above 0, whatever `keep`.
        block: smooth the choice over blocks of this many keys: all of a block where more than half of it was chosen, else none.
            Keys after the query count as not chosen, so a query's own block is mostly lost, unless it is the row's last and shorter one:
            a token decoded alone can see more than the same token in a prompt.
        scale: default D ** -0.5. dropout, return_lse, backend: as in `regard.ops.attention`.
    Returns:
        (B, H, N, Dv); with `return_lse`, also (B, H, N).
    """
    _check(q, k, key_bias, mask, key_mask)
    require_name("select", select, SELECTS)
    require_int("keep", keep, 1)
    if block is not None:
        require_int("block", block, 1)
    group = q.shape[1] // k.shape[1]
    length, rows = k.shape[2], q.shape[2]
    offset = length - rows
    per_key = key_bias.dim() == 3 and mask is None
    bias = key_bias[:, :, None] if key_bias.dim() == 3 else key_bias
    chosen: Mask | None
    selection = None
    if rows == 0 or length == 0:
        chosen = None
    elif per_key and rows == 1 and block is None and select == "topk" and keep < length:
        selection, chosen = _for_one(key_bias.detach(), keep, key_mask), None
    elif per_key:
        chosen = _per_key(key_bias.detach(), keep, key_mask, causal, select, block, rows, offset, q.shape[1])
    else:
        chosen = _by_matrix(bias, keep, causal, mask, key_mask, select, block, rows, offset, q.shape[1])
    allowed: Mask | None = chosen
    if causal:
        allowed = _CAUSAL if allowed is None else allowed & _CAUSAL
    if key_mask is not None:
        exists = from_function(lambda b, h, q_idx, kv_idx: key_mask.to(kv_idx.device)[b, kv_idx])
        allowed = exists if allowed is None else allowed & exists
    if mask is not None:
        own = as_mask(mask.repeat_interleave(group, dim=1) if mask.shape[1] == k.shape[1] else mask)
        allowed = own if allowed is None else allowed & own
    return attention(
        q,
        k,
        v,
        mask=allowed,
        bias=bias.repeat_interleave(group, dim=1),
        selection=selection,
        scale=scale,
        dropout=dropout,
        return_lse=return_lse,
        backend=backend,
    )


def _per_key(
    bias: Tensor,
    keep: int,
    key_mask: Tensor | None,
    is_causal: bool,
    select: str,
    block: int | None,
    rows: int,
    offset: int,
    num_heads: int,
) -> Mask | None:
    """The choice as a mask, from biases (B|1, Hkv, M) alone."""
    length = bias.shape[-1]
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None], -torch.inf)
    if not is_causal or select == "relu":  # the same for every query
        kept = topk_bias_mask(bias, keep) if select == "topk" else relu_bias_mask(bias)
        if block is not None and not is_causal:
            kept = block_smooth(kept, block)
        expiry = torch.where(kept, length, 0)
    elif keep >= length:
        if block is None:
            return None
        expiry = torch.where(bias > -torch.inf, length, 0)
    else:
        expiry = torch.where(bias > -torch.inf, topk_expiry(bias, keep), 0)
    if block is None or not is_causal:
        return LiveKeys(expiry, num_heads)
    return _Smoothed(expiry, block, rows, offset, num_heads)


class _Smoothed(Mask):
    """Keys by blocks: all of a block where more than half of its keys are live and not in the future, else none."""

    varies_head = True

    def __init__(self, expiry: Tensor, block: int, rows: int, offset: int, num_heads: int) -> None:
        batch, heads, length = expiry.shape
        count = -(-length // block)
        owner = (torch.arange(length, device=expiry.device) // block).expand_as(expiry)
        change = torch.zeros(batch, heads, count, length + 1, dtype=torch.int32, device=expiry.device)
        begin = torch.arange(length, device=expiry.device).expand_as(expiry)
        end = torch.maximum(expiry, begin).clamp(max=length)  # a key that is never live begins and ends at once
        flat, one = change.flatten(2), torch.ones_like(expiry, dtype=torch.int32)
        flat.scatter_add_(2, owner * (length + 1) + begin, one)
        flat.scatter_add_(2, owner * (length + 1) + end, -one)
        live = change.cumsum(-1)[..., offset : offset + rows]  # keys of the block that are live at each query
        sizes = (length - torch.arange(0, length, block, device=expiry.device)).clamp(max=block)
        self.kept = live * 2 > sizes[:, None]  # (B|1, Hkv, blocks, rows)
        self.block, self.offset, self.group = block, offset, num_heads // heads
        self.varies_batch = batch > 1

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        b = b if self.varies_batch else torch.zeros_like(b)
        row = (q_idx - self.offset).clamp(0, self.kept.shape[3] - 1)
        return self.kept.to(q_idx.device)[b, h // self.group, kv_idx // self.block, row]


def _for_one(bias: Tensor, keep: int, key_mask: Tensor | None) -> Selection:
    """The keys of a single query, which sees them all: later ones first among equals, as in `topk_expiry`."""
    length = bias.shape[-1]
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None], -torch.inf)
    found = bias.topk(keep, dim=-1, sorted=False)
    least = found.values.amin(-1, keepdim=True)
    if bool(((bias == least).sum(-1) > (found.values == least).sum(-1)).any()):  # a tie for the last places
        order = bias.flip(-1).sort(dim=-1, descending=True, stable=True)
        values, indices = order.values[..., :keep], length - 1 - order.indices[..., :keep]
    else:
        values, indices = found
    best = torch.where(values > -torch.inf, indices, -1)
    return Selection(best[:, :, None], block_q=1, block_k=1, q_len=1, kv_len=length)


def _by_matrix(
    bias: Tensor,
    keep: int,
    is_causal: bool,
    mask: Tensor | None,
    key_mask: Tensor | None,
    select: str,
    block: int | None,
    rows: int,
    offset: int,
    num_heads: int,
) -> Mask:
    """The choice by its definition, row by row."""
    length, group = bias.shape[-1], num_heads // bias.shape[1]
    allowed = torch.ones(1, 1, rows, length, dtype=torch.bool, device=bias.device)
    if is_causal:
        allowed = allowed.tril(offset)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    if mask is not None:
        allowed = allowed & mask
        if mask.shape[1] not in (1, bias.shape[1]):  # query heads that see different keys choose apart
            bias = bias.repeat_interleave(group, dim=1)
    kept = topk_bias_mask(bias, keep, allowed, block) if select == "topk" else relu_bias_mask(bias, allowed, block)
    return as_mask(kept if kept.shape[1] == num_heads else kept.repeat_interleave(group, dim=1))


def _check(q: Tensor, k: Tensor, key_bias: Tensor, mask: Tensor | None, key_mask: Tensor | None) -> None:
    require_tensor("q", q, dims=4, floating=True)
    require_tensor("k", k, dims=4, floating=True)
    require_tensor("key_bias", key_bias, floating=True)
    batch, heads, rows, _ = q.shape
    kv_heads, length = k.shape[1:3]
    require(kv_heads > 0 and heads % kv_heads == 0, "k", f"{kv_heads} kv heads", f"a divisor of q's {heads} heads")
    shape = tuple(key_bias.shape)
    plain = len(shape) == 3 and shape[0] in (1, batch) and shape[1:] == (kv_heads, length)
    full = (
        len(shape) == 4
        and shape[0] in (1, batch)
        and shape[1] == kv_heads
        and shape[2] in (1, rows)
        and shape[3] == length
    )
    require(
        plain or full,
        "key_bias",
        f"shape {shape}",
        f"({batch}, {kv_heads}, {length}) or ({batch}, {kv_heads}, {rows}, {length})",
    )
    if key_mask is not None:
        require_tensor("key_mask", key_mask, dims=2)
        require(key_mask.dtype == torch.bool, "key_mask", key_mask.dtype, "bool")
        require(
            tuple(key_mask.shape) == (batch, length),
            "key_mask",
            f"shape {tuple(key_mask.shape)}",
            f"({batch}, {length})",
        )
    if mask is not None:
        require_tensor("mask", mask, dims=4)
        require(mask.dtype == torch.bool, "mask", mask.dtype, "bool")
        fits = all(have in (1, want) for have, want in zip(mask.shape[2:], (rows, length))) and mask.shape[0] in (
            1,
            batch,
        )
        need = f"({batch}, {kv_heads} or {heads}, {rows}, {length}), or 1 for some"
        require(fits and mask.shape[1] in (1, kv_heads, heads), "mask", f"shape {tuple(mask.shape)}", need)
