"""CAB: the index, the efficiency length, the causality test, the reduced tasks and the command."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from regard import ops
from regard.bench.cab import (
    METHODS,
    PUBLISHED,
    TASKS,
    Sizes,
    causal_ops,
    causality_test,
    compositional_index,
    data,
    efficiency_length,
    fit_efficiency_length,
    index_over,
    indices,
    leaks,
    metrics,
    rank_correlation,
    register,
    run_tasks,
    task_scores,
)
from regard.bench.cab.methods import Method
from regard.cli import app
from regard.nn import OpAttention
from regard.ops import masks

TINY = Sizes(dim=16, layers=1, batch=2, kept=4, text=32)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_the_mean_scores_nothing_and_a_deviation_one(pattern):
    listed = PUBLISHED[pattern]
    assert compositional_index([m.mean for m in listed], pattern) == pytest.approx(0)
    assert compositional_index([m.mean + m.sign * m.deviation for m in listed], pattern) == pytest.approx(1)
    named = {}
    for m in listed:
        named.setdefault(m.task, {})[m.name] = m.mean - m.sign * 2 * m.deviation
    assert compositional_index(named, pattern) == pytest.approx(-2)
    named.pop(listed[0].task)  # a task that the method cannot do does not count
    assert compositional_index(named, pattern) == pytest.approx(-2)
    assert listed[0].task not in task_scores(named, listed)


def test_the_index_weighs_tasks_alike_however_many_metrics_they_have():
    values = [m.mean for m in PUBLISHED["NS"]]
    values[-1] -= PUBLISHED["NS"][-1].deviation  # MLM, one metric of ten, one task of four
    assert compositional_index(values, "NS") == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("results", "pattern", "message"),
    [
        ([1.0], "CC", "5 values"),
        ({"Sum": {"R-1": 1.0}}, "CC", "R-2"),
        ({"SR": {}}, "CC", "unknown name 'SR'"),
        ({}, "CC", "at least one task"),
        ([math.nan] * 5, "CC", "finite"),
        ([1.0] * 5, "XX", "pattern"),
    ],
)
def test_bad_results(results, pattern, message):
    with pytest.raises(ValueError, match=message):
        compositional_index(results, pattern)


def test_the_index_over_a_run():
    results = {"a": {"LM": {"PPL": 10.0}}, "b": {"LM": {"PPL": 14.0}}, "c": {"LM": {"PPL": 12.0}, "TTS": {"MCD": 3.0}}}
    made = index_over(results, {"LM": {"PPL": -1}, "TTS": {"MCD": -1}})
    assert made["a"] == pytest.approx(math.sqrt(1.5)) and made["b"] == pytest.approx(-math.sqrt(1.5))
    assert made["c"] == 0  # the mean in one task, alone in the other


def test_lengths_of_clean_costs():
    vanilla = [2e-6 * n * n for n in LENGTHS]
    for what in ("time", "memory"):
        linear = [1e-3 * n for n in LENGTHS]
        assert fit_efficiency_length(LENGTHS, linear, vanilla, what) == pytest.approx(500)  # d / a
        assert fit_efficiency_length(LENGTHS, [-1e-3 * n for n in LENGTHS], vanilla, what) == 0
        assert fit_efficiency_length(LENGTHS, linear, [n**0.5 for n in LENGTHS], what) == math.inf
    # time leaves the shortest length out of the linear fit, memory does not
    launch = [5.0] + [1e-3 * n for n in LENGTHS[1:]]
    assert fit_efficiency_length(LENGTHS, launch, vanilla, "time") == pytest.approx(500)
    assert fit_efficiency_length(LENGTHS, launch, vanilla, "memory") != pytest.approx(500, rel=0.01)


@pytest.mark.parametrize("what", ["time", "memory"])
def test_lengths_are_measured(what):
    told = []
    found = efficiency_length(
        lambda q, k, v: v * 2,
        lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
        lengths=(64, 128, 256, 512),
        what=what,
        num_heads=2,
        head_dim=16,
        on_length=told.append,
    )
    assert told == [64, 128, 256, 512] and 0 <= found < 400
    assert efficiency_length(ops.attention, ops.attention) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit_efficiency_length((1, 2), (1, 2), (1, 2)), "lengths"),
        (lambda: fit_efficiency_length((1, 2, 3), (1, 2), (1, 2, 3)), "cost"),
        (lambda: fit_efficiency_length((1, 2, 3), (1, 2, 3), (1, 2, 3), "energy"), "what"),
        (lambda: leaks(ops.attention, "NS"), "pattern"),
        (lambda: run_tasks(["softmax"]), "methods"),
        (lambda: run_tasks(tasks=["NS LM"]), "tasks"),
        (lambda: METHODS["local"].layer(16, 2, False, True, 8), "causal, cross"),
        (lambda: register("vanilla", METHODS["vanilla"].build), "not taken"),
        (lambda: register("new", METHODS["vanilla"].build, ["XS"]), "patterns"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_causality_of_our_ops():
    found = {name: leaks(op) for name, op in causal_ops().items()}
    causal = {name for name, size in found.items() if size <= 1e-4}
    assert {"attention, causal", "attention, window", "linear attention", "block top-k, one query a block"} <= causal
    assert not {"attention, no mask", "linear attention, not causal", "block top-k, 8 queries a block"} & causal
    assert not {"random features, keys scaled by their maximum"} & causal


def test_causal_cross_lets_the_context_be_seen_whole():
    assert causality_test(ops.attention, pattern="CC")
    assert not causality_test(ops.attention, pattern="CS")
    assert causality_test(lambda q, k, v: ops.attention(q, k, v, mask=masks.causal), pattern="CS")
    mixed = OpAttention(32, 2, causal=True, op=lambda q, k, v: v.mean(2, keepdim=True).expand_as(v)).train()
    assert not causality_test(mixed) and mixed.training


def test_every_task_runs_for_every_method_and_the_report_goes_on(tmp_path):
    path, begun = tmp_path / "cab.json", []
    report = run_tasks(steps=1, sizes=TINY, path=path, on_step=lambda what, number, total: begun.append((what, total)))
    wanted = sum(task.pattern in method.patterns for task in TASKS.values() for method in METHODS.values())
    assert len(begun) == wanted and {total for _, total in begun} == {wanted}
    for name, task in TASKS.items():
        for method, found in report["results"][name].items():
            assert task.pattern in METHODS[method].patterns
            assert set(found) == set(task.signs) and all(math.isfinite(v) for values in found.values() for v in values)
    assert set(indices(report)) == set(PUBLISHED)
    assert all("none" not in scores and "vanilla" in scores for scores in indices(report).values())

    kept = json.loads(path.read_text())
    del kept["results"]["CS LM"]["abc"]
    path.write_text(json.dumps(kept))
    begun.clear()
    again = run_tasks(steps=1, sizes=TINY, path=path, on_step=lambda what, number, total: begun.append(what))
    assert begun == ["CS LM, abc"]
    assert again["results"] == report["results"]  # the same seed, the same numbers
    with pytest.raises(ValueError, match="same settings"):
        run_tasks(steps=2, sizes=TINY, path=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="a file that this command wrote"):
        run_tasks(steps=1, sizes=TINY, path=path)


def test_training_helps_and_leaves_the_callers_dice_alone():
    before = torch.get_rng_state()
    short, long = (run_tasks(["vanilla"], ["NC LSTF"], steps=steps, sizes=TINY)["results"] for steps in (1, 80))
    assert torch.equal(before, torch.get_rng_state())
    assert long["NC LSTF"]["vanilla"]["MSE"][0] < short["NC LSTF"]["vanilla"]["MSE"][0]


def test_a_method_of_ones_own_takes_part(monkeypatch):
    monkeypatch.setattr("regard.bench.cab.methods.METHODS", dict(METHODS))
    from regard.bench.cab import methods

    made = methods.register("mine", lambda d, h, causal, cross, n: OpAttention(d, h, causal, cross), ["NS"])
    assert isinstance(made, Method) and methods.METHODS["mine"].patterns == {"NS"}


def test_metrics():
    true = torch.rand(2, 16, 16)
    assert metrics.ssim(true, true) == pytest.approx(1) and metrics.psnr(true + 0.1, true) == pytest.approx(20)
    assert metrics.ssim(1 - true, true) < 0.5
    found = metrics.rouge([[1, 2, 3, 4], [5]], [[1, 2, 4, 3], [5]])
    assert found["R-1"] == pytest.approx(100) and found["R-2"] == pytest.approx(100 * (1 / 3) / 2)
    assert found["R-L"] == pytest.approx(100 * (0.75 + 1) / 2)
    cloud = torch.randn(2, 30, 3)
    same = metrics.chamfer(cloud, cloud.flip(1))
    # cdist through products leaves a little where points coincide
    assert same["CD-l1"] < 1e-3 and same["F-Score"] == pytest.approx(1)
    moved = metrics.chamfer(torch.zeros(1, 1, 3), torch.tensor([[[3.0, 4.0, 0.0]]]))
    assert moved["CD-l1"] == pytest.approx(5) and moved["CD-l2"] == pytest.approx(50) and moved["F-Score"] == 0
    frames = torch.randn(2, 5, 16)
    assert metrics.spectral_distances(frames, frames) == {"MCD": 0, "MSD": 0}
    louder = metrics.spectral_distances(frames + 1, frames)  # loudness is coefficient 0, which MCD leaves out
    assert louder["MSD"] == pytest.approx(1) and louder["MCD"] == pytest.approx(0, abs=1e-4)


def test_data_has_what_the_tasks_ask_for():
    generator = torch.Generator().manual_seed(0)
    words, picked = data.documents(50, generator)
    for document, summary in zip(words.view(50, 4, 12), picked):
        for part, word in zip(document, summary):
            count = (part == word).sum()
            assert count >= 6 or word == summary[0]
    symbols, sound, spoken = data.speech(3, generator)
    assert sound.shape == (3, 64, 16) and (spoken[:, 0] == symbols[:, 0]).all()
    seen, whole = data.clouds(3, generator)
    assert seen.shape == whole.shape == (3, 64, 3)
    sharp, blurred = data.images(3, generator)
    assert sharp.shape == blurred.shape and metrics.psnr(blurred.clamp(0, 1), sharp) > 10
    past, future = data.series(3, generator)
    assert past.shape == (3, 96, 4) and future.shape == (3, 48, 4)


def test_rank_correlation():
    ordered = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}
    assert rank_correlation(ordered, {k: -v for k, v in ordered.items()}) == pytest.approx(-1)
    assert rank_correlation(ordered, {k: v**3 for k, v in ordered.items()} | {"z": 0.0}) == pytest.approx(1)
    assert math.isnan(rank_correlation(ordered, {"a": 1.0}))


def test_the_command(tmp_path):
    out = tmp_path / "cab.json"
    run = CliRunner().invoke(
        app, ["bench", "cab", "--quick", "--methods", "vanilla,local", "--tasks", "CS,NS MLM", "--out", str(out)]
    )
    assert run.exit_code == 0, run.output
    assert "CS, causal self" in run.output and "NS, non-causal self" in run.output and "NC," not in run.output
    assert "linear attention" in run.output and json.loads(out.read_text())["results"]["NS MLM"]["local"]
