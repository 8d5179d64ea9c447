"""Wall-clock times of several things in one run, taken in turns, so that whatever else the machine does meets them all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..._checks import require_int


@torch.no_grad()
def times(
    things: Mapping[str, Callable[[], Any]], rounds: int = 5, inner: int = 3, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds per call, `rounds` values for each thing.

    In every round each thing is called `inner` times, in turns (a b c, a b c, ...), and the round's value is the least of its
    times: other work on the machine only ever adds. Ratios are to be taken round by round.
    """
    require_int("rounds", rounds, 1)
    require_int("inner", inner, 1)
    for thing in things.values():
        for _ in range(warmup):
            thing()
    found: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        best = dict.fromkeys(things, math.inf)
        for _ in range(inner):
            for name, thing in things.items():
                began = time.perf_counter()
                thing()
                best[name] = min(best[name], time.perf_counter() - began)
        for name in things:
            found[name].append(best[name])
    return found


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Exponent p of the least-squares fit seconds = c * length^p: 1 is linear, 2 quadratic."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(value) for value in seconds]).slope
