"""011 HiP: the tree search finds most of the attention mass at a small budget, in nearly linear time."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...lens.record import Record, record
from ...ops.select.hierarchical_topk import hierarchical_topk
from ...ops.selection import Selection
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "011", "hip"
SAYS = (
    "HiP: a tree search over blocks of keys finds most of the attention mass with a fixed budget, more than sinks and a window of "
    "the same size, in T log T time."
)
SINK = 4
MASS, REST = "attention mass read", "mass read, first 4 keys left out"


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context, window = scale.pick(2048, 256), scale.pick(128, 16)
    budget = context // 8
    depth = model.config.get_text_config().num_hidden_layers
    layers = [round(i * (depth - 1) / 4) for i in range(5)] if depth > 5 else list(range(depth))
    out = Outcome(
        f"queries and keys of layers {', '.join(map(str, layers))} at {context} tokens, {budget} keys a query (an eighth, "
        f"{window} of them the window)",
        "a layer",
    )
    seen = record(model, torch.tensor([token_windows(tokenizer, context, 1)[0]]), layers=layers)
    found: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        for label, shares in _masses(seen, layer, budget, window).items():
            found.setdefault(label, []).append(shares)
    for place, figure in enumerate((MASS, REST)):
        for label, pairs in found.items():
            base = None if label == "best keys" else "best keys"
            out.add(label, figure, "", [pair[place] for pair in pairs], against=base)
    hip, random = out.row("HiP", MASS).mean, out.row("random blocks and window", MASS).mean
    fixed = out.row("sinks and window", MASS).mean
    out.check("mass read by HiP, of that of the best keys", out.row("HiP", MASS).ratio or 0.0, at_least=0.8)
    out.check("lead over random blocks", hip - random, at_least=0.05)
    out.check("lead over sinks and window", hip - fixed, at_least=0.0, digits=3)
    rest = out.row("HiP", REST).mean - out.row("sinks and window", REST).mean
    out.check("lead over them with the first 4 keys left out", rest, at_least=0.0, digits=3)
    _search_time(out, scale)
    return out


@torch.no_grad()
def _masses(seen: Record, layer: int, budget: int, window: int) -> dict[str, tuple[float, float]]:
    """Shares of the true attention mass read by each way, mean over heads and over the queries of the second half."""
    q, k = seen.q(layer), seen.k(layer)
    n, block = q.shape[2], 32
    rows = torch.arange(n // 2, n)
    weights = seen.weights(layer, rows=rows)[0]  # (H, rows, n)
    key = torch.arange(n)
    # as HiP's attention: the window is counted from the end of each query block
    end = (rows // block + 1) * block
    recent = key >= (end - window)[:, None]
    searched = budget - window
    hip = hierarchical_topk(q, k, searched, block, 2, window).materialize()[0][:, rows] | recent
    ways = {"best keys": _best(weights, budget), "HiP": hip}
    ways["sinks and window"] = ((key < SINK) | (rows[:, None] - key < budget - SINK)).expand_as(weights)
    draw = torch.rand(
        weights.shape[0], (n // 2 + block - 1) // block, n // 2, generator=torch.Generator().manual_seed(layer)
    )
    blocks = draw.repeat_interleave(block, 1)[:, : len(rows)].repeat_interleave(2, 2)[..., :n]
    reachable = blocks.masked_fill(key >= (end - window)[:, None], -1.0)
    ways["random blocks and window"] = _best(reachable, searched) | recent
    rest = weights[..., SINK:].sum(-1).clamp(min=1e-12)
    return {
        label: (
            float((weights * seen_keys).sum(-1).mean()),
            float(((weights * seen_keys)[..., SINK:].sum(-1) / rest).mean()),
        )
        for label, seen_keys in ways.items()
    }


def _best(scores: Tensor, count: int) -> Tensor:
    """Bool like `scores`: the `count` largest of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, -1).indices, True)


def _search(pair: Tensor, budget: int, window: int) -> Selection:
    return hierarchical_topk(pair[0], pair[1], budget, 32, 2, window)


def _search_time(out: Outcome, scale: Scale) -> None:
    lengths, heads = scale.pick((4096, 8192, 16384), (256, 512)), scale.pick(4, 2)
    inputs = {n: torch.randn(2, 1, heads, n, 64, generator=torch.Generator().manual_seed(n)) for n in lengths}
    budget, window = scale.pick((512, 128), (32, 16))
    found = times(
        {f"{n} tokens": partial(_search, inputs[n], budget, window) for n in lengths},
        rounds=scale.pick(3, 1),
        inner=scale.pick(2, 1),
    )
    for n in lengths:
        base = None if n == lengths[0] else f"{lengths[0]} tokens"
        out.add(f"{n} tokens", "search time", "s", found[f"{n} tokens"], against=base)
    row = out.row(f"{lengths[-1]} tokens", "search time")
    first, last = (
        n * math.log2(n / budget) for n in (lengths[0], lengths[-1])
    )  # T log(T / budget): one step a halving
    grown = [ratio / (last / first) for ratio in row.ratios or []]
    out.check(
        f"growth of the search time from {lengths[0]} to {lengths[-1]} tokens, of that of T log T",
        sum(grown) / len(grown),
        at_most=1.2,
        spread=(max(grown) - min(grown)) / 2,
    )
