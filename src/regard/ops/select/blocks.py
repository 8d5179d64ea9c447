"""Selectors over block scores: top-k, ratio, threshold or a budget of tokens, with sinks, recent and diagonal blocks forced in.

`block_scores` gives scores from block summaries without any training; gates (`regard.nn.AttentionGate`) give learned ones. Both end in
`select_blocks`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_name, require_tensor, resolve_budget
from ..reference import accumulation_dtype
from ..selection import Selection
from .summaries import block_summary, split_blocks

SHARINGS = ("mean", "max", "none")
_SCORES_AT_ONCE = 1 << 22


class BlockGrid(NamedTuple):
    """Geometry of a block selection: lengths, block sizes, and the position of query row 0."""

    q_len: int
    kv_len: int
    block_q: int
    block_k: int
    q_offset: int

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.kv_len // self.block_k)

    def first_rows(self, device: torch.device | str | None = None) -> Tensor:
        """Position of the first row of each query block, (nQ,)."""
        return torch.arange(self.num_q_blocks, device=device) * self.block_q + self.q_offset

    def last_rows(self, device: torch.device | str | None = None) -> Tensor:
        """Position of the last row of each query block, (nQ,)."""
        return (self.first_rows(device) + self.block_q - 1).clamp(max=self.q_offset + self.q_len - 1)

    def visible(self, device: torch.device | str | None = None) -> Tensor:
        """Bool (nQ, nK): key blocks that begin at or before the last row of the query block, as under a causal mask."""
        starts = torch.arange(self.num_k_blocks, device=device) * self.block_k
        return starts <= self.last_rows(device)[:, None]

    def forced(self, sink: int = 0, recent: int = 0, device: torch.device | str | None = None) -> Tensor:
        """Bool (nQ, nK): key blocks holding one of the first `sink` keys, or one of the last `recent` keys up to and including
        each row of the query block (1: the diagonal)."""
        starts = torch.arange(self.num_k_blocks, device=device) * self.block_k
        out = (starts < sink).expand(self.num_q_blocks, -1)
        if recent:
            oldest = self.first_rows(device)[:, None] - recent + 1
            out = out | ((starts + self.block_k > oldest) & (starts <= self.last_rows(device)[:, None]))
        return out

    def selection(self, indices: Tensor) -> Selection:
        return Selection(indices, block_q=self.block_q, block_k=self.block_k, q_len=self.q_len, kv_len=self.kv_len)


def query_features(q: Tensor, kind: str) -> Tensor:
    """Queries (..., N, D) as vectors (..., N, F) whose product with block summaries of `kind` is the block's score.

    "mean", "centroid", "max", "min": the query itself. "minmax": the score is the upper bound of q . k over the block's keys,
    sum_d max(q_d max_d, q_d min_d) (Tang et al., "Quest", 2024, arXiv 2406.10774). "maxminmean": half that bound, half the mean.
    """
    if kind not in ("minmax", "maxminmean"):
        return q
    bound = torch.cat((q.clamp(min=0), q.clamp(max=0)), dim=-1)
    return bound if kind == "minmax" else torch.cat((bound, q), dim=-1) * 0.5


def block_scores(
    q: Tensor,
    summaries: Tensor,
    kind: str = "mean",
    *,
    block_q: int = 64,
    share: str = "mean",
    rows: str = "mean",
    scale: float = 1.0,
) -> Tensor:
    """How much each query block wants each key block, by summaries of both.

    Args:
        q: (B, H, N, D). summaries: (B, Hkv, nK, F) of `kind` (see `block_summaries`), H a multiple of Hkv.
        block_q: rows a query block. rows: "mean": one averaged query stands for the block; "max": every row is scored and the block
            has its best row's score (block_q times the work).
        share: what the query heads of a kv head have together: the "mean" or "max" of their scores; "none": each has its own.
        scale: factor on the scores.
    Returns:
        (B, Hkv, nQ, nK), with "none" (B, H, nQ, nK); float32 for half types.
    """
    require_tensor("q", q, dims=4, floating=True)
    require_tensor("summaries", summaries, dims=4, floating=True)
    require_int("block_q", block_q, 1)
    require_name("share", share, SHARINGS)
    require_name("rows", rows, ("mean", "max"))
    num_heads, kv_heads = q.shape[1], summaries.shape[1]
    if kv_heads == 0 or num_heads % kv_heads:
        raise bad_value("summaries", f"{kv_heads} heads", f"a divisor of q's {num_heads} heads")
    dtype = torch.promote_types(accumulation_dtype(q.dtype), summaries.dtype)
    keys = (summaries.to(dtype) * scale).transpose(-1, -2)[:, :, None]  # (B, Hkv, 1, F, nK)
    if rows == "mean":
        pooled = query_features(block_summary(q, block_q) if block_q > 1 else q.to(dtype), kind)
        pooled = pooled.unflatten(1, (kv_heads, -1))
        if share == "mean":
            pooled = pooled.mean(2, keepdim=True)
        scores = pooled @ keys
    else:
        scores = _best_rows(q.to(dtype), keys, kind, block_q, share == "mean")
    return scores.amax(2) if share == "max" else scores.flatten(1, 2)


def _best_rows(q: Tensor, keys: Tensor, kind: str, block_q: int, together: bool) -> Tensor:
    """Scores (B, Hkv, H / Hkv or 1, nQ, nK) of the best row of each query block, a few query blocks at a time."""
    batch, num_heads, length, _ = q.shape
    grouped = q.unflatten(1, (keys.shape[1], -1))
    step = max(1, _SCORES_AT_ONCE // max(1, batch * num_heads * block_q * keys.shape[-1])) * block_q
    out = []
    for start in range(0, length, step):
        features = query_features(grouped[..., start : start + step, :], kind)
        scores = (features.mean(2, keepdim=True) if together else features) @ keys
        out.append(split_blocks(scores, block_q, -torch.inf).amax(-2))
    return torch.cat(out, dim=-2) if out else keys.new_zeros(*grouped.shape[:3], 0, keys.shape[-1])


def share_scores(scores: Tensor, num_kv_heads: int, share: str = "mean") -> Tensor:
    """Scores (B, H, nQ, nK) of query heads as scores of their kv heads (B, Hkv, nQ, nK): their "mean" or "max"; "none": as they are."""
    require_tensor("scores", scores, dims=4, floating=True)
    require_name("share", share, SHARINGS)
    heads = scores.shape[1]
    require(
        num_kv_heads > 0 and heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"a divisor of the {heads} heads"
    )
    if share == "none" or heads == num_kv_heads:
        return scores
    grouped = scores.unflatten(1, (num_kv_heads, -1))
    return grouped.mean(2) if share == "mean" else grouped.amax(2)


def select_blocks(
    scores: Tensor,
    grid: BlockGrid,
    *,
    topk: int | None = None,
    budget: int | float | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    sink: int = 0,
    recent: int = 1,
    causal: bool = True,
) -> Selection:
    """The key blocks with the best scores, by exactly one of four rules, and those that are forced.

    Args:
        scores: (B|1, H|Hkv|1, nQ, nK), any real numbers; -inf: never, unless forced.
        grid: geometry that the scores belong to.
        topk: key blocks a query block, forced ones among them.
        budget: the same in keys: int tokens, or float in (0, 1], a fraction of `kv_len`; rounded up to whole blocks.
        ratio: the same as a fraction in (0, 1] of the blocks that the query block may see, rounded up.
        threshold: every block with a score above it, and the forced ones.
        sink: blocks of the first `sink` keys are forced. recent: blocks of the last `recent` keys of each row, itself included, are
            forced; 1: the diagonal, 0: nothing.
        causal: whether only blocks that begin at or before the query block's last row count.

    When more blocks are forced than the rule would choose, the forced ones are chosen.
    """
    require_tensor("scores", scores, dims=4, floating=True)
    shape = (grid.num_q_blocks, grid.num_k_blocks)
    require(
        tuple(scores.shape[2:]) == shape,
        "scores",
        f"shape {tuple(scores.shape)}",
        f"(B|1, H|1, {shape[0]}, {shape[1]})",
    )
    for name, value in (("sink", sink), ("recent", recent)):
        require_int(name, value, 0)
    given = {
        name: v
        for name, v in (("topk", topk), ("budget", budget), ("ratio", ratio), ("threshold", threshold))
        if v is not None
    }
    if len(given) != 1:
        raise bad_value("topk, budget, ratio, threshold", given or "none of them", "exactly one of them")
    device = scores.device
    if scores.numel() == 0:
        return grid.selection(torch.full((*scores.shape[:3], 0), -1, device=device))
    visible = grid.visible(device) if causal else torch.ones(shape, dtype=torch.bool, device=device)
    forced = grid.forced(sink, recent, device) & visible
    if threshold is not None:
        kept = ((scores > threshold) | forced) & visible
        return Selection.from_block_map(
            kept, block_q=grid.block_q, block_k=grid.block_k, q_len=grid.q_len, kv_len=grid.kv_len
        )
    seen = visible.sum(-1)
    if ratio is not None:
        require(0.0 < ratio <= 1.0, "ratio", ratio, "a fraction in (0, 1]")
        count = (seen * ratio).ceil().long()
    elif budget is not None:
        count = torch.full_like(seen, -(-resolve_budget("budget", budget, grid.kv_len) // grid.block_k))
    else:
        assert topk is not None
        count = torch.full_like(seen, require_int("topk", topk, 1))
    count = torch.maximum(count, forced.sum(-1)).clamp(max=grid.num_k_blocks)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf).topk(int(count.max()), dim=-1)
    place = torch.arange(ranked.values.shape[-1], device=device)
    kept = (ranked.values > -torch.inf) & (place < count[:, None])
    return grid.selection(torch.where(kept, ranked.indices, -1))
