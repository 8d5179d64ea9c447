"""The compositional index of CAB: one number for a method on one attention pattern.

CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (Zhang et al. 2023, ICML, arXiv 2210.07661); code read for numbers:
Shark-NLP/CAB @ 0e49696, `scripts/compositional_index/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..._checks import bad_type, require, require_name

__all__ = ["PUBLISHED", "Metric", "compositional_index", "index_over", "task_scores"]


@dataclass(frozen=True)
class Metric:
    """A metric of a task: `mean` and `deviation` over the methods it is set against, `sign` -1 where less is better."""

    task: str
    name: str
    mean: float
    deviation: float
    sign: int


def _metrics(*rows: tuple[str, str, float, float, int]) -> tuple[Metric, ...]:
    return tuple(Metric(*row) for row in rows)


PUBLISHED: dict[str, tuple[Metric, ...]] = {
    "NS": _metrics(
        ("TTS", "FastSpeech 2 MCD", 3.4245, 0.06832, -1),
        ("TTS", "FastSpeech 2 MSD", 1.97429, 0.0361768, -1),
        ("TTS", "Transformer-TTS MCD", 4.06947, 0.09422, -1),
        ("TTS", "Transformer-TTS MSD", 2.19021, 0.03866, -1),
        ("Sum", "R-1", 34.88667, 1.39697, 1),
        ("Sum", "R-2", 6.79333, 1.41078, 1),
        ("Sum", "R-L", 31.96889, 1.31499, 1),
        ("SR", "PSNR", 23.208, 0.27499, 1),
        ("SR", "SSIM", 0.6758, 0.01557, 1),
        ("MLM", "PPL", 36.292, 62.30827, -1),
    ),
    "CS": _metrics(
        ("TTS", "MCD", 4.08325, 0.04529, -1),
        ("TTS", "MSD", 2.20085, 0.01372, -1),
        ("Sum", "R-1", 32.9575, 1.92754, 1),
        ("Sum", "R-2", 6.0925, 0.41007, 1),
        ("Sum", "R-L", 30.2575, 1.61951, 1),
        ("LM", "PPL", 22.26, 8.29944, -1),
    ),
    "NC": _metrics(
        ("PCC", "CD-l1", 7.7025, 0.64789, -1),
        ("PCC", "CD-l2", 0.24775, 0.03366, -1),
        ("PCC", "F-Score", 0.7625, 0.03906, 1),
        ("LSTF", "ETT MSE", 1.18933, 0.05615, -1),
        ("LSTF", "ETT MAE", 0.80625, 0.02193, -1),
        ("LSTF", "ECL MSE", 0.47575, 0.01057, -1),
        ("LSTF", "ECL MAE", 0.511, 0.00601, -1),
        ("LSTF", "Weather MSE", 0.62025, 0.18948, -1),
        ("LSTF", "Weather MAE", 0.58075, 0.10312, -1),
    ),
    "CC": _metrics(
        ("TTS", "MCD", 5.5037, 1.29239, -1),
        ("TTS", "MSD", 2.6278, 0.42726, -1),
        ("Sum", "R-1", 31.35, 3.77103, 1),
        ("Sum", "R-2", 5.26, 1.26028, 1),
        ("Sum", "R-L", 28.8, 3.28638, 1),
    ),
}
"""The metrics of each pattern in the authors' order, with means and deviations over the methods they published."""

Results = Mapping[str, Mapping[str, float]] | Sequence[float]


def task_scores(results: Results, metrics: Sequence[Metric]) -> dict[str, float]:
    """Task -> mean over its metrics of sign * (value - mean) / deviation.

    results: {task: {metric: value}}, or the values alone in the order of `metrics`. A task that is not there is left out (the method
    cannot do it); one that is there needs all its metrics.
    """
    if isinstance(results, Mapping):
        tasks = list(dict.fromkeys(metric.task for metric in metrics))
        for task in results:
            require_name("results", task, tasks)
        given = [metric for metric in metrics if metric.task in results]
        for metric in given:
            require_name(f"results[{metric.task!r}]", metric.name, results[metric.task])
        values = [results[metric.task][metric.name] for metric in given]
    elif isinstance(results, Sequence) and not isinstance(results, str):
        given, values = list(metrics), list(results)
        require(len(values) == len(given), "results", f"{len(values)} values", f"{len(given)} values, one a metric")
    else:
        raise bad_type("results", results, "{task: {metric: value}} or a sequence of values")
    require(bool(given), "results", results, "at least one task")
    scores: dict[str, list[float]] = {}
    for metric, value in zip(given, values):
        require(math.isfinite(value), f"results[{metric.task!r}][{metric.name!r}]", value, "a finite number")
        scores.setdefault(metric.task, []).append(metric.sign * (float(value) - metric.mean) / metric.deviation)
    return {task: sum(found) / len(found) for task, found in scores.items()}


def compositional_index(results: Results, pattern: str) -> float:
    """CI of a method on `pattern` ("NS", "CS", "NC", "CC") against the published methods: the mean over its tasks of `task_scores`.

    0 is the mean of the published methods, 1 one standard deviation better. For scores of reduced tasks, whose values cannot be set
    against the published ones, see `index_over`.

    >>> round(compositional_index([4.0953, 2.1985, 34.61, 6.35, 31.66], "CC"), 4)
    0.9569
    """
    scores = task_scores(results, PUBLISHED[require_name("pattern", pattern, PUBLISHED)])
    return sum(scores.values()) / len(scores)


def index_over(
    results: Mapping[str, Mapping[str, Mapping[str, float]]], signs: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """CI of several methods on one pattern with means and deviations over THEM: {method: {task: {metric: value}}} -> {method: CI}.

    signs: {task: {metric: 1 or -1}}. A task counts with the methods that did it; a metric in which all agree, or that one method alone
    has, scores 0. Methods without any task are left out.
    """
    metrics = []
    for task, named in signs.items():
        for name, sign in named.items():
            values = [float(done[task][name]) for done in results.values() if task in done]
            if not values:
                continue
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
            metrics.append(Metric(task, name, mean, deviation or 1.0, sign))
    scored = {method: task_scores(done, metrics) for method, done in results.items() if done}
    return {method: sum(scores.values()) / len(scores) for method, scores in scored.items()}
