"""079 FuseMax: one pass over the keys instead of three, what it keeps and moves, and what that is worth on its accelerator."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...ops.cascades import CASCADES, attention_cascade
from ...ops.einsum_cascade import count_passes
from ..einsum_cost import AttentionShape, einsum_cost
from .claim import Outcome, Scale
from .timing import slope, times

PAPER, SLUG = "079", "fusemax"
SAYS = (
    "FuseMax: attention needs one pass over the keys with on-chip state that does not grow with them, where FLAT needs three; on its "
    "accelerator that makes attention 6.7 times as fast as FLAT on average."
)
MODELS = {"BERT": (12, 64), "TrXL": (16, 64), "T5": (8, 64), "XLM": (16, 128)}
"""Heads and head dims, batch 64, as in the paper."""


def measure(scale: Scale) -> Outcome:
    out = Outcome("cascades executed on the CPU; cost model of a 256x256 array, batch 64, 1k to 1M tokens", "a model")
    _passes(out, scale)
    _accelerator(out)
    _time(out, scale)
    _precision(out, scale)
    return out


def _passes(out: Outcome, scale: Scale) -> None:
    lengths = scale.pick((1024, 2048, 4096), (64, 128, 256))
    tile = scale.pick(64, 16)
    wrong = 0
    for name, cascade in CASCADES.items():
        found, kept = set(), []
        for length in lengths:
            q, k, v = (torch.randn(n, 16) for n in (8, length, length))
            traced = attention_cascade(q, k, v, cascade=cascade, tile=tile, return_trace=True)
            assert isinstance(traced, tuple)
            trace = traced[1]
            found.add(trace.passes)
            kept.append(trace.kept_peak / 8)
        wrong += found != {count_passes(cascade)}
        out.add(name, "passes over the keys, counted while it ran", "", [float(max(found))])
        out.add(name, "numbers kept a query between tiles", "", kept)
        if name in ("1-pass", "3-pass"):
            power = slope(list(lengths), kept)
            what = f"{name}: what is kept a query grows with the keys to the power"
            if name == "1-pass":
                out.check(what, power, at_most=0.01)
            else:
                out.check(what, power, at_least=0.95)
    out.check("cascades whose counted passes are not those found by their dependencies", wrong, at_most=0)


def _accelerator(out: Outcome) -> None:
    """Latencies by the cost model, which is the artifact's; for FLAT up to 64k tokens, where it only computes."""
    lengths = [2**power for power in (10, 12, 14, 16)]
    ratios = []
    for name, (heads, dim) in MODELS.items():
        shapes = [AttentionShape(n, n, dim, dim, 64, heads) for n in lengths]
        flat, fuse = ([einsum_cost(shape, way).latency for shape in shapes] for way in ("flat", "fusemax"))
        out.add(f"FLAT, {name}", "latency at 1k, 4k, 16k, 64k tokens", "s", flat)
        out.add(f"FuseMax, {name}", "latency at 1k, 4k, 16k, 64k tokens", "s", fuse, against=f"FLAT, {name}")
        ratios += [a / b for a, b in zip(flat, fuse)]
    spread = (max(ratios) - min(ratios)) / 2
    out.check(
        "times as fast as FLAT by the cost model", sum(ratios) / len(ratios), at_least=6.0, spread=spread, digits=1
    )


def _time(out: Outcome, scale: Scale) -> None:
    """The same cascades on this CPU, tile by tile."""
    queries, keys, tile = scale.pick((1024, 32768, 512), (16, 256, 64))
    q, k, v = (torch.randn(2, n, 64) for n in (queries, keys, keys))
    ways = {f"{passes}-pass": partial(attention_cascade, q, k, v, passes=passes, tile=tile) for passes in (3, 2, 1)}
    found = times(ways, rounds=scale.pick(3, 2), inner=scale.pick(2, 1))
    figure = f"time on this CPU, {queries} queries, {keys} keys"
    for name in ways:
        out.add(name, figure, "s", found[name], against=None if name == "3-pass" else "3-pass")
    ratios = [a / b for a, b in zip(found["3-pass"], found["1-pass"])]
    spread = (max(ratios) - min(ratios)) / 2
    out.check("times as fast as three passes on this CPU", sum(ratios) / len(ratios), at_least=1.1, spread=spread)


def _precision(out: Outcome, scale: Scale) -> None:
    """Errors in half precision against float64."""
    n = scale.pick(2048, 128)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (factor * torch.randn(4, length, 64, generator=generator) for factor, length in ((2, 64), (1, n), (1, n)))
    exact = attention_cascade(*(x.half().double() for x in (q, k, v)), passes=3, tile=n)
    assert isinstance(exact, Tensor)
    errors = {}
    for passes in (3, 2, 1):
        half = attention_cascade(*(x.half() for x in (q, k, v)), passes=passes, tile=64)
        assert isinstance(half, Tensor)
        errors[passes] = float((half.double() - exact).norm() / exact.norm())
        out.add(
            f"{passes}-pass", "relative error in float16", "", errors[passes], against=None if passes == 3 else "3-pass"
        )
    out.check("error of one pass in float16, of that of three", errors[1] / errors[3], at_most=1.5)
