"""Attention inside groups of tokens: gather the members of each group, attend there, put the results back.

A group is a row of token numbers, `index (B, H, G, w)`: head h of sample b has G groups of w members, -1 where a place is empty. Groups
may overlap and need not cover everything (k-means clusters), or cut the tokens into pieces (blocks of an order, as LSH makes them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_name, require_tensor
from .attention import attention
from .masks import Mask
from .reference import accumulation_dtype

REDUCTIONS = ("sum", "mean")


def gather_groups(x: Tensor, index: Tensor) -> Tensor:
    """The members of each group: x (B, Hx, N, D), index (B, H, G, w) -> (B, H, G, w, D); zeros where a place is empty.

    Args:
        x: tokens; H is a multiple of Hx, and a head's groups read x's head h // (H // Hx).
        index: int64 token numbers below N, or -1.
    """
    batch, num_heads, groups, width = _check_index(index)
    require_tensor("x", x, dims=4)
    heads = x.shape[1]
    fits = heads > 0 and num_heads % heads == 0
    require(fits, "x", f"{heads} heads", f"a divisor of index's {num_heads} heads")
    require(x.shape[0] == batch, "x", f"batch {x.shape[0]}", f"index's batch {batch}")
    if x.shape[2] == 0:
        return x.new_zeros(batch, num_heads, groups, width, x.shape[3])
    rows = select_rows(x, index.reshape(batch, heads, -1).clamp(min=0)).reshape(*index.shape, x.shape[3])
    empty = index < 0
    return rows.masked_fill(empty[..., None], 0.0) if bool(empty.any()) else rows


def select_rows(x: Tensor, number: Tensor) -> Tensor:
    """Rows `number` (B, H, S) of x (B, H, N, D): (B, H, S, D). What `gather` does, by copying whole rows."""
    batch, heads, length, dim = x.shape
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    return x.reshape(-1, dim).index_select(0, (number + start).flatten()).view(*number.shape, dim)


def scatter_groups(out: Tensor, index: Tensor, length: int, *, reduce: str = "mean", eps: float = 0.0) -> Tensor:
    """Put results of groups back: out (B, H, G, w, D), index (B, H, G, w) -> (B, H, length, D).

    Args:
        length: tokens N of the result. A token that is in no group gets zeros.
        reduce: what a token in several groups gets, the "sum" or the "mean" of its results.
        eps: added to the number of groups that the mean divides by.
    """
    batch, num_heads, groups, width = _check_index(index)
    require_tensor("out", out, dims=5)
    require(out.shape[:4] == index.shape, "out", f"shape {tuple(out.shape)}", f"{tuple(index.shape)} + (D,) as index")
    require_name("reduce", reduce, REDUCTIONS)
    # one place more for what belongs nowhere
    place = torch.where(index < 0, length, index).reshape(batch, num_heads, groups * width, 1)
    total = out.new_zeros(batch, num_heads, length + 1, out.shape[-1])
    total = total.scatter_add(2, place.expand(-1, -1, -1, out.shape[-1]), out.flatten(2, 3))[:, :, :length]
    if reduce == "sum":
        return total
    return total / _times(place, length, out.dtype).add(eps).clamp(min=eps or 1.0)


def memberships(index: Tensor, length: int) -> Tensor:
    """How many groups each token is in: index (B, H, G, w) -> int64 (B, H, length)."""
    batch, num_heads, groups, width = _check_index(index)
    place = torch.where(index < 0, length, index).reshape(batch, num_heads, groups * width, 1)
    return _times(place, length, torch.long)[..., 0]


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Softmax attention of each group's queries over the group's keys.

    Args:
        q: (B, H, G, n, D). k: (B, Hkv, G, m, D). v: (B, Hkv, G, m, Dv); H is a multiple of Hkv.
        mask: bool, broadcastable to (B, H, G, n, m), True where a query may look; or a `regard.masks` mask that does not tell heads
            apart, on places inside the group.
        bias: added to the scores, broadcastable to (B, H, G, n, m).
        scale, options: as in `regard.ops.attention` (`dropout`, `return_lse`, `backend`).
    Returns:
        (B, H, G, n, Dv); with `return_lse`, also the log-sum-exps (B, H, G, n). A query that may see nothing gives zeros and -inf.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=5, floating=True)
        require(x.shape[2] == q.shape[2], name, f"{x.shape[2]} groups", f"q's {q.shape[2]} groups")
    num_heads, groups, rows = q.shape[1:4]
    kv_heads, kv_len = k.shape[1], k.shape[3]
    require(kv_heads > 0 and num_heads % kv_heads == 0, "k", f"{kv_heads} heads", f"a divisor of q's {num_heads} heads")
    if q.numel() == 0 or groups == 0:
        out = q.new_zeros(*q.shape[:4], v.shape[-1])
        lse = out.new_full(out.shape[:-1], -torch.inf, dtype=accumulation_dtype(q.dtype))
        return (out, lse) if options.get("return_lse") else out
    shared = num_heads // kv_heads

    def fold(x: Tensor) -> Tensor:
        """(B, H, G, ...) with a head and group axis of 1 or whole -> (B, Hkv * G * shared or 1, ...)."""
        x = x[(None,) * (5 - x.dim())]
        if x.shape[1] == x.shape[2] == 1:
            return x[:, :, 0]
        x = x.expand(-1, num_heads, groups, -1, -1).unflatten(1, (kv_heads, shared))
        return x.transpose(2, 3).flatten(1, 3)

    if isinstance(mask, Tensor):  # as a bias: backends need not plan around a matrix that is there already
        hidden = torch.zeros(mask.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        hidden = hidden.masked_fill_(~mask, -torch.inf)
        mask, bias = None, hidden if bias is None else bias + hidden
    found = attention(
        fold(q),
        k.flatten(1, 2),
        v.flatten(1, 2),
        mask=mask,
        bias=None if bias is None else fold(bias),
        scale=scale,
        q_offset=kv_len - rows,
        **options,
    )

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, groups, shared)).transpose(2, 3).flatten(1, 2)

    return tuple(map(unfold, found)) if options.get("return_lse") else unfold(found)


def _check_index(index: Tensor) -> torch.Size:
    require_tensor("index", index, dims=4)
    require(not index.is_floating_point() and index.dtype != torch.bool, "index", index.dtype, "integers")
    return index.shape


def _times(place: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """How often each of `length` tokens is named in place (B, H, S, 1): (B, H, length, 1)."""
    count = torch.zeros(*place.shape[:2], length + 1, 1, dtype=dtype, device=place.device)
    return count.scatter_add_(2, place, torch.ones_like(place, dtype=dtype))[:, :, :length]
