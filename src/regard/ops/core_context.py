"""Core-context attention, Chen et al., "Core Context Aware Attention for Long Context Language Modeling" (2024, ICML 2025,
arXiv 2412.12465). No code is published (chenyaofo/CCA-Attention @ fc8b96c holds the project page only); this follows the text.

Every complete group of `group` tokens is pooled into one core token; a query sees the core tokens of groups that lie before its window,
and the tokens after them one by one, under one softmax.

Open in the paper, chosen here: pooling weights are averaged over the heads of a layer (`per_head` for weights of their own); a core key
stands at the position of its group's last token; the local part begins where the last visible core's group ends, so that every token is
seen exactly once. The paper pools hidden states and then projects; pooling keys and values with the same weights is the same for a linear
projection, and is what happens here (not the same where keys are normalised after it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from . import masks, scores
from .groups import gather_groups
from .joint import KeySet, joint_attention
from .reference import accumulation_dtype

POOLS = ("cca", "mean", "max")
Rotate = Callable[[Tensor, Tensor], Tensor]


def core_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int = 16,
    window: int = 1024,
    pool: str = "cca",
    per_head: bool = False,
    rotate: Rotate | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    return_cores: bool = False,
    backend: str = "auto",
) -> Any:
    """Causal attention in which groups of `group` tokens older than `window` are seen as one pooled token each.

    Query p (counted from its row's first token) sees n = max(0, (p + 1 - window) // group) core tokens and the tokens from n * group
    on, itself included. Cost and memory: N * (N / group + window + group) pairs instead of N^2.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv). H is a multiple of Hkv.
        group: tokens a group, at least 1. window: tokens that are always seen one by one, at least 1.
        pool: weights of the tokens of a group: "cca", softmax of the last token's query over the group's keys; "mean"; or "max",
            no weights but the largest of each channel.
        per_head: for "cca": weights of each kv head's own (averaged over its query heads) instead of the layer's.
        rotate: moves rotated keys (B, Hkv, n, D) forward by (B, n) positions, where k has rotary positions: the keys of a group are moved
            to its last token before they are pooled. None: pooled as they are.
        start: int64 (B,), left padding of each row; these tokens are in no group and nobody sees them.
        scale, dropout, backend: as in `regard.ops.attention`. soft_cap: scores become cap * tanh(scores / cap), also in the pooling.
        return_lse: also the log-sum-exps (B, H, N). return_cores: also the core keys and values (B, Hkv, N // group, D).

    Returns:
        (B, H, N, Dv), then what was asked for. Padding rows give zeros.

    Raises:
        ValueError, TypeError: shapes or options that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=4, floating=True)
    batch, length = q.shape[0], q.shape[2]
    require(k.shape[2] == length, "k", f"length {k.shape[2]}", f"q's length {length}")
    check_sizes(group, window, pool)
    if start is not None:
        require_tensor("start", start, dims=1)
        require(start.shape[0] == batch, "start", f"shape {tuple(start.shape)}", f"({batch},)")
        start = start.to(q.device).long()
        start = start if bool(start.any()) else None
    index = group_tokens(start, 0, length // group, group, batch=batch, device=q.device)
    cores = pool_groups(
        q, k, v, index, pool=pool, per_head=per_head, rotate=rotate, scale=scale, soft_cap=soft_cap, length=length
    )
    core_mask, local_mask = visible(start, 0, length, 0, group, window, device=q.device)
    found = joint_attention(
        q,
        [KeySet(*cores, core_mask), KeySet(k, v, local_mask)],
        scale=scale,
        score_mod=None if soft_cap is None else scores.soft_cap(soft_cap),
        dropout=dropout,
        backend=backend,
        return_lse=return_lse,
    )
    if not return_cores:
        return found
    return (*found, *cores) if return_lse else (found, *cores)


def check_sizes(group: int, window: int, pool: str) -> None:
    """Raise unless these are a group, a window and a way to pool."""
    require_int("group", group, 1)
    require_int("window", window, 1)
    require_name("pool", pool, POOLS)


def visible_cores(position: Tensor, group: int, window: int) -> Tensor:
    """How many core tokens a query at `position` (counted from its row's first token; may be negative) sees."""
    return ((position + 1 - window).clamp(min=0)) // group


def group_tokens(
    start: Tensor | None, first: int, count: int, group: int, *, batch: int, device: torch.device
) -> Tensor:
    """Token numbers of groups first .. first + count of each row, int64 (B or 1, count, group)."""
    number = (first + torch.arange(count, device=device))[:, None] * group + torch.arange(group, device=device)
    return number[None] if start is None else number + start[:, None, None]


def pool_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    length: int,
    q_first: int = 0,
    pool: str = "cca",
    per_head: bool = False,
    rotate: Rotate | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Core keys and values (B, Hkv, m, D) of m groups.

    Args:
        q: (B, H, N, D), of which the last token of each group is used ("cca" alone). k, v: (B, Hkv, N, D).
        index: rows of k (B|1, m, group); groups that reach to `length` or beyond are not complete and give zeros.
        q_first: row of k that row 0 of q belongs to.
        other arguments: as in `core_context_attention`.
    """
    batch, num_heads, _, dim = q.shape
    kv_heads, dtype = k.shape[1], accumulation_dtype(k.dtype)
    groups, size = index.shape[1:]
    if groups == 0:
        return k[:, :, :0], v[:, :, :0]
    complete = (index[..., -1:] < length) & (index[..., :1] >= 0)
    index = torch.where(complete, index, -1)
    own_k, own_v = (gather_groups(x, index[:, None].expand(batch, kv_heads, -1, -1)).to(dtype) for x in (k, v))
    weights = None
    if pool == "cca":
        row = torch.where(complete, index[..., -1:] - q_first, -1)
        last = gather_groups(q, row[:, None].expand(batch, num_heads, -1, -1)).to(dtype)
        grouped = last.unflatten(1, (kv_heads, num_heads // kv_heads))
        found = torch.einsum("bkhmqd,bkmgd->bkhmg", grouped, own_k) * (dim**-0.5 if scale is None else scale)
        if soft_cap is not None:
            found = soft_cap * torch.tanh(found / soft_cap)
        weights = found.softmax(-1).mean(2)  # over the query heads of each kv head
        weights = weights if per_head else weights.mean(1, keepdim=True)
    if rotate is not None:
        ahead = torch.arange(size - 1, -1, -1, device=k.device).repeat(groups).expand(batch, -1)
        own_k = rotate(own_k.flatten(2, 3), ahead).unflatten(2, (groups, size)).to(dtype)
    core_k, core_v = (_pooled(x, weights, pool).to(like.dtype) for x, like in ((own_k, k), (own_v, v)))
    return core_k, core_v


def _pooled(x: Tensor, weights: Tensor | None, pool: str) -> Tensor:
    if weights is not None:
        return (x * weights[..., None]).sum(3)
    return x.mean(3) if pool == "mean" else x.amax(3)


def visible(
    start: Tensor | None, before: int, count: int, first_key: int, group: int, window: int, *, device: torch.device
) -> tuple[masks.Mask, masks.Mask]:
    """What `count` queries from token `before` on see, as masks over rows: of the core tokens, and of tokens from `first_key` on."""
    if start is None:
        return _visible_alike(before, count, first_key, group, window, str(device))
    return _visible(start[:, None], before, count, first_key, group, window, device)


@lru_cache(maxsize=16)  # all layers of a forward share one, and the plan that backends keep with it
def _visible_alike(
    before: int, count: int, first_key: int, group: int, window: int, device: str
) -> tuple[masks.Mask, masks.Mask]:
    where = torch.device(device)
    return _visible(torch.zeros((), dtype=torch.long, device=where), before, count, first_key, group, window, where)


def _visible(
    start: Tensor, before: int, count: int, first_key: int, group: int, window: int, device: torch.device
) -> tuple[masks.Mask, masks.Mask]:
    token = torch.arange(before, before + max(count, 1), device=device)
    cores = visible_cores(token - start, group, window)
    first = start + cores * group - first_key
    # a padding row sees nothing: its own token comes before `start`
    return masks.intervals(torch.zeros_like(cores), cores - 1), masks.intervals(
        first, (token - first_key).expand_as(first)
    )
