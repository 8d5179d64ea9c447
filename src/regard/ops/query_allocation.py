"""How many query heads each key/value head serves, from statistics of the keys.

Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention (Khan et al., 2024, arXiv 2408.08454). Code read for numbers:
zohaib-khan5040/key-driven-gqa @ 8fee9d6 (MIT), `modules/attention/{kdgqa,dgqa}.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import bad_type, require, require_int, require_name, require_tensor

__all__ = ["allocate_queries", "key_norms", "kv_head_of"]

FIXES = ("extremes", "random")


def key_norms(k: Tensor) -> Tensor:
    """Norm of each head's keys over tokens and channels, summed over the batch: k (B, Hkv, N, D) -> (Hkv,), float32 for half types."""
    require_tensor("k", k, dims=4, floating=True)
    k = k.float() if k.dtype in (torch.float16, torch.bfloat16) else k
    return k.flatten(2).norm(dim=2).sum(dim=0)


def allocate_queries(
    weights: Tensor, num_heads: int, *, fix: str = "extremes", generator: torch.Generator | None = None
) -> list[int]:
    """Share `num_heads` query heads among groups in proportion to `weights`: whole numbers >= 0 that sum to num_heads.

    Args:
        weights: (groups,) numbers >= 0. Where their sum is 0 or not finite, heads are shared evenly (the authors' code never returns).
        num_heads: heads to share.
        fix: shares are rounded (halves to even), and where they do not sum to num_heads, "extremes" takes one from the largest or gives
            one to the smallest group until they do (the first of equals); "random" takes from or gives to groups drawn evenly.
        generator: of "random"; None is torch's global one.

    A group may get no query head at all. Half of the groups at most differ from rounding by more than one.
    """
    require_tensor("weights", weights, dims=1, floating=True)
    require(weights.numel() >= 1, "weights", f"shape {tuple(weights.shape)}", "at least one group")
    require_int("num_heads", num_heads, 1)
    require_name("fix", fix, FIXES)
    weights = weights.detach()
    require(not bool((weights < 0).any()), "weights", weights.tolist(), "numbers >= 0")
    total = weights.sum()
    if not bool(torch.isfinite(total)) or float(total) == 0.0:
        weights, total = torch.ones_like(weights), torch.full_like(total, weights.numel())
    counts = (weights / total * num_heads).round().long().cpu()
    while int(counts.sum()) != num_heads:
        step = -1 if int(counts.sum()) > num_heads else 1
        if fix == "extremes":
            index = int(counts.argmax() if step < 0 else counts.argmin())
        else:
            index = int(torch.randint(counts.numel(), (1,), generator=generator))
        if counts[index] + step >= 0:
            counts[index] += step
    return counts.tolist()


def kv_head_of(allocation: Sequence[int], num_heads: int, device: torch.device | None = None) -> Tensor:
    """Which key/value head each query head reads, (num_heads,) int64: the first allocation[0] query heads read head 0, and so on."""
    if isinstance(allocation, (str, Tensor)) or not isinstance(allocation, Sequence):
        raise bad_type("allocation", allocation, "a sequence of whole numbers, one a key/value head")
    for count in allocation:
        require_int("allocation", count)
    require(
        sum(allocation) == num_heads, "allocation", list(allocation), f"numbers that sum to num_heads ({num_heads})"
    )
    counts = torch.tensor(list(allocation), device=device)
    return torch.repeat_interleave(torch.arange(len(allocation), device=device), counts, output_size=num_heads)
