"""Stretching a map of few bins over the keys that a query sees, and choosing bins with heads competing for them.

SEA, Lee et al., "SEA: Sparse Linear Attention with Estimated Attention Mask" (ICLR 2024, arXiv 2310.01777). Code read for numbers (no
licence): gmlwns2000/sea-attention @ 5609413, `perlin_attention/ops/kernels/resize_m_to_t.py`, `perlin_attention/attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from .selection import Selection

COMPETITIONS = ("causal_batch", "query", "head", "batch")
_AT_ONCE = 1 << 20


def key_bins(visible: Tensor, bins: int, jitter: Tensor | None = None) -> Tensor:
    """The bin that each key reads, of `bins` stretched evenly over the keys that a row sees.

    Args:
        visible: bool (..., M). jitter: added to a key's number among the visible ones, broadcastable.
    Returns:
        int64 (..., M): floor((c - 0.5) / n * bins - 1e-4), c the key's number (from 1) among the n visible ones, at least 0; `bins`
        where the key is not visible.
    """
    require_tensor("visible", visible)
    require(visible.dtype == torch.bool, "visible", visible.dtype, "bool")
    require_int("bins", bins, 1)
    number = visible.float().cumsum(-1)
    count = number[..., -1:] if visible.shape[-1] else number.sum(-1, keepdim=True)
    if jitter is not None:
        number = torch.minimum((number + jitter).clamp(min=1), count)
    # in this order and in float32, as the authors have it: where a bin ends is a matter of rounding
    found = torch.floor(((number - 1) + 0.5) / count * bins - 1e-4)
    return torch.where(visible & (count > 0), found, float(bins)).clamp(0, bins).long()


def stretch(x: Tensor, visible: Tensor, fill: float, jitter: Tensor | None = None) -> Tensor:
    """x (B, H, N, K) over bins as (B, H, N, M) over keys: each visible key reads its bin, the others are `fill`.

    visible: bool (B|1, 1, N|1, M). See `key_bins`.
    """
    require_tensor("x", x, dims=4)
    require_tensor("visible", visible, dims=4)
    at = key_bins(visible, x.shape[-1], jitter).expand(*x.shape[:3], visible.shape[-1])
    return torch.nn.functional.pad(x, (0, 1), value=fill).gather(-1, at)


def stretch_mask(kept: Tensor, visible: Tensor, oversample: float = 1.0, k: int = 7) -> Tensor:
    """Kept bins, bool (B, H, N, K), as kept keys, bool (B, H, N, M).

    oversample: with bins chosen `oversample` times too many, the keys are thinned again evenly, so that about `k` a query stay.
    """
    out = stretch(kept.to(torch.uint8), visible, 0).bool()
    if oversample == 1.0:
        return out
    length = visible.float().sum(-1, keepdim=True)
    places = (length / oversample).round().clamp(min=1)
    rate = length.clamp(k, round(k * oversample)) / k
    at = (torch.arange(visible.shape[-1], device=visible.device) + 1) / length * places
    return out & ((at - at.round()).abs() <= 0.5 / rate + 1e-4)


def compete_for_bins(
    probs: Tensor,
    lengths: Tensor,
    k: int = 7,
    competition: str = "causal_batch",
    rows: Tensor | None = None,
    oversample: float = 1.0,
) -> Tensor:
    """The bins to look at: about `k` keys' worth a head and query, given to those who estimate the most.

    Args:
        probs: (B, H, N, K), estimated weights. lengths: keys that a query sees, (B, 1) or (B, N).
        k: keys a head and query on average.
        competition: who shares a budget: "causal_batch", the heads of a query: round(H k K / length) bins; "query", nobody (each head
            and query has round(k K / length)); "head", the queries of a head; "batch", all of a sequence. The last two see the
            future. At least 1 bin each.
        rows: bool (B, N), queries that exist; the others keep nothing.
        oversample: factor on the number of bins.
    Returns:
        bool (B, H, N, K).
    """
    require_tensor("probs", probs, dims=4, floating=True)
    require_name("competition", competition, COMPETITIONS)
    batch, heads, length, bins = probs.shape
    per_query = (
        require_int("k", k, 1) * oversample * bins
    ) / lengths.float()  # (B, 1 | N), float32 as in the authors' code
    if competition == "causal_batch":
        pool, budget = probs.transpose(1, 2).reshape(batch, length, heads * bins), (heads * per_query)[..., None]
    elif competition == "query":
        pool, budget = probs, per_query[:, None, :, None]
    else:
        require(lengths.shape[1] == 1, "lengths", f"shape {tuple(lengths.shape)}", f"(B, 1) with {competition!r}")
        if competition == "head":
            pool, budget = probs.reshape(batch, heads, -1), (lengths * per_query)[:, :, None]
        else:
            pool, budget = probs.reshape(batch, -1), lengths * heads * per_query
    budget = budget.round().clamp(min=1)
    most = min(int(budget.max().ceil()) if budget.numel() else 0, pool.shape[-1])
    order = pool.topk(most, dim=-1).indices
    place = torch.full(pool.shape, pool.shape[-1], dtype=torch.long, device=probs.device)
    place.scatter_(-1, order, torch.arange(most, device=probs.device).expand(order.shape))
    kept = place < budget
    if competition == "causal_batch":
        kept = kept.view(batch, length, heads, bins).transpose(1, 2)
    kept = kept.reshape(probs.shape)
    return kept if rows is None or competition in ("head", "batch") else kept & rows[:, None, :, None]


def stretched_selection(
    kept: Tensor, *, causal: bool, keys: Tensor | None = None, oversample: float = 1.0, k: int = 7
) -> Selection:
    """Kept bins as a `Selection` of single keys, without the N x N matrix (some rows at a time).

    Args:
        kept: bool (B, H, N, K). causal: whether row t sees keys 0 .. t, else all `keys`, bool (B, N), default all N.
    """
    batch, heads, length, _ = kept.shape
    step = max(1, _AT_ONCE // max(1, batch * heads * length))
    lists, number = [], torch.arange(length, device=kept.device)
    for start in range(0, length, step):
        part = kept[:, :, start : start + step]
        if causal:
            visible = (number <= number[start : start + step, None])[None, None]
        else:
            visible = torch.ones(1, length, dtype=torch.bool, device=kept.device) if keys is None else keys
            visible = visible[:, None, None]
        lists.append(_as_lists(stretch_mask(part, visible, oversample, k)))
    width = max((x.shape[-1] for x in lists), default=0)
    lists = [torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in lists]
    indices = torch.cat(lists, dim=2) if lists else kept.new_full((batch, heads, 0, 0), -1, dtype=torch.long)
    return Selection(indices, block_q=1, block_k=1, q_len=length, kv_len=length)


def _as_lists(map_: Tensor) -> Tensor:
    """The places of the True entries of each row: bool (..., M) -> int64 (..., most of them in a row), -1 at the end."""
    flat = map_.reshape(-1, map_.shape[-1])
    counts = flat.sum(-1)
    row, key = flat.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=map_.device) - (counts.cumsum(0) - counts)[row]
    out = torch.full((len(flat), int(counts.max()) if len(flat) else 0), -1, dtype=torch.long, device=map_.device)
    out[row, place] = key
    return out.reshape(*map_.shape[:-1], -1)
