"""Hierarchical top-k: find the keys with the highest scores by a tree search over blocks of keys, O(log T) steps a query block.

HiP Attention, Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention" (2024, ICLR 2025, arXiv 2406.09827). Code read for numbers (its licence, FSL-1.1-MIT, allows no more):
DeepAuto-AI/hip-attention @ fea42c7, `v1_1/attention2_draft.py` (variant "released") and `v1_0/attention1.py` ("paper").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_name, require_tensor, resolve_budget
from ..reference import accumulation_dtype
from ..selection import Selection
from .summaries import block_summary, split_blocks

_GATHER_LIMIT = 1 << 21  # key numbers gathered at a time
Score = Callable[[Tensor], Tensor]


def hierarchical_topk(
    q: Tensor,
    k: Tensor,
    budget: int | float = 512,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    group: int = 1,
    *,
    representative: str = "first",
    q_offset: int | None = None,
    variant: str = "released",
) -> Selection:
    """HiP's search: for each query block about `budget` keys before the recent `window`, without scoring all keys.

    The keys that query block i may search are the `S = e - window` ones before the window, e = the position after its last row.
    If S <= budget all are taken. Else `m = ceil(budget / block_k)` groups of key blocks cover them evenly; each step splits every
    group in two, scores each half by ONE block that stands for it, and keeps the best m halves, until groups are single blocks.
    The score is the largest raw q·k (no scale) over every second query row of the block and the block's keys. When scores
    rise monotonically towards one peak, the peak is found.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D), H a multiple of Hkv; no key is repeated in memory.
        budget: keys to choose per query block: int tokens, or float in (0, 1], a fraction of the context `q_offset + N`.
            Rounded down to a multiple of `group` and up to whole key blocks.
        block_q: rows a query block. block_k: keys a key block, with `group` > 1: key groups a key block.
        window: recent keys left out of the search (attention sees them anyway). With `group` > 1 it counts GROUPS, as released.
        group: neighbouring keys that are searched as one, scored by the larger of q·(their minimum) and q·(their maximum),
            element-wise extremes. Keys of a group that is not yet complete at e are not searched.
        representative: the block that stands for a group: "first" (its first block), or "best" (its best block, an oracle that
            scores every key; as released, a negative best score reads as 0). "best" needs group = 1 and variant "released".
        q_offset: position of query row 0, default M - N. Keys from `q_offset + N` on do not exist (an unfilled static cache).
        variant: "released" (v1.1 of the authors' code) or "paper" (v1.0: groups are cells of a normalised axis whose resolution
            doubles, only half of the budget is kept at coarse resolutions, and every second row from row 0 is scored; rounding
            can then leave fewer keys than the budget).

    Returns:
        `Selection` (B, H, ceil(N / block_q), <= m), query blocks of `block_q`, key blocks of `block_k * group`. The window is
        not in it.

    Raises:
        ValueError, TypeError: shapes or ranges that do not fit.
    """
    problem = _Problem.check(q, k, budget, block_q, block_k, window, group, q_offset)
    require_name("variant", variant, ("released", "paper"))
    require_name("representative", representative, ("first", "best"))
    if representative == "best":
        require(
            group == 1 and variant == "released", "representative", representative, "group=1 and variant='released'"
        )
    with torch.no_grad():
        indices = _search(problem, q, k, representative == "best", variant == "paper")
    return Selection(indices, block_q=block_q, block_k=block_k * group, q_len=q.shape[2], kv_len=k.shape[2])


@dataclass(frozen=True)
class _Problem:
    """The sizes of one search. Everything about keys counts units: keys, or groups of keys when `group` > 1."""

    batch: int
    heads: int
    rows: int
    budget: int
    block_q: int
    block_k: int
    group: int
    units: int
    ends: tuple[int, ...]
    searched: tuple[int, ...]

    @classmethod
    def check(cls, q: Tensor, k: Tensor, budget, block_q, block_k, window, group, q_offset) -> _Problem:
        for name, tensor in (("q", q), ("k", k)):
            require_tensor(name, tensor, dims=4, floating=True)
        for name, value, least in (
            ("block_q", block_q, 1),
            ("block_k", block_k, 1),
            ("window", window, 0),
            ("group", group, 1),
        ):
            require_int(name, value, least)
        batch, heads, rows, dim = q.shape
        require(
            k.shape[0] == batch and k.shape[3] == dim,
            "k",
            f"shape {tuple(k.shape)}",
            f"({batch}, Hkv, M, {dim}) like q",
        )
        if k.shape[1] == 0 or heads % k.shape[1]:
            raise bad_value("k", f"{k.shape[1]} kv heads", f"a divisor of q's {heads} heads")
        offset = k.shape[2] - rows if q_offset is None else require_int("q_offset", q_offset, 0)
        length = offset + rows
        require(
            offset >= 0 and length <= k.shape[2], "k", f"{k.shape[2]} keys", f"at least q_offset + N = {length} keys"
        )
        tokens = resolve_budget("budget", budget, length) // group * group
        require(tokens >= group or length == 0, "budget", budget, f"at least group = {group} keys")
        units = length // group
        ends = tuple(min((row + block_q + offset) // group, units) for row in range(0, rows, block_q))
        searched = tuple(max(0, end - window) for end in ends)
        return cls(batch, heads, rows, tokens // group, block_q, block_k, group, units, ends, searched)

    @property
    def blocks(self) -> int:
        """Key blocks to choose per query block."""
        return -(-self.budget // self.block_k)


def _search(problem: _Problem, q: Tensor, k: Tensor, best: bool, paper: bool) -> Tensor:
    """Numbers of the chosen key blocks, int64 (B, H, nQ, m), -1 = none."""
    device, m = q.device, problem.blocks
    found = torch.full((problem.batch, problem.heads, len(problem.ends), m), -1, dtype=torch.long, device=device)
    candidates = [-(-searched // problem.block_k) for searched in problem.searched]
    short = sum(searched <= problem.budget for searched in problem.searched)  # `searched` never falls
    if short:
        row = torch.arange(m, device=device)
        fits = row < torch.tensor(candidates[:short], device=device)[:, None]
        found[:, :, :short] = torch.where(fits, row, -1)
    if short == len(problem.ends):
        return found
    scorer = _Scorer(problem, q, k, 0 if paper else 1)
    step = max(1, _GATHER_LIMIT // (problem.batch * problem.heads * 2 * m * scorer.block_numbers))
    for first in range(short, len(problem.ends), step):
        last = min(first + step, len(problem.ends))
        score = scorer.for_query_blocks(first, last)
        totals = candidates[first:last]
        if paper:
            found[:, :, first:last] = _descend_cells(score, totals, m, device)
        else:
            found[:, :, first:last] = _descend_groups(score, totals, m, device, best)
    return found


class _Scorer:
    """Scores of key blocks for query blocks: the largest q·k over every second row and the keys of the block."""

    def __init__(self, problem: _Problem, q: Tensor, k: Tensor, first_row: int) -> None:
        self.problem = problem
        dtype = accumulation_dtype(q.dtype)
        keys = k[:, :, : problem.units * problem.group].to(dtype)
        if problem.group > 1:
            extremes = [block_summary(keys, problem.group, reduce) for reduce in ("min", "max")]
            keys = torch.stack(extremes, dim=-2)  # (B, Hkv, units, 2, D)
        else:
            keys = keys[..., None, :]
        self.per_unit, dim = keys.shape[-2:]
        blocks = split_blocks(keys.flatten(3), problem.block_k)  # (B, Hkv, blocks, block_k, per_unit * D)
        self.blocks_per_head = blocks.shape[2]
        self.block_numbers = problem.block_k * self.per_unit * dim
        self.keys = blocks.reshape(-1, self.block_numbers)
        self.dim = dim
        self.queries = _every_second_row(q.to(dtype), problem.block_q, first_row)
        head = torch.arange(problem.heads, device=q.device) // (problem.heads // k.shape[1])
        row = torch.arange(problem.batch, device=q.device)[:, None] * k.shape[1] + head
        self.head_start = (row * self.blocks_per_head)[:, :, None, None]  # (B, H, 1, 1) into self.keys
        self.ends = torch.tensor(problem.ends, device=q.device)
        # a block can reach past the end of what its queries may see only when the window is narrower than a block
        self.overhang = any(
            -(-searched // problem.block_k) * problem.block_k > end
            for searched, end in zip(problem.searched, problem.ends)
        )

    def for_query_blocks(self, first: int, last: int) -> Score:
        """For query blocks first .. last - 1, a function from key block numbers (B, H, last - first, n) to their scores."""
        queries = self.queries[:, :, first:last].flatten(0, 2)  # (X, rows, D)

        def score(index: Tensor) -> Tensor:
            index = index.expand(self.problem.batch, self.problem.heads, last - first, -1)
            number = (index.clamp(max=self.blocks_per_head - 1) + self.head_start).reshape(-1)
            keys = self.keys.index_select(0, number).view(queries.shape[0], -1, self.dim)
            best = torch.bmm(queries, keys.transpose(1, 2)).amax(1)  # (X, n * keys of a block)
            return self._existing(best.view(*index.shape, -1), index, first, last).amax(-1)

        return score

    def _existing(self, scores: Tensor, index: Tensor, first: int, last: int) -> Tensor:
        """Scores (..., c, n, keys of a block) of blocks `index` (..., c, n), -inf for keys that their queries come before."""
        if not self.overhang:
            return scores
        unit = torch.arange(self.problem.block_k, device=index.device).repeat_interleave(self.per_unit)
        after = index[..., None] * self.problem.block_k + unit >= self.ends[first:last, None, None]
        return scores.masked_fill(after, -torch.inf)


def _every_second_row(q: Tensor, block_q: int, first_row: int) -> Tensor:
    """Rows first_row, first_row + 2, ... of each query block, (B, H, nQ, rows, D); a block too short for it uses its first row.

    Rows missing in the last block repeat one that is there, which leaves a maximum over rows as it is.
    """
    rows = q.shape[2]
    start = torch.arange(0, rows, block_q, device=q.device)[:, None]
    row = start + torch.arange(min(first_row, block_q - 1), block_q, 2, device=q.device)
    missing = row >= rows
    row = torch.where(missing, torch.where(start + first_row < rows, start + first_row, start), row)
    return q[:, :, row]


def _descend_groups(score: Score, totals: list[int], m: int, device: torch.device, best: bool) -> Tensor:
    """v1.1: halve every group, keep the best m halves, until groups are single blocks. `totals`: blocks that are searched."""
    mean_size = torch.tensor(totals, dtype=torch.float64)[:, None] / m
    edges = (
        (mean_size * torch.arange(m + 1)).long().to(device)
    )  # in float64, as released: a product may fall just below a whole
    index, size = edges[:, :-1], edges.diff(dim=1)
    scores: Tensor | None = None
    while bool((mean_size > 1).any()):
        half = size // 2
        right = index + half
        # a left half begins where its group began, so it keeps the score that the group was chosen by
        if best:
            left_score, right_score = _best_in(score, index, half), _best_in(score, right, size - half)
        else:
            left_score, right_score = score(index) if scores is None else scores, score(right)
        left_score = left_score.masked_fill(half < 1, -torch.inf)
        right_score = right_score.masked_fill(size - half < 1, -torch.inf)
        index, right, half, size = (x.expand(left_score.shape) for x in (index, right, half, size))
        both = torch.stack((left_score, right_score), dim=-1).flatten(-2)
        kept_scores, kept = both.topk(m, dim=-1)
        unsettled = (mean_size > 1).to(device)
        new_index = torch.stack((index, right), dim=-1).flatten(-2).gather(-1, kept)
        new_size = torch.stack((half, size - half), dim=-1).flatten(-2).gather(-1, kept)
        index, size = torch.where(unsettled, new_index, index), torch.where(unsettled, new_size, size)
        scores = kept_scores if scores is None else torch.where(unsettled, kept_scores, scores)
        mean_size = mean_size / 2
    return index


def _best_in(score: Score, index: Tensor, size: Tensor) -> Tensor:
    """The best score among blocks index .. index + size - 1, at least 0 (as released)."""
    widest = int(size.max())
    best = torch.zeros((), device=index.device)
    for shift in range(widest):
        here = score(index + shift).masked_fill(shift >= size, 0.0)
        best = torch.maximum(here, best)
    return best


def _descend_cells(score: Score, totals: list[int], m: int, device: torch.device) -> Tensor:
    """v1.0: double the resolution of the axis; cell c stands for the block floor(c * total / resolution)."""
    total = torch.tensor(totals, device=device)[:, None]
    resolution = total.clamp(max=m)
    cell = torch.arange(m, device=device).expand(len(totals), m)
    alive = cell < resolution
    patches = max(1, m // 2)  # cells kept at coarse resolutions
    reached = m
    while reached < max(totals):
        reached *= 2
        finer = torch.minimum(resolution * 2, total)
        child = torch.stack((cell * finer // resolution, cell * finer // resolution + 1), dim=-1)
        exists = torch.stack((alive, alive & (child[..., 1] < (cell + 1) * finer // resolution)), dim=-1)
        child, exists = child.flatten(-2), exists.flatten(-2)
        keep = torch.minimum(total, (m * finer // total).clamp(min=patches))
        scores = score(child * total // finer).masked_fill(~exists, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :m]
        moving = resolution < total
        chosen = exists.expand(scores.shape).gather(-1, order) & (torch.arange(m, device=device) < keep)
        cell = torch.where(moving, child.expand(scores.shape).gather(-1, order), cell)
        alive = torch.where(moving, chosen, alive)
        resolution = finer
    return torch.where(alive, cell, -1)
