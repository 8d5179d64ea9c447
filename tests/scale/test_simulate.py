"""Simulation by the cost model: sampled lengths, orderings that must hold, hundreds of devices, commands."""

import json
import math

import pytest
from typer.testing import CliRunner

from regard.bench.cost import DEVICES, MODELS, Device, ModelShape
from regard.cli import app
from regard.scale.simulate import sample_documents, simulate

SHAPE = ModelShape(2, 8, 2, 32, 2e6)
DEVICE = Device("d", 1e12, 1e11, link=1e9)


def test_documents_fill_the_tokens():
    lengths = sample_documents(100_000, 8192, seed=3)
    assert sum(lengths) == 100_000 and max(lengths) <= 8192 and all(n % 2 == 0 and n > 0 for n in lengths)
    assert lengths == sample_documents(100_000, 8192, seed=3) != sample_documents(100_000, 8192, seed=4)
    with pytest.raises(ValueError, match="tokens: got 101"):
        sample_documents(101, 50)


def test_even_work_is_ideal_and_moves_nothing():
    found = simulate([512] * 8, 8, 512, shape=SHAPE, device=DEVICE)
    for out in found:
        assert out.imbalance == 1.0 and out.moved == 0 and math.isclose(out.efficiency, 1.0)


def test_balancing_512_devices():
    ranks, tokens = 512, 4096
    lengths = sample_documents(ranks * tokens, 131072, seed=1)
    found = simulate(lengths, ranks, tokens, shape=MODELS["llama-3-8b"], device=DEVICES["h100"], tolerances=(0.1, 0.0))
    order, packed, released, _, loose, tight = found
    assert [out.way for out in (order, released, tight)] == ["in order", "released, 0.1", "both bounds, 0"]
    assert order.imbalance > 2.0 and loose.imbalance < 1.11 and tight.imbalance < 1.05
    assert released.imbalance > 1.1 > loose.imbalance  # what each rank lacks a little of lies on a few
    assert tight.attention < order.attention and tight.moved >= loose.moved > 0
    assert packed.imbalance >= 1.0 and loose.token_imbalance == order.token_imbalance
    assert all(0 < out.efficiency <= 1.0 + 1e-9 for out in found)


def test_travel_within_a_machine_and_between():
    import torch

    from regard.scale.simulate import _travel

    sent = torch.tensor([[0.0, 8.0, 6.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    assert _travel(sent, Device("d", 1.0, 1.0, link=1.0, near_link=4.0, near=2))[0] == 8 / 4 + 6
    assert _travel(sent, Device("d", 1.0, 1.0, link=1.0)) == pytest.approx((14.0, 17 / 3))
    assert _travel(sent, Device("d", 1.0, 1.0)) == (0.0, 0.0)
    eight = DEVICES["h100"].together(8)
    assert (
        eight.flops == 8 * 989e12 and eight.link == 400e9 and eight.near == 1 and DEVICES["h100"].together(1).near == 8
    )


def test_travel_hides_or_adds():
    lengths = sample_documents(8 * 2048, 8192, seed=2)
    hidden = simulate(lengths, 8, 2048, shape=SHAPE, device=DEVICE, tolerances=(0.0,))[-1]
    added = simulate(lengths, 8, 2048, shape=SHAPE, device=DEVICE, tolerances=(0.0,), overlap=False)[-1]
    assert hidden.travel == added.travel > 0
    assert math.isclose(added.seconds, added.attention + added.linear + added.travel)
    assert math.isclose(hidden.seconds, max(added.attention + added.linear, added.travel))
    with pytest.raises(ValueError, match="attention_efficiency: got 0"):
        simulate(lengths, 8, 2048, shape=SHAPE, device=DEVICE, attention_efficiency=0)


def test_the_commands(tmp_path):
    run = CliRunner().invoke
    kept = tmp_path / "simulated.json"
    done = run(app, ["scale", "simulate", "--devices", "8", "--tokens", "2048", "--shared", "2", "--json", str(kept)])
    assert done.exit_code == 0 and "packed, groups of" in done.output
    assert len(json.loads(kept.read_text())["rows"]) == 10
    done = run(app, ["scale", "plan", "64", "8", "8", "--ranks", "2", "--tasks"])
    assert done.exit_code == 0 and "80 tokens" in done.output and "server 1" in done.output
    assert isinstance(run(app, ["scale", "simulate", "--device", "toaster"]).exception, ValueError)
    assert isinstance(run(app, ["scale", "simulate", "--devices", "9"]).exception, ValueError)
    assert isinstance(run(app, ["scale", "plan", "0"]).exception, ValueError)
