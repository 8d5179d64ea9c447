"""What each method reads, keeps and searches, for the cost model: a few numbers for each layer and head, no tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._checks import require_name, resolve_budget
from ..methods.plans import Rule, Window, union
from ..methods.slots import AllSlots, RingSlots

if TYPE_CHECKING:
    from .cost import ModelShape

Positions = NDArray[np.float64]
Amount = Callable[[Positions], Positions]


def _all(seen: Positions) -> Positions:
    return seen


def _none(seen: Positions) -> Positions:
    return np.zeros_like(seen)


def _at_most(keys: float) -> Amount:
    return lambda seen: np.minimum(seen, keys)


@dataclass(frozen=True)
class Reach:
    """What one head does for a query that could see `seen` keys, its own included. Each amount is a function of an array of `seen`.

    Attributes:
        read: keys it attends to. kept: keys of its cache once that many have come (in keys of full precision).
        moved: keys whose bytes are read for it; None: those it attends to.
        scored: summaries (vectors of head_dim) that are scored to choose the keys.
        search_rows: queries of a prefill that share one search. grouped_search: the heads of a group share one scored query.
    """

    read: Amount = _all
    kept: Amount = _all
    scored: Amount = _none
    search_rows: int = 1
    grouped_search: bool = False
    moved: Amount | None = None

    def bytes_of(self, seen: Positions) -> Positions:
        """Keys whose bytes are read."""
        return self.read(seen) if self.moved is None else self.moved(seen)


DENSE = Reach()
Parts = list[tuple[float, Reach]]
"""(share of the layers and heads, what they do); the shares sum to 1."""


def window_reach(keys: int, evicts: bool = False) -> Reach:
    """The last (and first) `keys` keys; `evicts`: the others are not kept."""
    return Reach(_at_most(keys), _at_most(keys) if evicts else _all)


def density_reach(density: float, block: int = 1, search_rows: int = 1) -> Reach:
    """That share of the keys each query could see; `block` > 1: chosen by scoring a summary for each block of keys."""
    scored = (lambda seen: seen / block) if block > 1 else _none
    return Reach(lambda seen: np.minimum(seen, np.maximum(1.0, density * seen)), scored=scored, search_rows=search_rows)


def reaches(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    """What `method` (None: dense) makes of a model's layers and heads at a context of `context` tokens.

    Args:
        phase: "prefill" or "decode". Known are the methods of `regard.methods`; another method may say it itself by a function
            `reaches(shape, context, phase)`; else a `budget` is taken as the keys read (where the method brings a cache: in decoding
            only, and as the keys kept), a mask is asked about some rows, and a method that claims none of those seams is dense.
    Raises:
        ValueError: nothing can be known about the method that way.
    """
    require_name("phase", phase, ("prefill", "decode"))
    if method is None:
        return [(1.0, DENSE)]
    own = getattr(method, "reaches", None)
    if own is not None:
        return own(shape, context, phase)
    for kind in type(method).__mro__:
        if kind.__name__ in _KNOWN:
            return _KNOWN[kind.__name__](method, shape, context, phase)
    seams = method.seams()
    if not {"mask", "select", "attend", "cache", "score"} & set(seams):
        return [(1.0, DENSE)]
    budget = getattr(method, "budget", None)
    if budget is not None:
        if "cache" in seams:
            return _evicting(method, shape, context, phase)
        return _with_dense_layers(method, shape, window_reach(resolve_budget("budget", budget, context)))
    if "mask" in seams and "attend" not in seams:
        return _with_dense_layers(method, shape, _masked(method, shape, context))
    if seams == ("score",):
        return [(1.0, DENSE)]
    name = type(method).__name__
    raise ValueError(
        f"method: the cost of {name} is not known; give it a field `budget`, or a function reaches(shape, context, phase)"
    )


def _with_dense_layers(method: Any, shape: ModelShape, sparse: Reach | Parts) -> Parts:
    """The first layers, or those numbered, stay dense."""
    given, layers = getattr(method, "dense_layers", 0), shape.num_layers
    dense = min(given, layers) if isinstance(given, int) else len({number % layers for number in given})
    if getattr(method, "layers", None) is not None:
        dense = layers - len({number % layers for number in method.layers})
    share = dense / layers
    parts = [(1.0, sparse)] if isinstance(sparse, Reach) else sparse
    return ([(share, DENSE)] if share else []) + [((1 - share) * s, reach) for s, reach in parts if share < 1]


def _masked(method: Any, shape: ModelShape, context: int) -> Reach:
    """Keys that a mask leaves, from a few rows of it, in between by straight lines."""
    from ..methods.call import AttentionCall
    from ..ops import masks

    q = torch.zeros(1, shape.num_heads, 1, 1).expand(-1, -1, context, -1)
    k = torch.zeros(1, shape.num_kv_heads, 1, 1).expand(-1, -1, context, -1)
    call = AttentionCall(torch.nn.Identity(), shape.num_layers - 1, q, k, k, causal=True, num_layers=shape.num_layers)
    mask = method.mask(call)
    if mask is None:
        return DENSE
    rows = torch.linspace(0, context - 1, min(context, 65)).round().long()
    b, h = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.arange(shape.num_heads).view(1, -1, 1, 1)
    keys = torch.arange(context).view(1, 1, 1, -1)
    found = []
    for row in rows:
        at = row.view(1, 1, 1, 1)
        keep = masks.as_mask(mask).keep(b, h, at, keys) & (keys <= at)
        found.append(float(keep.expand(1, shape.num_heads, 1, context).sum()) / shape.num_heads)
    seen = (rows + 1).numpy().astype(np.float64)
    counts = np.array(found)
    return Reach(lambda position: np.interp(position, seen, counts))


def _sliding(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    return _with_dense_layers(method, shape, window_reach(method.window + method.sink))


def _streaming(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    return [(1.0, window_reach(method.window + method.sink, evicts=True))]


def _duo(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    short = method.sink + method.recent
    if isinstance(method.budget, float):
        full = method.budget
    else:
        full = min(1.0, max(0.0, (method.budget - short) / max(1, context - short)))
    released_prompt = phase == "prefill" and method.variant == "released"
    read = _all if released_prompt else _at_most(short)
    return [(full, DENSE), (1 - full, Reach(read, _at_most(short)))]


def _hip(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    budget = resolve_budget("budget", method.budget, context)
    near = budget + method.window
    groups = math.ceil(budget / (method.block_k * method.group))

    def scored(seen: Positions) -> Positions:
        blocks = np.maximum(seen - method.window, 0) / (method.block_k * method.group)
        levels = np.ceil(np.log2(np.maximum(blocks / groups, 1.0)))
        return levels * 2 * groups * method.block_k * (2 if method.group > 1 else 1) * (seen > near)

    every = method.refresh_every if phase == "decode" else 2  # every second query of a block is scored
    return _with_dense_layers(
        method, shape, Reach(_at_most(near + method.sink), scored=lambda seen: scored(seen) / every)
    )


def _dhsa(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if phase == "decode":
        return [(1.0, DENSE)]
    budget = resolve_budget("budget", method.budget, context)
    extra = method.sink if method.variant == "paper" else 0
    dense_from = context - method.instruction

    def read(seen: Positions) -> Positions:
        return np.where(seen > dense_from, seen, np.minimum(seen, budget + extra))

    def scored(seen: Positions) -> Positions:  # chunk means against one mean query a block; heads together are one
        return seen / method.block_q * method.chunks_per_block / shape.num_heads

    return _with_dense_layers(method, shape, Reach(read, scored=scored, search_rows=method.block_q))


def _block_dhsa(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if phase == "decode":
        return [(1.0, DENSE)]
    least = method.block_k + (
        method.block_q if method.band else method.block_k
    )  # the first block, and those of the rows themselves
    budget = max(least, resolve_budget("budget", method.budget, context))
    scored = lambda seen: np.full_like(seen, context / method.block_k)  # noqa: E731 (all blocks, also of the future)
    return _with_dense_layers(method, shape, Reach(_at_most(budget), scored=scored, search_rows=method.block_q))


def _grouped(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if phase == "prefill":
        return [(1.0, DENSE)]
    budget = resolve_budget("budget", method.budget, context)

    def scored(seen: Positions) -> Positions:
        return (seen - method.sink - method.recent).clip(min=0) / method.block_size * (seen > budget)

    reach = Reach(_at_most(budget), scored=scored, grouped_search=True)
    return _with_dense_layers(method, shape, reach)


def _evicting(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    """The prompt densely, then only what was kept of it."""
    budget = resolve_budget("budget", method.budget, context)
    return [(1.0, Reach(_all if phase == "prefill" else _at_most(budget), _at_most(budget)))]


def _recycled(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    budget = resolve_budget("budget", method.budget, context)
    both = lambda seen: seen + np.minimum(seen, budget)  # noqa: E731 (the small cache comes on top)
    if phase == "prefill":
        return [(1.0, Reach(kept=both))]
    mean = lambda seen: (seen + (method.stride - 1) * np.minimum(seen, budget)) / method.stride  # noqa: E731
    return _with_dense_layers(method, shape, Reach(mean, both))


def _staircase(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    def stored(seen: Positions) -> Positions:
        left, out = seen.astype(float), np.zeros_like(seen)
        for tokens, bits in method.steps:
            part = left if tokens is None else np.minimum(left, tokens)
            out, left = out + part * bits / 16, left - part
        return out

    return [(1.0, Reach(kept=stored, moved=None if phase == "prefill" else stored))]


def _planned(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    """Heads whose rules are known: what each reads, and what the rules of its kv head keep."""
    share, found = shape.num_heads // shape.num_kv_heads, Counter[tuple[Rule, Rule]]()
    for layer in range(shape.num_layers):
        rules = method.rules_of(layer, shape.num_layers, shape.num_heads, shape.num_kv_heads)
        settled = [rule.at(context) for rule in rules]
        if phase == "decode":  # a prompt may be read in whole blocks, a token sees tokens
            settled = [replace(rule, block=1) if isinstance(rule, Window) else rule for rule in settled]
        found.update((rule, union(settled[i // share * share :][:share])) for i, rule in enumerate(settled))
    return [(count / found.total(), _reach_of(*rules, context)) for rules, count in found.items()]


def _reach_of(rule: Rule, kept: Rule, context: int) -> Reach:
    slots = kept.slots()
    if isinstance(slots, AllSlots):
        keep: Amount = _all
    elif isinstance(slots, RingSlots):
        keep = _at_most(slots.sink + slots.window)
    else:
        keep = _looked_up(kept, context)
    return Reach(_looked_up(rule, context), keep)


def _looked_up(rule: Rule, context: int) -> Amount:
    keys = rule.row_lengths(context + 1).double().numpy()
    return lambda seen: keys[np.clip(seen, 1, context + 1).astype(int) - 1]


def _s2(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if not method.free_cache:
        return _with_dense_layers(method, shape, _masked(method, shape, context))
    rules = Counter(method.rules_of(shape.num_heads, shape.num_kv_heads))
    return _with_dense_layers(
        method, shape, [(count / rules.total(), _reach_of(rule, rule, context)) for rule, count in rules.items()]
    )


def _cca(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    def read(seen: Positions) -> Positions:
        old = np.maximum(seen - method.window, 0) // method.group
        return seen - old * (method.group - 1)

    return [(1.0, Reach(read, read))]


def _hyper(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if phase == "decode" or context <= method.min_len:
        return [(1.0, DENSE)]
    levels = math.ceil(math.log2(context / method.min_len))
    leaf, estimated = context / 2**levels, method.block_size + method.samples

    def read(seen: Positions) -> Positions:  # exact within its leaf, an estimate for each first half before it
        halves = ((seen - 1) // leaf).astype(int)
        ups = sum((halves >> level) & 1 for level in range(levels))
        return np.minimum(seen, (seen - 1) % leaf + 1 + ups * estimated)

    return [(1.0, Reach(read))]


def _block_topk(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if not getattr(method, phase):
        return [(1.0, DENSE)]
    budget = resolve_budget("budget", method.budget, context)
    rows = method.block_q if phase == "prefill" else 1
    width = {"minmax": 2, "maxminmean": 3}.get(method.summary, 1)  # vectors that a summary holds
    scored = lambda seen: seen / method.block_size * width * (seen > budget)  # noqa: E731
    return _with_dense_layers(method, shape, Reach(_at_most(budget), _all, scored, rows, grouped_search=True))


def _retrieval(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    if phase == "prefill":
        return [(1.0, DENSE)]
    always = method.sink + method.recent
    share = (
        1.0 if method.index == "exact" else 0.05
    )  # what an index may read of the keys at most, by what it is asked for
    scored = lambda seen: np.maximum(seen - always, 0) * share  # noqa: E731
    sparse = Reach(_at_most(always + method.top_k), scored=scored)
    first = min(method.from_layer, shape.num_layers) / shape.num_layers
    return [(first, DENSE), (1 - first, sparse)]


def _long_heads(method: Any, shape: ModelShape, context: int, phase: str) -> Parts:
    budget = resolve_budget("budget", method.budget, context)
    scored = lambda seen: seen / method.chunk * (seen > budget)  # noqa: E731
    return [(1.0, Reach(_at_most(budget), scored=scored))]


_KNOWN: dict[str, Callable[[Any, Any, int, str], Parts]] = {
    "SlidingWindow": _sliding,
    "StreamingLLM": _streaming,
    "DuoAttention": _duo,
    "HiP": _hip,
    "DHSA": _dhsa,
    "EvictingMethod": _evicting,
    "RecycledAttention": _recycled,
    "StaircaseQuantCache": _staircase,
    "PlannedMethod": _planned,
    "S2Attention": _s2,
    "CCAAttention": _cca,
    "HyperAttention": _hyper,
    "BlockTopK": _block_topk,
    "RetrievalAttention": _retrieval,
    "LongHeads": _long_heads,
    "BlockDHSA": _block_dhsa,
    "GroupedTopK": _grouped,
}
