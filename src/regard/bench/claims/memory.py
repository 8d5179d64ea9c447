"""Peak memory of a piece of work, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once that `work()` allocated on the CPU, its result included; from the allocator's own record."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    alive = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    del kept
    return most
