"""Kinetics: identities of the costs, pass@n, frontiers, runs from files, the planner and its command."""

import json
import math

import pytest
from typer.testing import CliRunner

from regard.bench.cost import MODELS, ModelShape
from regard.bench.kinetics import (
    EFlops,
    Point,
    Question,
    Run,
    Sparsity,
    at_cost,
    attention_share,
    best_of_n,
    block_topk_cost,
    coverage,
    dense_cost,
    expected_cost,
    frontier,
    long_cot,
    pass_at_n,
    read_run,
    topk_cost,
)
from regard.bench.kinetics_plan import SPARSITIES, TaskCurve, plan, png
from regard.cli import app

MODEL = ModelShape(2, 8, 2, 16, 1e6, "small")
SMALL, LARGE = MODELS["qwen3-0.6b"], MODELS["qwen3-32b"]


def test_a_budget_of_everything_is_dense():
    dense = dense_cost(MODEL, 100, 900)
    for budget in (1000, 5000):
        assert topk_cost(MODEL, 100, 900, budget=budget, variant="paper") == pytest.approx(dense)
    blocks = block_topk_cost(MODEL, 100, 900, recent=1000, block_size=10**6, topk=0)
    assert blocks == pytest.approx(dense)
    plus = topk_cost(MODEL, 100, 900, budget=1000)
    assert plus.total > dense.total  # the released sign: dearer than dense
    assert topk_cost(MODEL, 100, 900, budget=60) == topk_cost(MODEL, 100, 900, budget=60, variant="paper")


def test_the_sum_over_an_answer():
    """Continuous in t: half a key a token less than the sum of min(budget, context + t)."""
    for budget in (50, 150, 600):
        exact = sum(min(budget, 100 + t - 0.5) for t in range(1, 401))
        cost = topk_cost(ModelShape(1, 1, 1, 1, 0.0), 100, 400, budget=budget, variant="paper", intensity=1.0)
        assert cost.memory * 1e12 / 4 == pytest.approx(exact, rel=1e-4)


def test_trials_share_the_prompt_only_when_dense():
    one, many = dense_cost(MODEL, 1000, 10), dense_cost(MODEL, 1000, 10, 50)
    assert many.compute == pytest.approx(50 * one.compute) and many.memory < 2 * one.memory
    assert topk_cost(MODEL, 1000, 10, 50, budget=64).memory == pytest.approx(
        50 * topk_cost(MODEL, 1000, 10, budget=64).memory
    )


def test_attention_takes_over_and_the_best_size_shifts():
    shares = [attention_share(dense_cost(SMALL, 512, n), SMALL, n) for n in (128, 2048, 32768)]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.95
    ratio = dense_cost(LARGE, 512, 32768).total / dense_cost(SMALL, 512, 32768).total
    assert ratio < 0.25 * LARGE.params / SMALL.params  # by parameters alone the large model would be 44 times as dear


def test_pass_at_n():
    assert pass_at_n(1, 4, 4) == 1.0 and pass_at_n(0, 4, 4) == 0.0
    assert pass_at_n(1, 4, 1) == pytest.approx(0.25) and pass_at_n(2, 4, 2) == pytest.approx(1 - 1 / 6)
    assert coverage([1, 0, 0, 0], [1, 4]) == [pytest.approx(0.25), 1.0]
    for bad in ((5, 4, 1), (1, 4, 5), (1, 0, 0), (-1, 4, 1)):
        with pytest.raises(ValueError, match="got"):
            pass_at_n(*bad)


def a_run(sparsity=None, model=MODEL):
    questions = (Question(100, (500, 3000), (1.0, 0.0)), Question(50, (800, 900), (1.0, 1.0)))
    return Run(model, questions, sparsity or Sparsity())


def test_best_of_n_and_long_chains():
    points = best_of_n(a_run(), (1, 2))
    assert [p.accuracy for p in points] == [0.75, 1.0] and points[0].total < points[1].total
    lengths = long_cot(a_run(), (100, 600, 4000))
    assert [p.accuracy for p in lengths] == [0.0, 0.25, 0.75]
    by_hand = expected_cost(dense_cost, [100, 100], 1, model=MODEL, context=100)
    other = expected_cost(dense_cost, [100, 100], 1, model=MODEL, context=50)
    assert lengths[0].total == pytest.approx((by_hand.total + other.total) / 2)
    always = long_cot(a_run(), (100,), scored=lambda question, number, budget: 1.0)
    assert always[0].accuracy == 1.0
    sparse = best_of_n(a_run(Sparsity(2, recent=16, block_size=16)), (1,))[0]
    assert sparse.total < points[0].total and sparse.sparsity == "2 blocks of 16 + 16"


def test_frontier():
    made = [Point(a, EFlops(c, 0.0), "m", "dense") for a, c in ((0.5, 2), (0.4, 3), (0.6, 3), (0.5, 1), (0.6, 9))]
    assert [(p.accuracy, p.total) for p in frontier(made)] == [(0.5, 1.0), (0.6, 3.0)]
    assert at_cost(made, 2.5).accuracy == 0.5 and at_cost(made, 0.5) is None


def test_curves_and_the_planner():
    curve = TaskCurve(0.8, 2000, keys=200, spread=2.0)
    assert curve.accuracy(0) == 0.0 and curve.accuracy(10**6) == pytest.approx(0.8)
    assert curve.accuracy(10**6, 10**6) == pytest.approx(0.8)
    alike, spread = TaskCurve(0.5, 1.0), TaskCurve(0.5, 1.0, spread=1.0)
    assert alike.accuracy(100, trials=2) == pytest.approx(0.75)
    assert spread.accuracy(100, trials=2) == pytest.approx(1 - 0.5 * 1.5 / 2)
    models = [(SMALL, TaskCurve(0.4, 4000, keys=100)), (LARGE, TaskCurve(0.85, 4000, keys=100))]
    found = plan(models, 3e4)
    assert found.best.accuracy >= found.dense.accuracy and found.best.total <= 3e4
    assert found.best.sparsity != "dense" and found.front[-1].accuracy >= found.dense_front[-1].accuracy
    assert plan(models, 1e-9).best is None
    free = plan([(SMALL, TaskCurve(0.4, 4000, keys=1e9))], 1e9)  # sparsity loses everything: nobody takes it
    assert all(point.sparsity == "dense" for point in free.front if point.accuracy > 0.01)
    assert png({"all": found.front})[:4] == b"\x89PNG"


def test_a_curve_is_fitted():
    true = TaskCurve(0.7, 3000)
    questions = []
    for i in range(40):  # answers that end at evenly spread times; those that ever end right are 70 %
        ends = -3000 * math.log1p(-(i + 0.5) / 40)
        questions.append(Question(10, (int(ends),) * 10, (1.0,) * 7 + (0.0,) * 3))
    fitted = TaskCurve.fit(Run(MODEL, tuple(questions)))
    assert fitted.ceiling == pytest.approx(true.ceiling, abs=0.03) and fitted.tokens == pytest.approx(3000, rel=0.15)
    assert math.isinf(fitted.spread)
    halves = tuple(Question(10, (5, 5), (float(i % 2),) * 2) for i in range(10))
    assert TaskCurve.fit(Run(MODEL, halves)).spread < 0.01
    worse = tuple(Question(q.context, q.lengths, (1.0,) * 4 + (0.0,) * 6) for q in questions)
    sparse = Run(MODEL, worse, Sparsity(4, recent=64, block_size=16))
    keys = TaskCurve.fit(Run(MODEL, tuple(questions)), [sparse]).keys
    assert -math.expm1(-128 / keys) == pytest.approx(4 / 7, abs=0.05)


def test_runs_are_read(tmp_path):
    path = tmp_path / "run.jsonl"
    rows = [{"query": "a", "score": s, "token_length": 100 + n, "prefix_length": 100} for s, n in ((100, 7), (0, 9))]
    rows.append({"query": "b", "score": 1, "token_length": 60, "prefix_length": 50})
    meta = {"model": "Qwen/Qwen3-0.6B", "attn_local": 64, "attn_block_topk": 4, "attn_block_size": 16}
    path.write_text("\n".join(json.dumps(row) for row in [meta, *rows]))
    run = read_run(path)
    assert run.model == SMALL and run.sparsity == SPARSITIES[1] and run.sparsity.budget == 128
    assert run.questions == (Question(100, (7, 9), (1.0, 0.0)), Question(50, (10,), (1.0,)))
    assert read_run(path, MODEL).model == MODEL
    path.write_text(json.dumps({"model": "qwen3-4b", "attn_local": 32}) + "\n" + json.dumps(rows[0]))
    window = read_run(path)
    assert window.sparsity.budget == 32
    assert best_of_n(window, [1])[0].cost == topk_cost(window.model, 100, 7, budget=32)
    for text in ("", "{}", "{}\n{}", "not json", "[]\n[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="path: got"):
            read_run(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense_cost(MODEL, -1, 5), "context: got -1"),
        (lambda: dense_cost(MODEL, 1, 5, 0), "trials: got 0"),
        (lambda: topk_cost(MODEL, 1, 5, budget=2, variant="both"), "variant: unknown name"),
        (lambda: expected_cost(dense_cost, []), "lengths: got"),
        (lambda: Question(1, (2,), ()), "scores: got 0"),
        (lambda: TaskCurve(1.2, 5), "ceiling: got 1.2"),
        (lambda: TaskCurve(0.2, 0), "tokens: got 0"),
        (lambda: plan([], 1.0), "models, lengths"),
        (lambda: plan([(MODEL, TaskCurve(0.5, 1.0))], 0.0), "budget: got 0.0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_the_command(tmp_path):
    run = CliRunner().invoke
    done = run(app, ["bench", "kinetics"])
    assert done.exit_code == 0 and "qwen3-32b" in done.output
    picture = tmp_path / "front.png"
    options = ["--curve", "0.6,4000,100,2", "--budget", "5000", "--model", "qwen3-8b", "--picture", str(picture)]
    done = run(app, ["bench", "kinetics", *options])
    assert done.exit_code == 0 and "best within 5000" in done.output and picture.read_bytes()[:4] == b"\x89PNG"
    assert isinstance(run(app, ["bench", "kinetics", "--curve", "high"]).exception, ValueError)
    path = tmp_path / "run.jsonl"
    answer = {"query": "a", "score": 1, "token_length": 2107, "prefix_length": 100}
    path.write_text("\n".join(json.dumps(row) for row in [{"model": "Qwen3-8B"}, answer, {**answer, "score": 0}]))
    done = run(app, ["bench", "kinetics", str(path)])
    assert done.exit_code == 0 and "1.000" in done.output
