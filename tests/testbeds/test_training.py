"""`train`: learns, goes on after a kill to the same curve, stops at NaN with its last good checkpoint, logs, and trains data-parallel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regard
from regard.models import SmallLM
from regard.testbeds import tasks
from regard.testbeds.training import TrainingStopped, train, vector_loss


class Killed(BaseException):
    """Stands for SIGKILL."""


def model(seed=0, mixer="linear", dropout=0.1):
    torch.manual_seed(seed)
    return SmallLM(32, 16, 2, 2, mixer, dropout=dropout)


SET = dict(steps=12, lr=3e-3, save_every=5, progress=False)
MQAR = tasks.batches(tasks.mqar, 8, 16, 2, 32)


def test_learns_induction():
    torch.manual_seed(0)
    small = SmallLM(8, 32, 2, 2, "softmax", short_conv=3)
    made = train(small, tasks.batches(tasks.induction, 32, 12, 8), steps=150, lr=5e-3, progress=False)
    ids, labels = tasks.induction(200, 12, 8, generator=torch.Generator().manual_seed(9))
    assert tasks.accuracy(small(ids), labels) > 0.9 and made.losses[-1] < made.losses[0]


def test_learns_regression_on_vectors():
    torch.manual_seed(0)
    small = SmallLM(None, 32, 2, 2, "softmax", in_dim=3, out_dim=1, causal=False)
    make = tasks.batches(tasks.in_context_regression, 32, 10, 2)
    made = train(small, make, steps=60, lr=3e-3, loss=vector_loss, progress=False)
    assert sum(made.losses[-10:]) < 0.8 * sum(made.losses[:10])


@pytest.mark.parametrize("killed_at", [3, 7, 11])
def test_a_killed_run_comes_to_the_same_curve(tmp_path, killed_at):
    whole = model()
    expected = train(whole, MQAR, accumulate=2, **SET)

    def until_killed(number):
        if number == 2 * killed_at + 1:
            raise Killed
        return MQAR(number)

    log = tmp_path / "log.jsonl"
    with pytest.raises(Killed):
        train(model(), until_killed, accumulate=2, out=tmp_path / "m.safetensors", log=log, **SET)
    again = model(1)  # whatever it was before, the checkpoint says what it is
    if killed_at < 5:
        again = model()
    made = train(again, MQAR, accumulate=2, out=tmp_path / "m.safetensors", log=log, **SET)
    assert made.losses == expected.losses and made.resumed_at == killed_at // 5 * 5
    for ours, theirs in zip(again.parameters(), whole.parameters()):
        assert torch.equal(ours, theirs)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12)) and [row["loss"] for row in rows] == expected.losses


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    small, out = model(), tmp_path / "m.safetensors"

    def loss(run, batch):
        value = run(batch[0]).square().mean()
        return value * float("nan") if steps_done["n"] >= 8 else value

    steps_done = {"n": -1}

    def counted(number):
        steps_done["n"] = number
        return MQAR(number)

    with pytest.raises(
        TrainingStopped, match=r"step 8: the loss is nan; the last checkpoint in .*m.safetensors.state"
    ) as error:
        train(small, counted, loss=loss, out=out, **SET)
    assert error.value.step == 8 and Path(f"{out}.state").is_file()
    assert all(p.isfinite().all() for p in small.parameters())
    steps_done["n"] = -100  # the cause is gone: it goes on from step 5
    made = train(model(), MQAR, loss=lambda run, batch: run(batch[0]).square().mean(), out=out, **SET)
    assert made.resumed_at == 5 and made.steps == 12


def test_bf16_compile_csv_and_evaluation(tmp_path):
    small, log, seen = model(), tmp_path / "log.csv", []

    def loss(run, batch):
        logits = run(batch[0])
        seen.append(run.__class__.__name__)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())

    def evaluate(given):
        assert not given.training
        ids, labels = tasks.mqar(16, 16, 2, 32, generator=torch.Generator().manual_seed(5))
        return {"accuracy": tasks.accuracy(given(ids), labels)}

    made = train(
        small, MQAR, loss=loss, dtype="bfloat16", compile="eager", evaluate=evaluate, eval_every=4, log=log, **SET
    )
    assert set(seen) == {"OptimizedModule"} and small.training and small.norm.weight.dtype == torch.float32
    rows = [line.split(",") for line in log.read_text().splitlines()]
    assert rows[0] == ["step", "name", "value"]
    assert [int(step) for step, name, _ in rows[1:] if name == "accuracy"] == [3, 7, 11]
    assert [float(v) for _, name, v in rows[1:] if name == "loss"] == pytest.approx(made.losses, rel=1e-6)
    plain = train(model(), MQAR, loss=loss, **SET)
    assert plain.losses != made.losses and plain.losses == pytest.approx(made.losses, rel=0.05)


RANK = """
import os, sys, torch, json
from regard.models import SmallLM
from regard.testbeds import tasks
from regard.testbeds.training import train
out, parallel, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = SmallLM(32, 16, 2, 2, "linear")
batches = tasks.batches(tasks.mqar, 4, 16, 2, 32)
def make(number):
    if number >= stop:
        os._exit(7)  # as a kill does: nothing is cleaned up
    return batches(number)
made = train(model, make, steps=5, lr=3e-3, accumulate=2, parallel=parallel, progress=False, save_every=2, out=out, log=out + ".jsonl")
print(json.dumps([made.losses, made.resumed_at, type(model.norm.weight.data).__name__]))
"""


def ranks(*arguments):
    """Two processes as torchrun starts them: their exit codes and last lines."""
    source = str(Path(regard.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": source,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
    }
    # `python -m torch.distributed.run` spends seconds more than the variables that it sets
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, arguments)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200) for rank in started]
    return [rank.returncode for rank in started], said


def check_two_processes(said, tmp_path):
    """Batches of four, two processes, two parts a step: the mean over eight batches' halves is that of four times as many parts."""
    alone = model(dropout=0.0)
    make = tasks.batches(tasks.mqar, 4, 16, 2, 32)
    expected = train(alone, make, steps=5, lr=3e-3, accumulate=4, progress=False)
    found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(expected.losses, rel=1e-5)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "m.safetensors")
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-3, atol=1e-5)
    assert len((tmp_path / "m.safetensors.jsonl").read_text().splitlines()) == 5
    return found[0]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    codes, said = ranks(tmp_path / "m.safetensors", "ddp", 10**6)
    assert codes == [0, 0], said
    check_two_processes(said, tmp_path)


def test_sharded_over_two_processes_and_killed(tmp_path):
    """FSDP2: the same curve, files that hold whole tensors, and going on from the checkpoint of step 4."""
    codes, said = ranks(tmp_path / "m.safetensors", "fsdp", 4 * 4)
    assert 0 not in codes and 7 in codes, said  # one may die of the other's death
    codes, said = ranks(tmp_path / "m.safetensors", "fsdp", 10**6)
    assert codes == [0, 0], said
    _, resumed_at, kind = check_two_processes(said, tmp_path)
    assert resumed_at == 4 and kind == "DTensor"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(dtype="float8"), "dtype"),
        (dict(log="log.txt"), "csv or .jsonl"),
        (dict(eval_every=2), "evaluate"),
        (dict(accumulate=0), "accumulate"),
        (dict(loss=lambda run, batch: run(batch[0])), "scalar"),
    ],
)
def test_bad_arguments(given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        train(model(), MQAR, **{**SET, **given})
    with pytest.raises(TypeError, match="batches"):
        train(model(), [1, 2], **SET)
