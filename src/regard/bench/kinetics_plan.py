"""The Kinetics scaling law as a planner: given models, a task and a cost, how long to think, how often to try, how sparsely to attend."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._checks import bad_value, require, require_fraction, require_int
from .cost import ModelShape
from .kinetics import B200_INTENSITY, Point, Run, Sparsity, at_cost, frontier, long_cot

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TRIALS = (1, 2, 4, 8, 16, 32)
SPARSITIES = (
    Sparsity(),
    *(Sparsity(topk, recent=64, block_size=16) for topk in (4, 12, 28, 60, 124)),
)
"""Dense, and blocks of 16 keys with 64 recent ones: 128, 256, 512, 1024 and 2048 keys in all."""


@dataclass(frozen=True)
class TaskCurve:
    """How accuracy grows on a task, for one model: a saturating curve, to be fitted to a few runs of one's own.

    One trial of D tokens that reads B keys a token is right with probability `ceiling (1 - e^(-D / tokens)) (1 - e^(-B / keys))`.
    Questions differ: that is the mean of a beta distribution over questions, with pseudo-count `spread`, so that further trials help
    less than if all questions were alike (`spread` infinite).

    Attributes:
        ceiling: what one long dense trial reaches, in [0, 1]. tokens: the scale of the length, > 0.
        keys: the scale of the keys a sparse decoder needs; 0: sparsity costs nothing. spread: > 0.
    """

    ceiling: float
    tokens: float
    keys: float = 0.0
    spread: float = math.inf

    def __post_init__(self) -> None:
        require_fraction("ceiling", self.ceiling)
        require(self.tokens > 0, "tokens", self.tokens, "a number > 0")
        require(self.keys >= 0, "keys", self.keys, "a number >= 0")
        require(self.spread > 0, "spread", self.spread, "a number > 0")

    def accuracy(self, generated: int, budget: int | None = None, trials: int = 1) -> float:
        """The chance that one of `trials` answers of `generated` tokens is right; `budget`: keys read a token (None: all)."""
        require_int("trials", trials, 1)
        mean = self.ceiling * -math.expm1(-generated / self.tokens)
        if budget is not None and self.keys:
            mean *= -math.expm1(-budget / self.keys)
        if mean <= 0.0 or mean >= 1.0:
            return float(mean > 0)
        if math.isinf(self.spread):
            return -math.expm1(trials * math.log1p(-mean))
        wrong = (1 - mean) * self.spread
        missed = math.fsum(math.log((wrong + i) / (self.spread + i)) for i in range(trials))
        return -math.expm1(missed)

    @classmethod
    def fit(cls, dense: Run, sparse: Iterable[Run] = (), budgets: Sequence[int] = LENGTHS) -> TaskCurve:
        """Least squares on runs of one model: lengths from the dense run, keys from the sparse ones, spread from repeated questions."""
        points = [(p.generated or 0, p.accuracy) for p in long_cot(dense, budgets)]
        require(
            any(a > 0 for _, a in points), "dense", "no right answer within the budgets", "a run with right answers"
        )
        grid = [2.0 ** (e / 8) for e in range(8 * 18)]
        ceiling, tokens = min(
            ((_scale(points, t), t) for t in grid),
            key=lambda ct: sum((a - ct[0] * -math.expm1(-d / ct[1])) ** 2 for d, a in points),
        )
        curve = cls(ceiling, tokens, 0.0, _spread(dense))
        found = [(run.sparsity.budget, long_cot(run, budgets)) for run in sparse if run.sparsity.budget is not None]
        if not found:
            return curve

        def error(keys: float) -> float:
            trial = cls(ceiling, tokens, keys, curve.spread)
            gaps = [p.accuracy - trial.accuracy(p.generated or 0, b) for b, many in found for p in many]
            return sum(gap**2 for gap in gaps)

        return cls(ceiling, tokens, min([0.0, *grid], key=error), curve.spread)


def _scale(points: list[tuple[int, float]], tokens: float) -> float:
    shape = [(-math.expm1(-d / tokens), a) for d, a in points]
    below = sum(s * s for s, _ in shape)
    return min(1.0, max(0.0, sum(s * a for s, a in shape) / below)) if below else 0.0


def _spread(run: Run) -> float:
    """Pseudo-count of the beta distribution whose variance over questions is the observed one, less what few trials make of it."""
    shares = [(sum(q.scores) / len(q.scores), len(q.scores)) for q in run.questions]
    mean = sum(s for s, _ in shares) / len(shares)
    few = sum(1 / n for _, n in shares) / len(shares)
    if mean in (0.0, 1.0) or few == 1.0:
        return math.inf
    observed = sum((s - mean) ** 2 for s, _ in shares) / len(shares)
    variance = (observed - mean * (1 - mean) * few) / (1 - few)
    if variance <= 0:
        return math.inf
    return max(1e-3, mean * (1 - mean) / variance - 1)


@dataclass(frozen=True)
class Plan:
    """What to do with a cost budget, and what else there is.

    Attributes:
        budget: 1e12 eFLOPs a question. best: the most accurate way within it. dense: the most accurate dense one. Both None when
            nothing is that cheap. front, dense_front: the best accuracy for every cost.
    """

    budget: float
    best: Point | None
    dense: Point | None
    front: list[Point]
    dense_front: list[Point]

    def table(self, rows: int = 12) -> Table:
        """The frontier for the screen, beside what dense decoding reaches at the same cost."""
        from rich import box
        from rich.table import Table

        made = Table(title="the most accurate way for each cost", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("PeFLOP", "accuracy", "model", "tokens", "trials", "attention", "dense at that cost"):
            made.add_column(name, justify="left" if name in ("model", "attention") else "right", no_wrap=True)
        step = max(1, math.ceil(len(self.front) / rows))
        for point in self.front[::step]:
            other = at_cost(self.dense_front, point.total)
            made.add_row(
                f"{point.total / 1e3:.3g}",
                f"{point.accuracy:.3f}",
                point.model,
                str(point.generated),
                str(point.trials),
                point.sparsity,
                "—" if other is None else f"{other.accuracy:.3f} ({other.model}, {other.generated} x {other.trials})",
                style="bold" if point == self.best else "",
            )
        return made


def plan(
    models: Sequence[tuple[ModelShape, TaskCurve]],
    budget: float,
    *,
    context: int = 512,
    lengths: Sequence[int] = LENGTHS,
    trials: Sequence[int] = TRIALS,
    sparsities: Sequence[Sparsity] = SPARSITIES,
    intensity: float = B200_INTENSITY,
) -> Plan:
    """How long, how many samples and how sparse: the most accurate way to spend `budget` on a question.

    Args:
        models: each with its curve on the task. budget: 1e12 eFLOPs. context: tokens of the question. lengths, trials,
            sparsities: what may be chosen. intensity: FLOPs a byte of the device (`Device.intensity`; 562.5 as in the paper).
    """
    require(budget > 0, "budget", budget, "1e12 eFLOPs > 0")
    if not (models and lengths and trials and sparsities):
        raise bad_value("models, lengths, trials, sparsities", "an empty one", "at least one of each")
    points = []
    for model, curve in models:
        for sparsity in sparsities:
            for generated in lengths:
                for n in trials:
                    options: dict[str, Any] = {"model": model, "context": context, "generated": generated, "trials": n}
                    cost = sparsity.cost(**options, intensity=intensity, variant="paper")
                    right = curve.accuracy(generated, sparsity.budget, n)
                    points.append(Point(right, cost, model.name, str(sparsity), n, generated))
    dense = [point for point in points if point.sparsity == "dense"]
    return Plan(budget, at_cost(points, budget), at_cost(dense, budget), frontier(points), frontier(dense))


def picture(fronts: dict[str, Sequence[Point]], points: Iterable[Point] = ()) -> Any:
    """Accuracy against cost, a line a front: a matplotlib `Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    points = list(points)
    axis.scatter([p.total for p in points], [p.accuracy for p in points], s=6, color="0.8", zorder=1)
    for name, front in fronts.items():
        axis.plot(
            [p.total for p in front],
            [p.accuracy for p in front],
            marker="o",
            markersize=3,
            drawstyle="steps-post",
            label=name,
        )
    axis.set(xscale="log", xlabel="cost, 1e12 eFLOPs a question", ylabel="accuracy")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def png(fronts: dict[str, Sequence[Point]], points: Iterable[Point] = ()) -> bytes:
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    picture(fronts, points).savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
