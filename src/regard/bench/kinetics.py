"""Kinetics, Sadhukhan et al., "Kinetics: Rethinking Test-Time Scaling Laws" (2025, arXiv 2506.05333).
Code read for numbers: Infini-AI-Lab/Kinetics @ af7fa57 (no licence; `cost_model/`).

What an answer costs when attention is counted too: FLOPs, and bytes of the cache as the FLOPs that could have been done meanwhile
("eFLOPs"). Then which accuracy a cost buys over models, generation lengths, trials and sparsity: `best_of_n`, `long_cot`, `frontier`;
and, for a task curve, how long, how many samples and how sparse: `kinetics_plan.plan`. Costs are in units of 1e12.

The authors' cost of top-k with a free selection adds half the square of the budget beyond the prompt where the keys that do not exist
have to be taken off (their block version does that): `variant="released"` keeps the plus sign, `"paper"` has the minus.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import bad_value, require, require_int, require_name
from .cost import MODELS, ModelShape

B200_INTENSITY = 562.5
"""FLOPs in the time of a byte on the paper's device."""


class EFlops(NamedTuple):
    """Compute, and memory traffic times the arithmetic intensity, both in 1e12 FLOPs."""

    compute: float
    memory: float

    @property
    def total(self) -> float:
        return self.compute + self.memory


def dense_cost(
    model: ModelShape, context: int, generated: int, trials: int = 1, *, intensity: float = B200_INTENSITY
) -> EFlops:
    """Dense attention. The trials share the prompt's cache; reading the parameters is left out (a large batch shares it).

    Args:
        context: tokens of the prompt. generated: tokens of an answer. trials: answers. intensity: FLOPs a byte of the device.
    """
    _check(context, generated, trials)
    width = model.head_dim * model.num_layers
    compute = 2 * model.params * generated + 2 * (2 * context + generated) * generated * model.num_heads * width
    memory = 2 * (2 * context + generated * trials) * generated * model.num_kv_heads * width
    return EFlops(compute * trials * 1e-12, memory * intensity * 1e-12)


def topk_cost(
    model: ModelShape,
    context: int,
    generated: int,
    trials: int = 1,
    *,
    budget: int,
    intensity: float = B200_INTENSITY,
    variant: str = "released",
) -> EFlops:
    """Every token reads `budget` keys whose choice costs nothing: what the best selection could reach. Trials share nothing.

    Args:
        variant: "released" adds half of (budget - context)^2 where the budget exceeds the prompt, as the authors' code does;
            "paper" takes it off, so that a budget of the whole context is dense attention.
    """
    _check(context, generated, trials)
    require_int("budget", budget, 0)
    require_name("variant", variant, ("released", "paper"))
    if variant == "paper":
        read = _keys_read(context, generated, budget)
    else:
        read = budget * generated + 0.5 * max(0, budget - context) ** 2
    width = model.head_dim * model.num_layers
    compute = 2 * model.params * generated + 4 * read * model.num_heads * width
    memory = 4 * read * model.num_kv_heads * width
    return EFlops(compute * trials * 1e-12, memory * trials * intensity * 1e-12)


def block_topk_cost(
    model: ModelShape,
    context: int,
    generated: int,
    trials: int = 1,
    *,
    recent: int,
    block_size: int,
    topk: int,
    intensity: float = B200_INTENSITY,
    variant: str = "released",
) -> EFlops:
    """Every token reads `recent` last keys and the `topk` blocks of `block_size` keys whose summaries score best; scoring is counted.

    Args:
        variant: "released": the budget beyond the prompt is taken off in full, also where an answer ends before it is reached;
            "paper": exactly the keys that there are (equal while budget <= context + generated).
    """
    _check(context, generated, trials)
    for name, value, least in (("recent", recent, 0), ("block_size", block_size, 1), ("topk", topk, 0)):
        require_int(name, value, least)
    require_name("variant", variant, ("released", "paper"))
    budget = recent + block_size * topk
    if variant == "paper":
        read = _keys_read(context, generated, budget)
    else:
        read = budget * generated - 0.5 * max(0, budget - context) ** 2
    width = model.head_dim * model.num_layers
    search = (2 * context + generated) // block_size * generated * model.num_heads * width
    compute = 2 * model.params * generated + 4 * read * model.num_heads * width + search
    search_memory = (2 * context + generated * trials) // block_size * generated * model.num_kv_heads * width
    memory = 4 * read * model.num_kv_heads * width * trials + search_memory
    return EFlops(compute * trials * 1e-12, memory * intensity * 1e-12)


def _keys_read(context: int, generated: int, budget: int) -> float:
    """The sum over an answer of min(budget, context + t), t as a continuous quantity (as in the dense cost)."""
    growing = min(generated, max(0, budget - context))
    return (
        context * growing + 0.5 * growing**2 + budget * (generated - growing)
        if budget > context
        else budget * generated
    )


def _check(context: int, generated: int, trials: int) -> None:
    for name, value, least in (("context", context, 0), ("generated", generated, 0), ("trials", trials, 1)):
        require_int(name, value, least)


def expected_cost(cost: Callable[..., EFlops], lengths: Sequence[int], trials: int = 1, **options: Any) -> EFlops:
    """The mean of `cost(generated=length, trials=trials, **options)` over the lengths that answers had."""
    require(len(lengths) > 0, "lengths", list(lengths), "at least one generation length")
    found = [cost(generated=length, trials=trials, **options) for length in lengths]
    return EFlops(statistics.fmean(f.compute for f in found), statistics.fmean(f.memory for f in found))


def attention_share(cost: EFlops, model: ModelShape, generated: int, trials: int = 1) -> float:
    """Share of a cost that is attention: all but the products with parameters."""
    return 1.0 - 2 * model.params * generated * trials * 1e-12 / cost.total


def pass_at_n(correct: int, total: int, n: int) -> float:
    """The chance that at least one of `n` answers, drawn without replacement from `total` of which `correct` are right, is right."""
    require_int("total", total, 1)
    require_int("correct", correct, 0)
    require(correct <= total, "correct", correct, f"at most total = {total}")
    require_int("n", n, 0)
    require(n <= total, "n", n, f"at most total = {total}")
    return 1.0 - math.comb(total - correct, n) / math.comb(total, n)


def coverage(scores: Sequence[float], trials: Sequence[int]) -> list[float]:
    """`pass_at_n` for each number of trials, from the 0 / 1 scores of one question's answers."""
    return [pass_at_n(int(sum(scores)), len(scores), n) for n in trials]


@dataclass(frozen=True)
class Sparsity:
    """How answers were decoded: dense (`budget` None), top-k (`block_size` 1) or block top-k, `recent` last keys on top.

    Attributes:
        topk: keys (block_size 1) or blocks that are chosen. None: no choice (dense; with `recent` alone: a window).
    """

    topk: int | None = None
    recent: int = 0
    block_size: int = 1

    @property
    def budget(self) -> int | None:
        """Keys a token reads; None: all."""
        return None if self.topk is None and not self.recent else (self.topk or 0) * self.block_size + self.recent

    def cost(self, **options: Any) -> EFlops:
        """The cost of an answer decoded so; options as in `dense_cost`, and `variant`."""
        if self.budget is None:
            options.pop("variant", None)
            return dense_cost(**options)
        if self.block_size == 1:
            return topk_cost(**options, budget=self.budget)
        return block_topk_cost(**options, recent=self.recent, block_size=self.block_size, topk=self.topk or 0)

    def __str__(self) -> str:
        if self.budget is None:
            return "dense"
        return (
            f"top-{self.budget}" if self.block_size == 1 else f"{self.topk} blocks of {self.block_size} + {self.recent}"
        )


@dataclass(frozen=True)
class Question:
    """One question, asked several times: tokens of its prompt, tokens of each answer, 0 / 1 score of each answer."""

    context: int
    lengths: tuple[int, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        need = "as many scores as lengths, at least one"
        require(len(self.lengths) == len(self.scores) > 0, "scores", len(self.scores), need)


@dataclass(frozen=True)
class Run:
    """What a model answered to a set of questions, decoded in one way."""

    model: ModelShape
    questions: tuple[Question, ...]
    sparsity: Sparsity = field(default_factory=Sparsity)


@dataclass(frozen=True)
class Point:
    """An accuracy and its cost: for whom, and how it is reached."""

    accuracy: float
    cost: EFlops
    model: str
    sparsity: str
    trials: int = 1
    generated: int | None = None

    @property
    def total(self) -> float:
        return self.cost.total


def best_of_n(
    run: Run,
    trials: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    intensity: float = B200_INTENSITY,
    variant: str = "released",
) -> list[Point]:
    """Coverage against cost for each number of trials: means over the questions, costs over the lengths that answers had."""
    points = []
    for n in trials:
        accuracy, costs = [], []
        for question in run.questions:
            accuracy += coverage(question.scores, [n])
            options: dict[str, Any] = {"model": run.model, "context": question.context, "intensity": intensity}
            costs.append(expected_cost(run.sparsity.cost, question.lengths, n, **options, variant=variant))
        points.append(_point(run, accuracy, costs, trials=n))
    return points


def long_cot(
    run: Run,
    budgets: Sequence[int] = tuple(range(2048, 32769, 2048)),
    *,
    scored: Callable[[Question, int, int], float] | None = None,
    intensity: float = B200_INTENSITY,
    variant: str = "released",
) -> list[Point]:
    """Accuracy of one trial against cost when an answer may have so many tokens.

    Args:
        scored: `(question, answer number, budget) -> 0 / 1`, the score of a truncated answer. Default: an answer that ends within the
            budget has its score, a longer one none. (The authors score the truncated text again.)
    """
    points = []
    for budget in budgets:
        accuracy, costs = [], []
        for question in run.questions:
            if scored is None:
                scores = [s if length <= budget else 0.0 for s, length in zip(question.scores, question.lengths)]
            else:
                scores = [scored(question, i, budget) for i in range(len(question.scores))]
            accuracy += coverage(scores, [1])
            options: dict[str, Any] = {"model": run.model, "context": question.context, "intensity": intensity}
            lengths = [min(length, budget) for length in question.lengths]
            costs.append(expected_cost(run.sparsity.cost, lengths, 1, **options, variant=variant))
        points.append(_point(run, accuracy, costs, generated=budget))
    return points


def _point(run: Run, accuracy: list[float], costs: list[EFlops], **how: Any) -> Point:
    mean = EFlops(statistics.fmean(c.compute for c in costs), statistics.fmean(c.memory for c in costs))
    return Point(statistics.fmean(accuracy), mean, run.model.name, str(run.sparsity), **how)


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no cheaper or equally cheap one reaches, by rising cost: the best accuracy for each budget."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.total, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def at_cost(points: Iterable[Point], cost: float) -> Point | None:
    """The most accurate point that costs at most `cost` (1e12 eFLOPs), the cheapest of equals; None: there is none."""
    return next(reversed(frontier(p for p in points if p.total <= cost)), None)


def read_run(path: str | Path, model: ModelShape | str | None = None) -> Run:
    """A run from a JSON-lines file in the authors' layout.

    The first line is metadata: `model`, and for sparse runs `attn_local` with `attn_topk`, or `attn_block_topk` and `attn_block_size`.
    Every other line is one answer: `query`, `score` (0 / 1, or 0 / 100), `token_length` (prompt and answer) and `prefix_length` (prompt).

    Args:
        model: in place of the metadata's, a `ModelShape` or a name in `regard.bench.cost.MODELS`.
    """
    path = Path(path)
    try:
        meta, *rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
        answers: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row in rows:
            key = (str(row["query"]), int(row["prefix_length"]))
            answers.setdefault(key, []).append((int(row["token_length"]) - key[1], float(row["score"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_value("path", str(path), f"a file with metadata and one answer a line ({error!r})") from None
    require(bool(answers), "path", str(path), "at least one answer")
    model = meta.get("model", "") if model is None else model
    if not isinstance(model, ModelShape):
        model = MODELS[require_name("model", str(model).rsplit("/", 1)[-1].lower(), MODELS)]
    blocks = meta.get("attn_block_topk")
    size = int(meta.get("attn_block_size") or 16) if blocks is not None else 1
    topk = blocks if blocks is not None else meta.get("attn_topk")
    sparsity = Sparsity(None if topk is None else int(topk), int(meta.get("attn_local") or 0), size)
    questions = []
    for (_, context), found in answers.items():
        top = 100.0 if any(score > 1 for _, score in found) else 1.0
        questions.append(Question(context, tuple(n for n, _ in found), tuple(s / top for _, s in found)))
    return Run(model, tuple(questions), sparsity)
