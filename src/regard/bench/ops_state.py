"""How fast linear attention is beside dense attention, whether its time grows linearly, and what memory it takes.

All times of one table come from one run, dense and linear in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import require_int
from ..ops.state import alibi_slopes, linear_attention, linear_attention_backend

Row = dict[str, Any]
SCALING = (2048, 8192, 32768, 131072)


def measure_linear(
    seq_len: int = 8192,
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 7,
    scaling: tuple[int, ...] = SCALING,
    seed: int = 0,
) -> list[Row]:
    """Causal chunk linear attention, without decay and with ALiBi slopes as decay, beside dense causal SDPA.

    Three kinds of rows, told apart by "kind":
    - "speed": name, pass ("forward" or "forward+backward"), seq_len, seconds, dense_seconds (medians), and how many
      times faster than dense: ratio (median over the repeats), ratio_low, ratio_high (the spread); form, backend,
      chunk_size.
    - "scaling": name, pass, seq_len, seconds, and time_per_token, relative to the shortest length of the table, turn by turn
      (1.0 throughout = exactly linear), with its spread time_per_token_low, time_per_token_high. On Linux an output of more than
      32 MB is fresh pages from the kernel at every call, a shorter one is memory the process still has: about a tenth
      of the forward time that belongs to the allocator.
    - "memory": name, pass, seq_len, extra_bytes: the peak beyond inputs and results (outputs, and gradients), as
      allocated while running.
    """
    for name, value in (("seq_len", seq_len), ("repeats", repeats), ("num_heads", num_heads), ("head_dim", head_dim)):
        require_int(name, value, 1)
    shape = (batch, num_heads, seq_len, head_dim)
    dense = {what: _dense(shape, dtype, device, seed, what) for what in _PASSES}
    linear = {
        (name, what): _linear(shape, dtype, device, seed, what, decay) for name, decay in _VARIANTS for what in _PASSES
    }
    times = _interleaved({("dense", what): run for what, run in dense.items()} | linear, repeats, device)
    q = torch.empty(shape, dtype=dtype, device=device)
    choice = linear_attention_backend(q, q, q)
    rows: list[Row] = []
    for name, what in linear:
        ratios = [slow / fast for slow, fast in zip(times["dense", what], times[name, what])]
        rows.append(
            {
                "kind": "speed", "name": name, "pass": what, "seq_len": seq_len,
                "seconds": statistics.median(times[name, what]),
                "dense_seconds": statistics.median(times["dense", what]),
                "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
                **choice._asdict(),
            }
        )  # fmt: skip
    del dense, linear
    rows += _scaling((batch, num_heads, head_dim), scaling, dtype, device, repeats, seed)
    ends = tuple(dict.fromkeys((scaling[0], scaling[-1])))  # memory that is equal at both ends is constant
    return rows + _memory((batch, num_heads, head_dim), ends, dtype, device, seed)


_PASSES = ("forward", "forward+backward")
_VARIANTS = (("linear, no decay", False), ("linear, decay per head", True))


def _scaling(
    sizes: tuple[int, int, int], lengths: tuple[int, ...], dtype: torch.dtype, device: str, repeats: int, seed: int
) -> list[Row]:
    rows: list[Row] = []
    batch, heads, dim = sizes
    for what in _PASSES:
        runs = {n: _linear((batch, heads, n, dim), dtype, device, seed, what, True) for n in lengths}
        times = _interleaved(runs, repeats, device)
        shortest = [t / lengths[0] for t in times[lengths[0]]]
        for n in lengths:
            growth = [t / n / base for t, base in zip(times[n], shortest)]
            rows.append(
                {
                    "kind": "scaling", "name": "linear, decay per head", "pass": what, "seq_len": n,
                    "seconds": statistics.median(times[n]), "time_per_token": statistics.median(growth),
                    "time_per_token_low": min(growth), "time_per_token_high": max(growth),
                }
            )  # fmt: skip
    return rows


def _memory(
    sizes: tuple[int, int, int], lengths: tuple[int, ...], dtype: torch.dtype, device: str, seed: int
) -> list[Row]:
    batch, heads, dim = sizes
    rows: list[Row] = []
    for what in _PASSES:
        for n in lengths:
            run = _linear((batch, heads, n, dim), dtype, device, seed, what, True)
            run()
            peak, kept = _peak_bytes(run, device)
            row = {"kind": "memory", "name": "linear, decay per head", "pass": what, "seq_len": n}
            rows.append(row | {"extra_bytes": peak - kept})
    return rows


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(4))


def _step(inputs: tuple[Tensor, ...], what: str, op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    q, k, v, grad = inputs
    if what == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return op(q, k, v)

        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Any, ...]:
        out = op(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, grad)

    return both


def _dense(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, what: str) -> Callable[[], Any]:
    op = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    return _step(_inputs(shape, dtype, device, seed), what, op)


def _linear(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, what: str, decay: bool
) -> Callable[[], Any]:
    log_decay = -alibi_slopes(shape[1]).to(device) if decay else None

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = linear_attention(q, k, v, log_decay=log_decay, form="chunk")
        assert isinstance(out, Tensor)
        return out

    return _step(_inputs(shape, dtype, device, seed), what, op)


def _interleaved(runs: dict[Any, Callable[[], Any]], repeats: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each run, `repeats` times, all runs in turn after one warm-up each."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for turn in range(repeats + 1):
        for key, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                times[key].append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _peak_bytes(run: Callable[[], Any], device: str) -> tuple[int, int]:
    """(highest, still held by the results) bytes that a run allocates, by the allocator's own record."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del results
        return peak, kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = run()
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del results
    return peak, held
