"""The back-copy task does what it says, and a training reports its sinks at the steps it says."""

from __future__ import annotations

import math

import pytest
import torch

from regard.lens import model_weights, sink_rate
from regard.models import SmallLM
from regard.testbeds.sinks import BackcopyText, train_watching_sinks, with_fixed_token
from regard.testbeds.texts import ByteText


@pytest.fixture(scope="module", params=[False, True], ids=["ordinary", "start"])
def task(request):
    return BackcopyText(start=request.param)


def test_triggers_copy_back_and_other_bytes_follow_the_text(task):
    ids = task.batch(64, 80, torch.Generator().manual_seed(0))
    if task.start:
        assert (ids[:, 0] == 256).all()
        ids = ids[:, 1:]
    assert ids.max() < 256 <= task.vocab_size
    trigger = torch.isin(ids[:, 1:-1], task.triggers)
    assert trigger.sum() > 200
    assert torch.equal(ids[:, 2:][trigger], ids[:, :-2][trigger])
    text = ByteText().learn
    pairs = set((text[:-1] * 256 + text[1:]).tolist())
    free = ids[:, 1:-1] * 256 + ids[:, 2:]
    assert set(free[~trigger].tolist()) <= pairs


def test_follows_the_frequencies_of_the_text(task):
    text = ByteText().learn
    ids = task.batch(2000, 12, torch.Generator().manual_seed(1))
    e = ord("n")
    assert e not in task.triggers.tolist()
    after = ids[:, 3:][ids[:, 2:-1] == e]
    want = torch.bincount(text[1:][text[:-1] == e], minlength=256).float()
    got = torch.bincount(after, minlength=256).float()
    assert (got / got.sum() - want / want.sum()).abs().max() < 0.05


def test_same_number_same_batch(task):
    one, other = task.batches(3, 10, seed=2), task.batches(3, 10, seed=2)
    assert torch.equal(one(5)[0], other(5)[0]) and not torch.equal(one(5)[0], one(6)[0])
    ids, labels = one(0)
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    fixed, same = with_fixed_token(one, 7, 2)(0)
    assert (fixed[:, 2] == 7).all() and torch.equal(same, labels) and torch.equal(one(0)[0], ids)
    with pytest.raises(ValueError, match="place"):
        with_fixed_token(one, 7, 10)(0)
    with pytest.raises(ValueError, match="triggers"):
        BackcopyText(triggers=256)


def test_curve_of_a_training(task):
    torch.manual_seed(0)
    model = SmallLM(257, 16, 1, 2, "similarity", mixer_options={"slot": "kv"})
    held_out = task.batch(4, 12, torch.Generator().manual_seed(9))
    before = model_weights(model, held_out, slots=True)
    points = train_watching_sinks(
        model, task.batches(2, 12), held_out, steps=5, every=2, slots=1, keys=3, epsilon=0.1, lr=1e-3, progress=False
    )
    assert [point.step for point in points] == [0, 2, 4, 5]
    assert math.isnan(points[0].loss) and all(math.isfinite(point.loss) for point in points[1:])
    assert points[0].rates == pytest.approx(sink_rate(before, 0.1, None, slots=1)[:3].tolist())
    after = sink_rate(model_weights(model, held_out, slots=True), 0.1, None, slots=1)
    assert points[-1].rates == pytest.approx(after[:3].tolist())
    with pytest.raises(ValueError, match="keys"):
        train_watching_sinks(model, task.batches(2, 12), held_out, steps=1, every=1, keys=14)
