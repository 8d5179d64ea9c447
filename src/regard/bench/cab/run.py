"""Training every method on every task it can do; what is done is kept, and the report follows from what is kept."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._checks import bad_value, require, require_int, require_name
from ..._files import write_whole
from ...nn.sequence.pattern_attention import PATTERNS
from ..claims.claim import machine
from ..small_training import train
from .index import index_over
from .methods import METHODS
from .tasks import TASKS, PatternTask, Sizes

__all__ = ["indices", "rank_correlation", "run_tasks"]

Report = dict[str, Any]


def run_tasks(
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    steps: int = 200,
    sizes: Sizes | None = None,
    seeds: int = 1,
    lr: float = 3e-3,
    path: str | Path | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Train and measure; {"settings": ..., "machine": ..., "results": {task name: {method: {metric: [a value a seed]}}}}.

    methods: names of `METHODS` (default all); pairs that a method cannot do are left out. tasks: names of `TASKS`, or patterns
    (default all). Weights and data come from the seed alone: two methods see the same batches.
    path: a JSON file, rewritten after every training; one that is there with the same settings is gone on with.
    on_step: told (what is trained, which of, how many) when a training begins.
    """
    require_int("steps", steps, 1)
    require_int("seeds", seeds, 1)
    sizes = sizes or Sizes()
    names = list(METHODS) if methods is None else [require_name("methods", name, METHODS) for name in methods]
    settings = {"steps": steps, "lr": lr, "sizes": asdict(sizes)}
    report: Report = {"settings": settings, "machine": machine(), "results": {}}
    if path is not None and Path(path).exists():
        report = _earlier(Path(path), settings)
    wanted = [
        (task, name, seed)
        for task in _chosen(tasks)
        for name in names
        for seed in range(seeds)
        if task.pattern in METHODS[name].patterns
    ]
    for number, (task, name, seed) in enumerate(wanted):
        found = report["results"].setdefault(task.name, {}).setdefault(name, {})
        if all(len(found.get(metric, [])) > seed for metric in task.signs):
            continue
        if on_step is not None:
            on_step(f"{task.name}, {name}", number, len(wanted))
        for metric, value in _trained(task, name, seed, steps, sizes, lr).items():
            found.setdefault(metric, []).append(value)
        if path is not None:
            write_whole(path, json.dumps(report, indent=1) + "\n")
    return report


def _chosen(tasks: Sequence[str] | None) -> list[PatternTask]:
    if tasks is None:
        return list(TASKS.values())
    known = [*TASKS, *PATTERNS]
    for name in tasks:
        require_name("tasks", name, known)
    return [task for task in TASKS.values() if task.name in tasks or task.pattern in tasks]


def _earlier(path: Path, settings: dict[str, Any]) -> Report:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        same = report["settings"] == settings and isinstance(report["results"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise bad_value("path", str(path), "a file that this command wrote, or none") from error
    require(same, "path", str(path), f"a report with the same settings ({settings}), or another file")
    return report


def _trained(task: PatternTask, name: str, seed: int, steps: int, sizes: Sizes, lr: float) -> dict[str, float]:
    def layers(method: str) -> Callable[[bool, bool, int], nn.Module]:
        return partial(METHODS[method].layer, sizes.dim, sizes.num_heads)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.build(sizes, layers(name), layers("vanilla"))
        drawn = torch.Generator().manual_seed(seed)
        train(network.parameters(), lambda step: task.loss(network, sizes, drawn), steps, lr=lr)
        network.eval()
        with torch.no_grad():
            return task.measure(network, sizes)


def indices(report: Report) -> dict[str, dict[str, float]]:
    """Pattern -> method -> compositional index over the methods of this report (`index_over`); "none" does not count."""
    made: dict[str, dict[str, float]] = {}
    for pattern in PATTERNS:
        chosen = {
            task.task: task for task in TASKS.values() if task.pattern == pattern and task.name in report["results"]
        }
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for task in chosen.values():
            for method, values in report["results"][task.name].items():
                if method != "none" and all(map(math.isfinite, map(statistics.fmean, values.values()))):
                    means = {metric: statistics.fmean(found) for metric, found in values.items()}
                    scores.setdefault(method, {})[task.task] = means
        if scores:
            made[pattern] = index_over(scores, {task.task: task.signs for task in chosen.values()})
    return made


def rank_correlation(first: dict[str, float], second: dict[str, float]) -> float:
    """Spearman's, over the names that both have; NaN with fewer than three."""
    shared = [name for name in first if name in second]
    if len(shared) < 3:
        return math.nan
    ranks = [[sorted(values[n] for n in shared).index(values[name]) for name in shared] for values in (first, second)]
    return statistics.correlation(*ranks) if all(len(set(r)) > 1 for r in ranks) else math.nan
