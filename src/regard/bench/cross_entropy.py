"""The cross-entropy method: a search that draws candidates, keeps the best, and draws the next ones near them.

As "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI" (2024, arXiv 2410.18441) uses it for
hyper-parameters (of word2vec); no code, so 50 samples, the best tenth and smoothing 0.7 are ours (de Boer et al. 2005 recommend the like).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._checks import bad_value, require, require_int

__all__ = ["SearchResult", "cross_entropy_search"]


@dataclass
class SearchResult:
    """`best` candidate and its `value`; `history`: the best value of each round; `evaluations`: calls of the function."""

    best: dict[str, Any]
    value: float
    history: list[float] = field(default_factory=list)
    evaluations: int = 0


class _Range:
    """A number between two bounds, from a normal distribution that is cut off there; `log`: its logarithm is."""

    def __init__(self, name: str, low: float, high: float, log: bool) -> None:
        require(low < high, name, (low, high), "bounds (low, high), low < high")
        require(not log or low > 0, name, (low, high), "bounds > 0 for a logarithmic range")
        self.log, self.whole = log, isinstance(low, int) and isinstance(high, int)
        self.low, self.high = (math.log(low), math.log(high)) if log else (float(low), float(high))
        self.mean, self.deviation = (self.low + self.high) / 2, (self.high - self.low) / 2

    def draw(self, rng: np.random.Generator) -> float:
        return float(np.clip(rng.normal(self.mean, self.deviation), self.low, self.high))

    def value(self, drawn: float) -> float | int:
        plain = math.exp(drawn) if self.log else drawn
        return round(plain) if self.whole else plain

    def refit(self, elite: list[float], smoothing: float) -> None:
        self.mean = smoothing * float(np.mean(elite)) + (1 - smoothing) * self.mean
        self.deviation = smoothing * float(np.std(elite)) + (1 - smoothing) * self.deviation


class _Choice:
    """One of several things, each with its probability."""

    def __init__(self, name: str, options: Sequence[Any]) -> None:
        require(len(options) > 0, name, options, "at least one option")
        self.options, self.shares = list(options), np.full(len(options), 1 / len(options))

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.choice(len(self.options), p=self.shares))

    def value(self, drawn: int) -> Any:
        return self.options[drawn]

    def refit(self, elite: list[int], smoothing: float) -> None:
        found = np.bincount(elite, minlength=len(self.options)) / len(elite)
        self.shares = smoothing * found + (1 - smoothing) * self.shares


def cross_entropy_search(
    function: Callable[[dict[str, Any]], float],
    space: Mapping[str, Any],
    *,
    samples: int = 50,
    elite: float = 0.1,
    smoothing: float = 0.7,
    rounds: int = 20,
    maximize: bool = True,
    seed: int = 0,
) -> SearchResult:
    """Search `space` for what makes `function` largest (or smallest).

    Args:
        function: candidate (name -> value) to a number; NaN counts as worst.
        space: name -> (low, high), whole numbers where both bounds are ints; ("log", low, high); or a list of options.
        samples: candidates a round. elite: share of them that the next round's distribution is fitted to (at least one).
        smoothing: share of the new fit, the rest stays of the old. rounds: of drawing and fitting. seed: of the draws.
    """
    require_int("samples", samples, 1)
    require_int("rounds", rounds, 1)
    require(0 < elite <= 1, "elite", elite, "a share in (0, 1]")
    require(0 < smoothing <= 1, "smoothing", smoothing, "a share in (0, 1]")
    axes = {name: _axis(name, given) for name, given in space.items()}
    require(bool(axes), "space", space, "at least one name")
    rng = np.random.default_rng(seed)
    sign, kept = (1.0 if maximize else -1.0), max(1, round(elite * samples))
    result = SearchResult({}, -math.inf)
    for _ in range(rounds):
        drawn = [{name: axis.draw(rng) for name, axis in axes.items()} for _ in range(samples)]
        values = []
        for candidate in drawn:
            plain = {name: axis.value(candidate[name]) for name, axis in axes.items()}
            value = sign * float(function(plain))
            values.append(-math.inf if math.isnan(value) else value)
            if values[-1] > result.value or not result.best:
                result.best, result.value = plain, values[-1]
        order = sorted(range(samples), key=lambda i: -values[i])[:kept]
        for name, axis in axes.items():
            axis.refit([drawn[i][name] for i in order], smoothing)
        result.history.append(sign * max(values))
        result.evaluations += samples
    result.value *= sign
    return result


def _axis(name: str, given: Any) -> Any:
    if isinstance(given, list):
        return _Choice(name, given)
    if isinstance(given, tuple) and len(given) in (2, 3) and (len(given) == 2 or given[0] == "log"):
        bounds = given[-2:]
        if all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in bounds):
            return _Range(name, bounds[0], bounds[1], len(given) == 3)
    raise bad_value(name, given, "(low, high), ('log', low, high) or a list of options")
