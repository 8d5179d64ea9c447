"""Timing several things in one run, so that whatever else the machine does meets them all; and what the machine is."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from .._checks import require_int

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """A ratio taken round by round: its median, and the least and the largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: list[float], below: list[float], factor: float = 1.0) -> Ratio:
        """`factor * above / below`, pair by pair."""
        values = [factor * a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(values), min(values), max(values))

    @property
    def spread(self) -> float:
        """Half the range, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else float("nan")


def interleaved(
    runs: Mapping[Key, Callable[[], Any]],
    rounds: int,
    *,
    device: str = "cpu",
    calls: int = 8,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[Key, list[float]]:
    """Seconds of each run, one value a round.

    In each round all runs come in turn. A run that is shorter than the longest is called several times in its turn (at most `calls`),
    for about as long, and its value is the mean: so a busy machine weighs on all of them alike. Ratios are to be taken round by round.
    """
    require_int("rounds", rounds, 1)
    require_int("calls", calls, 1)
    say = progress or (lambda text: None)
    first: dict[Key, float] = {}
    for key, run in runs.items():
        say(f"warm-up: {_name(key)}")
        for _ in range(max(1, warmup)):
            first[key] = _seconds(run, 1, device)
    longest = max(first.values(), default=0.0)
    found: dict[Key, list[float]] = {key: [] for key in runs}
    for number in range(rounds):
        for key, run in runs.items():
            say(f"round {number + 1} of {rounds}: {_name(key)}")
            found[key].append(_seconds(run, min(calls, max(1, round(longest / max(first[key], 1e-9)))), device))
    return found


def wait(device: str) -> None:
    """Until everything sent to the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> tuple[int, int]:
    """(highest, still held by the results) bytes that a run allocates, by the allocator's own record."""
    gc.collect()
    if device.startswith("cuda"):
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = run()
        wait(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        kept = torch.cuda.memory_allocated(device) - before
        del results
        return peak, kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = run()
    held = peak = 0
    recorded = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in recorded if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del results
    return peak, held


def machine(device: str = "cpu") -> dict[str, str]:
    """What figures were measured on, and how busy it was."""
    from .. import __version__

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": load,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "regard": __version__,
        "system": platform.platform(terse=True),
    }


def _seconds(run: Callable[[], Any], calls: int, device: str) -> float:
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return (time.perf_counter() - began) / calls


def _name(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
