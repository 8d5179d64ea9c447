"""The efficiency length of CAB: from which sequence length on a linear method costs less than vanilla attention.

CAB (Zhang et al. 2023, arXiv 2210.07661); code read for numbers: Shark-NLP/CAB @ 0e49696, `scripts/efficiency_length/`. What differs:
where theirs is negative or not a number, because the method is cheaper at every length, the length is 0; where vanilla's cost does
not curve upwards, it is infinite. Times are taken in turns with the baseline and the least of a round counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._checks import require, require_name
from ...ops.attention import attention
from ..claims.memory import peak_bytes
from ..claims.timing import times

__all__ = ["LENGTHS", "efficiency_length", "fit_efficiency_length"]

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)

Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def fit_efficiency_length(
    lengths: Sequence[int], cost: Sequence[float], baseline: Sequence[float], what: str = "time"
) -> float:
    """Length at which d n + e (fitted to `cost`) meets a n² + b n + c (fitted to `baseline`), by least squares.

    Where the two meet twice, the longer length. what: "time" leaves the shortest length out of the linear fit, as the authors do
    (launching work dominates there); "memory" uses all. Any unit, the same for both. Shorter is better; 0 always cheaper.
    """
    require_name("what", what, ("time", "memory"))
    require(len(lengths) >= 3, "lengths", lengths, "at least three")
    for name, values in (("cost", cost), ("baseline", baseline)):
        require(len(values) == len(lengths), name, f"{len(values)} values", f"{len(lengths)}, one a length")
    skip = 1 if what == "time" else 0
    scale = max(max(map(abs, baseline)), 1e-300)  # a better condition; the crossing does not change
    a, b, c = _fit(lengths, [value / scale for value in baseline], 2)
    d, e = _fit(lengths[skip:], [value / scale for value in cost[skip:]], 1)
    linear, constant = b - d, c - e
    inside = linear**2 - 4 * a * constant
    if a <= 0:
        return math.inf
    return 0.0 if inside < 0 else max(0.0, (-linear + math.sqrt(inside)) / (2 * a))


def _fit(lengths: Sequence[int], values: Sequence[float], degree: int) -> list[float]:
    """Coefficients of the least-squares polynomial, highest power first."""
    top = max(lengths)
    x = torch.tensor(lengths, dtype=torch.float64) / top
    powers = torch.stack([x**i for i in range(degree, -1, -1)], dim=1)
    found = torch.linalg.lstsq(powers, torch.tensor(values, dtype=torch.float64)[:, None]).solution[:, 0]
    return [float(found[i]) / top ** (degree - i) for i in range(degree + 1)]


def efficiency_length(
    op: Op,
    baseline: Op = attention,
    lengths: Sequence[int] = LENGTHS,
    device: str = "cpu",
    what: str = "time",
    *,
    batch: int = 1,
    num_heads: int = 8,
    head_dim: int = 64,
    rounds: int = 3,
    seed: int = 0,
    on_length: Callable[[int], None] | None = None,
) -> float:
    """Measure `op` and `baseline` (q, k, v) -> out at `lengths`, and fit: `fit_efficiency_length`. Infinite for the baseline itself.

    q, k, v: (batch, num_heads, length, head_dim) float32. what: "time" (seconds) or "memory" (peak bytes of tensors; on CUDA the
    allocator's peak). CAB measures batches of 4 with 8 heads of 64. on_length: told when a length begins.
    """
    if op is baseline:
        return math.inf
    require_name("what", what, ("time", "memory"))
    found: dict[str, list[float]] = {"op": [], "baseline": []}
    for length in lengths:
        if on_length is not None:
            on_length(length)
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, batch, num_heads, length, head_dim, generator=generator).to(device)
        works = {"op": partial(op, q, k, v), "baseline": partial(baseline, q, k, v)}
        for name, cost in _costs(works, what, device, rounds).items():
            found[name].append(cost)
    return fit_efficiency_length(lengths, found["op"], found["baseline"], what)


def _costs(works: Mapping[str, Callable[[], Any]], what: str, device: str, rounds: int) -> dict[str, float]:
    cuda = torch.device(device).type == "cuda"
    if what == "memory":
        return {name: float(_cuda_peak(work) if cuda else peak_bytes(work)) for name, work in works.items()}
    if cuda:
        works = {name: partial(_synchronised, work) for name, work in works.items()}
    return {name: min(values) for name, values in times(works, rounds=rounds, inner=1).items()}


def _synchronised(work: Callable[[], Any]) -> None:
    work()
    torch.cuda.synchronize()


@torch.no_grad()
def _cuda_peak(work: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before
