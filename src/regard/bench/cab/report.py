"""Figures of the methods that need no training: what they can do, whether they leak, and from which length on they are faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..claims.timing import times
from .causality import causality_test
from .efficiency import fit_efficiency_length
from .methods import METHODS

__all__ = ["MethodRow", "layer_lengths", "method_rows"]

_DIM, _HEADS = 128, 4


@dataclass(frozen=True)
class MethodRow:
    """name; pattern -> "✓", "leaks" or ""; efficiency length as text."""

    name: str
    patterns: dict[str, str]
    efficiency: str


def method_rows(methods: Sequence[str], lengths: bool = True, quick: bool = False) -> list[MethodRow]:
    """One row a method. lengths: measure efficiency lengths (self-attention, non-causal where it can)."""
    found = layer_lengths(methods, (64, 128, 256) if quick else (256, 512, 1024, 2048)) if lengths else {}
    rows = []
    for name in methods:
        method = METHODS[name]
        marks = {}
        for causal in (False, True):
            for cross in (False, True):
                pattern = ("C" if causal else "N") + ("C" if cross else "S")
                marks[pattern] = ""
                if pattern in method.patterns:
                    torch.manual_seed(0)
                    layer = method.layer(32, 2, causal, cross, 64)
                    marks[pattern] = "✓" if not causal or causality_test(layer, pattern=pattern) else "leaks"
        length = found.get(name, math.nan)
        text = "−" if math.isnan(length) else "∞" if math.isinf(length) else f"{length:.0f}"
        rows.append(MethodRow(name, marks, text))
    return rows


@torch.no_grad()
def layer_lengths(methods: Sequence[str], lengths: Sequence[int], rounds: int = 3, batch: int = 1) -> dict[str, float]:
    """Efficiency length in time of each method's layer (128 wide, 4 heads, eval mode) against vanilla's; vanilla itself: infinite.

    All layers are timed in turns at each length. Methods without self-attention are left out.
    """
    able = [name for name in methods if METHODS[name].patterns & {"NS", "CS"} and name != "none"]
    costs: dict[str, list[float]] = {name: [] for name in dict.fromkeys(["vanilla", *able])}
    for length in lengths:
        x = torch.randn(batch, length, _DIM, generator=torch.Generator().manual_seed(length))
        works = {}
        for name in costs:
            layer = METHODS[name].layer(_DIM, _HEADS, "NS" not in METHODS[name].patterns, False, length).eval()
            works[name] = partial(layer, x)
        for name, values in times(works, rounds=rounds, inner=1).items():
            costs[name].append(min(values))
    return {
        name: math.inf if name == "vanilla" else fit_efficiency_length(lengths, costs[name], costs["vanilla"])
        for name in costs
        if name in able
    }
