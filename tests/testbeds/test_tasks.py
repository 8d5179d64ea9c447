"""Synthetic tasks: every label follows from what stands before it, and the text bytes come from where they are said to."""

from __future__ import annotations

import pytest
import torch

from regard.testbeds import tasks
from regard.testbeds.texts import ByteText


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fill", [False, True])
def test_mqar_asks_every_key_once(fill):
    ids, labels = tasks.mqar(40, 64, 8, 512, random_fill=fill, generator=drawn())
    assert ids.shape == labels.shape == (40, 64)
    for row, label in zip(ids, labels):
        keys, values = row[:16:2], row[1:16:2]
        assert len(set(keys.tolist())) == len(set(values.tolist())) == 8
        assert keys.min() >= 1 and keys.max() < 256 and values.min() >= 256 and values.max() < 512
        asked = (label != -100).nonzero().flatten()
        assert len(asked) == 8 and (asked % 2 == 0).all() and asked.min() >= 16
        told = dict(zip(keys.tolist(), values.tolist()))
        assert sorted(row[asked].tolist()) == sorted(told)
        assert [told[int(k)] for k in row[asked]] == label[asked].tolist()
        rest = row[16:][label[16:] == -100]
        assert fill or (rest == 0).all()


def test_mqar_gaps_follow_the_power_law():
    _, labels = tasks.mqar(4000, 64, 1, 64, power=0.01, generator=drawn())
    gaps = ((labels != -100).nonzero()[:, 1] - 2) // 2
    weight = torch.arange(1, 32, dtype=torch.float64) ** -0.99
    expected = weight / weight.sum()
    found = torch.bincount(gaps, minlength=31) / 4000
    assert (found - expected).abs().max() < 0.025  # 3 standard errors of the largest share


def test_mqar_is_made_again_from_its_seed():
    first, again, other = (tasks.mqar(3, 16, 2, 64, generator=drawn(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    make = tasks.batches(tasks.mqar, 3, 16, 2, 64, seed=4)
    assert torch.equal(make(5)[0], make(5)[0]) and not torch.equal(make(5)[0], make(6)[0])


def test_induction_copy_selective_copy_parity():
    ids, labels = tasks.induction(30, 20, generator=drawn())
    for row, label in zip(ids, labels):
        first = int((row == 0).nonzero()[0])
        assert (row == 0).sum() == 2 and row[-1] == 0 and label[-1] == row[first + 1] and (label[:-1] == -100).all()
    ids, labels = tasks.copy(5, 12, generator=drawn())
    assert torch.equal(labels[:, 6:], ids[:, :6]) and torch.equal(ids[:, 7:], ids[:, :5]) and (ids[:, 6] == 0).all()
    ids, labels = tasks.selective_copy(9, 30, tokens=5, generator=drawn())
    for row, label in zip(ids, labels):
        assert row[:25][row[:25] != 0].tolist() == label[25:].tolist() and (row[25:] == 1).all()
    ids, labels = tasks.parity(4, 9, generator=drawn())
    assert all(int(labels[i, n]) == int(ids[i, : n + 1].sum()) % 2 for i in range(4) for n in range(9))


def test_regression_is_solved_by_least_squares():
    inputs, targets = tasks.in_context_regression(6, 12, dim=3, generator=drawn())
    assert inputs.shape == (6, 13, 4) and (inputs[:, -1, -1] == 0).all()
    w = torch.linalg.lstsq(inputs[:, :-1, :3], inputs[:, :-1, 3:]).solution
    torch.testing.assert_close((inputs[:, -1:, :3] @ w)[:, 0], targets, rtol=1e-3, atol=1e-4)


def test_accuracy_counts_only_what_is_asked():
    logits = torch.eye(4)[None]
    assert tasks.accuracy(logits, torch.tensor([[0, -100, 2, 1]])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tasks.mqar(2, 15, 2), "length"),
        (lambda: tasks.mqar(2, 16, 5), "4 \\* pairs"),
        (lambda: tasks.mqar(2, 64, 8, 16), "number of keys"),
        (lambda: tasks.mqar(2, 64, 8, power=0.0), "power"),
        (lambda: tasks.copy(2, 7), "length"),
        (lambda: tasks.selective_copy(2, 7, tokens=4), "tokens"),
        (lambda: tasks.induction(2, 2), "length"),
        (lambda: tasks.in_context_regression(2, 3, noise=-1.0), "noise"),
    ],
)
def test_bad_arguments(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_text_from_folders_and_files(tmp_path):
    (tmp_path / "b.txt").write_text("second" * 50)
    (tmp_path / "a.md").write_text("first" * 50)
    (tmp_path / "c.bin").write_bytes(b"\0" * 500)
    text = ByteText(tmp_path, share=0.2)
    whole = bytes(torch.cat((text.learn, text.kept)).tolist())
    assert whole == b"first" * 50 + b"\n" + b"second" * 50 and len(text.kept) == round(0.2 * len(whole))
    assert bytes(ByteText(tmp_path / "b.txt").learn.tolist()).startswith(b"second")
    ids, after = text.batches(3, 10, seed=1)(7)
    assert torch.equal(ids[:, 1:], after[:, :-1])
    assert torch.equal(ids, text.batches(3, 10, seed=1)(7)[0])


def test_text_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="source"):
        ByteText(tmp_path / "nothing")
    with pytest.raises(ValueError, match="folder"):
        ByteText(tmp_path)


def test_text_from_the_hub(monkeypatch):
    import sys
    import types

    asked = {}

    def load_dataset(name, config, split, streaming):
        asked.update(name=name, config=config, split=split, streaming=streaming)
        return iter([{"text": "one"}, {"text": "two"}, {"text": "three"}])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    text = ByteText("hf:me/mine//raw:test", share=0.0, limit=2)
    assert bytes(text.learn.tolist()) == b"one\ntwo"
    assert asked == {"name": "me/mine", "config": "raw", "split": "test", "streaming": True}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="datasets"):
        ByteText("hf:x")
