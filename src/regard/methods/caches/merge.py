"""Merging what is dropped from a cache into what stays: each dropped entry goes to the kept one whose key is most like its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_name, require_tensor
from ...ops.reference import accumulation_dtype

_BLOCK_ELEMENTS = 1 << 23  # similarities held at once

MERGES = ("pivot", "average", "weighted", "none")


def scatter_merge(
    kept_k: Tensor,
    kept_v: Tensor,
    dropped_k: Tensor,
    dropped_v: Tensor,
    merge: str = "pivot",
    variant: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Kept keys and values with the dropped ones merged in (LOOK-M, arXiv 2406.18139; code SUSTechBruce/LOOK-M).

    Args:
        kept_k: (..., H, K, D). kept_v: (..., H, K, Dv). dropped_k: (..., H, P, D). dropped_v: (..., H, P, Dv).
        merge: every kept entry becomes the mean of itself and of what goes to it (by the cosine of the keys, for keys and values alike):
            "average": the dropped entries themselves; "pivot": (dropped + kept) / 2 each; "weighted": dropped times its cosine; "none".
        variant: "paper": all dropped entries take part. "released": with "weighted", only those whose greatest cosine, averaged over the
            heads, is at least the mean of all; with "average", the same choice but of the targets alone, so that the i-th target
            chosen receives the i-th dropped entry (a slip in the release). "pivot" is the same in both.

    Returns:
        keys (..., H, K, D) and values (..., H, K, Dv), in the dtypes given; half types are computed in float32.
    """
    require_name("merge", merge, MERGES)
    require_name("variant", variant, ("released", "paper"))
    for name, tensor in (("kept_k", kept_k), ("kept_v", kept_v), ("dropped_k", dropped_k), ("dropped_v", dropped_v)):
        require(
            require_tensor(name, tensor, floating=True).dim() >= 3,
            name,
            f"shape {tuple(tensor.shape)}",
            "(..., H, n, D)",
        )
    kept, dropped = kept_k.shape[-2], dropped_k.shape[-2]
    if merge == "none" or kept == 0 or dropped == 0:
        return kept_k, kept_v
    cosine, target = _nearest(kept_k, dropped_k)
    share = None
    if variant == "released" and merge != "pivot":
        typical = cosine.mean((-2, -1), keepdim=True)
        share = (cosine.mean(-2, keepdim=True) >= typical).expand_as(cosine)
    if share is not None and merge == "average":
        # the chosen targets, moved to the front, meet the dropped entries in their own order
        order = share.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        target = target.gather(-1, order)
        share = torch.arange(dropped, device=target.device) < share.sum(-1, keepdim=True)
    return (
        _merged(kept_k, dropped_k, target, cosine, merge, share),
        _merged(kept_v, dropped_v, target, cosine, merge, share),
    )


def _nearest(kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest cosine of each dropped key with a kept one and which that is, (..., H, P) both, without all P x K at once."""
    kept, dropped = (_unit(x.to(accumulation_dtype(x.dtype))) for x in (kept, dropped))
    rows = max(1, kept[..., 0].numel())
    step = max(1, _BLOCK_ELEMENTS // rows)
    best = [(part @ kept.transpose(-1, -2)).max(-1) for part in dropped.split(step, dim=-2)]
    return torch.cat([b.values for b in best], -1), torch.cat([b.indices for b in best], -1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _merged(kept: Tensor, dropped: Tensor, target: Tensor, cosine: Tensor, merge: str, share: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(kept.dtype)
    total, given = kept.to(dtype), dropped.to(dtype)
    index = target[..., None].expand_as(given)
    if merge == "pivot":
        given = (given + total.gather(-2, index)) / 2
    elif merge == "weighted":
        given = given * cosine[..., None]
    ones = torch.ones_like(cosine) if share is None else share.to(dtype)
    if share is not None:
        given = given * ones[..., None]
    count = torch.ones(kept.shape[:-1], dtype=dtype, device=kept.device).scatter_add(-1, target, ones)
    return (total.scatter_add(-2, index, given) / count[..., None]).to(kept.dtype)
