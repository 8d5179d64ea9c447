"""Hierarchical top-k: find the keys with the highest scores by a tree search over blocks of keys, O(log T) steps a query block.

HiP Attention, Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention" (2024, ICLR 2025, arXiv 2406.09827). Code read for numbers (its licence, FSL-1.1-MIT, allows no more):
DeepAuto-AI/hip-attention @ fea42c7, `v1_1/attention2_draft.py` (variant "released") and `v1_0/attention1.py` ("paper").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    query_dims: int | None = None,
    resolution: int = 1,
    sifters: int = 1,
    q_offset: int | None = None,
    variant: str = "released",
    generator: torch.Generator | None = None,
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
        representative: the block that stands for a group: "first" (its first block), "random" (any of its blocks, drawn anew at each
            step with `generator`), or "best" (its best block, an oracle that scores every key; as released, a negative best score
            reads as 0). "best" needs group = 1; "random" and "best" need variant "released".
        query_dims: score with these many channels only, those with the largest sum of |q| over the query block (SparQ; the authors'
            kernels take 32). None: all.
        resolution: search for `budget / resolution` blocks and take this many neighbouring blocks for each one found (the kernels'
            lower-resolution estimator takes 2). What is found twice counts once, so that fewer keys than the budget may come out.
        sifters: 2: two searches of half the budget, of which the second begins with the halves that the first dropped in its first
            step, so that no large group is lost early. Needs variant "released".
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
    require_name("representative", representative, ("first", "random", "best"))
    require_int("resolution", resolution, 1)
    require(sifters in (1, 2), "sifters", sifters, "1 or 2")
    if query_dims is not None:
        require_int("query_dims", query_dims, 1)
    if variant == "paper":
        require(sifters == 1, "sifters", sifters, "1 with variant='paper'")
        require(representative != "random", "representative", representative, "'first' with variant='paper'")
    if representative == "best":
        require(
            group == 1 and variant == "released", "representative", representative, "group=1 and variant='released'"
        )
    with torch.no_grad():
        if query_dims is not None and query_dims < q.shape[3]:
            q = _strongest_channels(q, block_q, query_dims)
        draw = generator if representative == "random" else None
        options = _Options(representative, variant == "paper", draw)
        coarse = replace(
            problem, budget=max(1, problem.budget // (resolution * sifters)), whole=problem.budget // sifters
        )
        parts = [_search(coarse, q, k, replace(options, skip=turn)) for turn in range(sifters)]
        indices = torch.cat(parts, dim=-1) if sifters > 1 else parts[0]
        if resolution > 1:
            indices = _neighbours(problem, indices, resolution)
    return Selection(indices, block_q=block_q, block_k=block_k * group, q_len=q.shape[2], kv_len=k.shape[2])


@dataclass(frozen=True)
class _Options:
    """How groups are represented, and what the first step keeps: the best (skip 0) or the next best (1)."""

    representative: str = "first"
    paper: bool = False
    generator: torch.Generator | None = None
    skip: int = 0


def _strongest_channels(q: Tensor, block_q: int, count: int) -> Tensor:
    """q with zeros in all but the `count` channels of each query block whose absolute values have the largest sum."""
    weight = block_summary(q.abs(), block_q, "sum")
    kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, weight.topk(count, dim=-1).indices, True)
    return q.masked_fill(~kept.repeat_interleave(block_q, dim=2)[:, :, : q.shape[2]], 0.0)


def _neighbours(problem: _Problem, indices: Tensor, count: int) -> Tensor:
    """Each block and the `count - 1` after it, as far as they are searched."""
    blocks = [-(-searched // problem.block_k) for searched in problem.searched]
    limit = torch.tensor(blocks, device=indices.device)[:, None]
    many = (indices[..., None] + torch.arange(count, device=indices.device)).flatten(-2)
    known = (indices >= 0).repeat_interleave(count, -1)
    return torch.where(known & (many < limit), many, -1)


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
    whole: int  # a query block that may search no more units than that has all of them

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
        size = tokens // group
        return cls(batch, heads, rows, size, block_q, block_k, group, units, ends, searched, size)

    @property
    def blocks(self) -> int:
        """Key blocks to choose per query block."""
        return -(-self.budget // self.block_k)


def _search(problem: _Problem, q: Tensor, k: Tensor, options: _Options) -> Tensor:
    """Numbers of the chosen key blocks, int64 (B, H, nQ, m), or wider where some query block has more; -1 = none."""
    device, m = q.device, problem.blocks
    candidates = [-(-searched // problem.block_k) for searched in problem.searched]
    short = sum(searched <= problem.whole for searched in problem.searched)  # `searched` never falls
    width = max(m, max(candidates[:short], default=0))
    shape = (problem.batch, problem.heads, len(problem.ends), width)
    found = torch.full(shape, -1, dtype=torch.long, device=device)
    if short:
        row = torch.arange(width, device=device)
        fits = row < torch.tensor(candidates[:short], device=device)[:, None]
        found[:, :, :short] = torch.where(fits, row, -1)
    if short == len(problem.ends):
        return found
    scorer = _Scorer(problem, q, k, 0 if options.paper else 1)
    step = max(1, _GATHER_LIMIT // (problem.batch * problem.heads * 2 * m * scorer.block_numbers))
    for first in range(short, len(problem.ends), step):
        last = min(first + step, len(problem.ends))
        score = scorer.for_query_blocks(first, last)
        totals = candidates[first:last]
        if options.paper:
            found[:, :, first:last, :m] = _descend_cells(score, totals, m, device)
        else:
            found[:, :, first:last, :m] = _descend_groups(score, totals, m, device, options)
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
        queries = self.queries[:, :, first:last].flatten(0, 2).transpose(1, 2)  # (X, D, rows)

        def score(index: Tensor) -> Tensor:
            index = index.expand(self.problem.batch, self.problem.heads, last - first, -1)
            number = (index.clamp(max=self.blocks_per_head - 1) + self.head_start).reshape(-1)
            keys = self.keys.index_select(0, number).view(queries.shape[0], -1, self.dim)
            scores = torch.bmm(keys, queries)  # (X, n * keys of a block, rows): what is reduced lies together
            if not self.overhang:
                return scores.view(*index.shape, -1).amax(-1)
            return self._existing(scores.amax(-1).view(*index.shape, -1), index, first, last).amax(-1)

        return score

    def _existing(self, scores: Tensor, index: Tensor, first: int, last: int) -> Tensor:
        """Scores (..., c, n, keys of a block) of blocks `index` (..., c, n), -inf for keys that their queries come before."""
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


def _descend_groups(score: Score, totals: list[int], m: int, device: torch.device, options: _Options) -> Tensor:
    """v1.1: halve every group, keep the best m halves, until groups are single blocks. `totals`: blocks that are searched."""
    best, skip = options.representative == "best", options.skip
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
        elif options.representative == "random":
            left_score, right_score = (
                score(at + (torch.rand(at.shape, device=device, generator=options.generator) * wide).long())
                for at, wide in ((index, half), (right, size - half))
            )
        else:
            left_score, right_score = score(index) if scores is None else scores, score(right)
        left_score = left_score.masked_fill(half < 1, -torch.inf)
        right_score = right_score.masked_fill(size - half < 1, -torch.inf)
        index, right, half, size = (x.expand(left_score.shape) for x in (index, right, half, size))
        both = torch.stack((left_score, right_score), dim=-1).flatten(-2)
        kept_scores, kept = (x[..., m * skip :] for x in both.topk(m * (skip + 1), dim=-1))
        skip = 0
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
