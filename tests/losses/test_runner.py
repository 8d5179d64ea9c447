"""`fit`: the same result after a kill, a base that keeps its bits, checkpoints that are whole, and errors that say where."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from regard import _files as files
from regard.losses import fit, layer_loss
from regard.losses.runner import TrainingStopped, fingerprint
from tiny import tiny_llama


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def problem(seed=0):
    torch.manual_seed(seed)
    base, gate = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 4))
    batches = [torch.randn(5, 4) for _ in range(7)]

    def loss(x):
        noise = 0.01 * torch.randn(5, 4)
        return (gate(x) - base(x) + noise).square().mean()

    return base, gate, batches, loss


SET = dict(steps=12, lr=0.05, schedule="cosine", warmup=2, save_every=4, clip=1.0, progress=False)


def test_trains_and_leaves_the_caller_as_it_was():
    base, gate, batches, loss = problem()
    gate.eval()
    base.weight.requires_grad_(False)
    before, random = fingerprint(base), torch.get_rng_state()
    result = fit(gate, loss, batches, frozen=base, **SET)
    assert result.steps == 12 and len(result.losses) == 12
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    assert fingerprint(base) == before
    assert not gate.training and not base.weight.requires_grad and base.bias.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in gate.parameters())


@pytest.mark.parametrize("killed_at", [3, 4, 6, 11])
@pytest.mark.parametrize("form", ["sequence", "function", "iterable"])
def test_resumes_to_the_same_bits(tmp_path, killed_at, form):
    base, gate, batches, loss = problem()
    given = {"sequence": batches, "function": lambda i: batches[i % 7], "iterable": _Iterable(batches)}[form]
    whole = fit(gate, loss, given, accumulate=2, frozen=base, **SET)
    expected = {name: t.clone() for name, t in gate.state_dict().items()}

    base, gate, _, loss = problem()
    calls = 0

    def dying(x):
        nonlocal calls
        calls += 1
        if calls > 2 * killed_at:
            raise Killed
        return loss(x)

    out = tmp_path / "gates.safetensors"
    with pytest.raises(Killed):
        fit(gate, dying, given, accumulate=2, frozen=base, out=out, **SET)
    base, gate, _, loss = problem(0 if killed_at < 4 else 1)  # a checkpoint brings its own weights
    base.load_state_dict(problem(0)[0].state_dict())
    again = fit(gate, loss, given, accumulate=2, frozen=base, out=out, **SET)
    assert again.resumed_at == killed_at // 4 * 4
    assert again.losses == whole.losses
    assert all(torch.equal(t, expected[name]) for name, t in gate.state_dict().items())
    written = load_file(out)
    assert all(torch.equal(written[name], t) for name, t in expected.items()) and written.keys() == expected.keys()
    finished = fit(gate, dying, given, accumulate=2, frozen=base, out=out, **SET)  # nothing is left to do
    assert finished.resumed_at == 12 and finished.losses == whole.losses
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gates.safetensors", "gates.safetensors.state"]


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    _, gate, batches, loss = problem()
    out, writes = tmp_path / "gates.safetensors", 0
    replace = files.os.replace

    def full(*args):
        nonlocal writes
        writes += 1
        if writes == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(*args)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left.*step 8 is lost.*step 4 is whole") as caught:
        fit(gate, loss, batches, out=out, **SET)
    assert caught.value.__cause__.__cause__.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["gates.safetensors.state"]  # and nothing half written
    assert fit(gate, loss, batches, out=out, **SET).resumed_at == 4


def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path):
    _, gate, batches, loss = problem()
    seen = []

    def breaks(x):
        seen.append(x)
        return loss(x) * (math.nan if len(seen) == 6 else 1.0)

    with pytest.raises(TrainingStopped, match="step 5: the loss is nan") as caught:
        fit(gate, breaks, batches, out=tmp_path / "g", **SET)
    assert caught.value.step == 5
    assert all(bool(p.isfinite().all()) for p in gate.parameters())


def test_an_infinite_gradient_stops_too():
    gate = nn.Linear(1, 1, bias=False)
    gate.weight.data.zero_()
    with pytest.raises(TrainingStopped, match="gradient's norm"):
        fit(gate, lambda x: gate(x).abs().sqrt().sum(), [torch.ones(1, 1)], steps=1, progress=False)


def test_frozen_base_that_changes_is_an_error():
    base, gate, batches, loss = problem()

    def meddles(x):
        base.bias.data.add_(1e-3)
        return loss(x)

    with pytest.raises(RuntimeError, match="frozen: Linear changed while training, in bias"):
        fit(gate, meddles, batches, steps=1, frozen=base, progress=False)


def test_other_arguments_do_not_go_on(tmp_path):
    _, gate, batches, loss = problem()
    out = tmp_path / "g"
    fit(gate, loss, batches, out=out, **SET)
    with pytest.raises(ValueError, match=r"lr = 0.05.*resume=False"):
        fit(gate, loss, batches, out=out, **(SET | {"lr": 0.1}))
    with pytest.raises(ValueError, match="of other modules"):
        other = nn.Linear(4, 4)
        fit(other, lambda x: other(x).sum(), batches, out=out, **SET)
    (tmp_path / "g.state").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="a state that `fit` wrote"):
        fit(gate, loss, batches, out=out, **SET)
    assert fit(gate, loss, batches, out=out, resume=False, **SET).resumed_at == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": nn.Linear(2, 2).requires_grad_(False)}, "modules: got 'no parameter"),
        ({"modules": [nn.Linear(2, 2)]}, "modules: got list"),
        ({"batches": []}, "batches: got 'an empty sequence'"),
        ({"batches": lambda i: i, "steps": None}, "steps: got None"),
        ({"batches": iter([])}, "batches: got 'an iterable at its end'"),
        ({"schedule": "cosinus"}, "did you mean cosine"),
        ({"loss": lambda x: torch.zeros(())}, "no parameter of `modules` has a part in"),
        ({"loss": lambda x: torch.zeros(2)}, "need 'a scalar loss'|a scalar loss"),
        ({"steps": 0}, "steps: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
    ],
)
def test_bad_input(change, message):
    _, gate, batches, loss = problem()
    options = {"modules": gate, "loss": loss, "batches": batches, "steps": 2} | change
    with pytest.raises((ValueError, TypeError), match=message):
        fit(options.pop("modules"), options.pop("loss"), options.pop("batches"), progress=False, **options)


def test_unwritable_out_is_told_before_the_work(tmp_path):
    _, gate, batches, _ = problem()
    with pytest.raises(OSError, match="is a folder"):
        fit(gate, lambda x: pytest.fail("has begun"), batches, out=tmp_path, progress=False)


def test_layer_loss_streams_a_model():
    model = tiny_llama()
    gates = {str(layer): nn.Linear(8, 8, bias=False) for layer in range(3)}
    ids = torch.randint(1, 128, (2, 12))

    def loss_of_call(call):
        return None if call.layer == 1 else (gates[str(call.layer)](call.q) - call.q).square().mean()

    loss = layer_loss(model, loss_of_call)
    together = sum((gates[n](q) - q).square().mean() for n, q in _queries(model, ids).items() if n != "1")
    assert torch.isclose(loss({"input_ids": ids}), together.detach(), rtol=1e-6)
    result = fit({"0": gates["0"], "2": gates["2"]}, loss, [ids], steps=30, lr=0.05, frozen=model, progress=False)
    assert result.losses[-1] < 0.2 * result.losses[0]
    assert all(p.requires_grad for p in model.parameters())


def _queries(model, ids):
    import regard

    found = {}
    with regard.attach(model) as session, torch.no_grad():
        session.observers.append(lambda call: found.update({str(call.layer): call.q}))
        model(ids)
    return found


class _Iterable:
    """Can be read again and again, but only from the start."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


SCRIPT = """
import sys, time
import torch
from torch import nn
from regard.losses import fit

torch.manual_seed(0)
gate, data = nn.Linear(4, 4), [torch.randn(5, 4) for _ in range(7)]

def loss(x):
    time.sleep(float(sys.argv[2]))
    return (gate(x) - x + 0.1 * torch.randn(5, 4)).square().mean()

result = fit(gate, loss, data, steps=40, lr=0.05, out=sys.argv[1], save_every=2, progress=False)
"""


def test_a_killed_process_goes_on(tmp_path, monkeypatch):
    def here(name):
        monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / name), "0"])
        names = {}
        exec(SCRIPT, names)
        return names["result"]

    whole = here("whole")
    dying = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), "0.2"])
    state, until = tmp_path / "killed.state", time.monotonic() + 60
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(dying.pid, signal.SIGKILL)
    dying.wait()
    again = here("killed")
    assert 2 <= again.resumed_at < 40 and again.losses == whole.losses and len(whole.losses) == 40
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "killed").read_bytes()
