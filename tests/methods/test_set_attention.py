"""Attention of single heads set by hand."""

import pytest
import torch

import regard
from tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(5)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 128, (2, 7), generator=torch.Generator().manual_seed(1))


def weights_of(model, ids, method, **kwargs):
    """Head outputs of layer 1, and what they would be without the method's part."""
    seen = {}

    def observe(call):
        if call.layer == 1:
            group = call.num_heads // call.num_kv_heads
            seen["v"], seen["plain"] = call.v.repeat_interleave(group, 1), call.weights()
            seen["edits"] = list(call.weight_edits)

    with regard.attach(model, method, **kwargs) as session, torch.no_grad():
        session.observers.append(observe)
        logits = model(ids).logits
    weights = seen["plain"]
    for fn, heads in seen["edits"]:
        weights = weights.index_copy(1, torch.tensor(heads), fn(weights[:, heads]))
    return weights, seen["plain"], logits


def test_the_last_row_looks_where_it_is_told(model, ids):
    span = torch.zeros(2, 7, dtype=torch.bool)
    span[0, [2, 4]] = True
    method = regard.SetAttention({(1, 2): "there", (1, 0): torch.tensor([0.0, 3.0, 1.0]), (-2, 3): "there"})
    weights, plain, _ = weights_of(model, ids, method, spans={"there": span})
    assert weights[0, 2, -1].tolist() == [0, 0, 0.5, 0, 0.5, 0, 0]
    torch.testing.assert_close(weights[1, 2], plain[1, 2])  # no token of this row is in the span
    assert weights[1, 0, -1].tolist() == [0, 0.75, 0.25, 0, 0, 0, 0]
    assert weights[0, 3, -1].tolist() == [0, 0, 0.5, 0, 0.5, 0, 0]  # counted from the end
    torch.testing.assert_close(weights[:, :, :-1], plain[:, :, :-1])
    torch.testing.assert_close(weights[:, 1], plain[:, 1])


def test_strength(model, ids):
    target = torch.zeros(7)
    target[3] = 2.0
    half, plain, _ = weights_of(model, ids, regard.SetAttention({(1, 1): target}, strength=0.5))
    torch.testing.assert_close(half[:, 1, -1], plain[:, 1, -1] / 2 + 0.5 * torch.eye(7)[3])
    with torch.no_grad():
        own = model(ids).logits
    none = weights_of(model, ids, regard.SetAttention({(1, 1): target}, strength=0.0))[2]
    torch.testing.assert_close(none, own)
    same = weights_of(model, ids, regard.SetAttention({(1, 1): plain[:, 1, -1]}))[2]
    torch.testing.assert_close(same, own, rtol=1e-4, atol=1e-5)
    other = weights_of(model, ids, regard.SetAttention({(1, 1): target}))[2]
    torch.testing.assert_close(other[:, :-1], own[:, :-1])
    assert (other[:, -1] - own[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(("phase", "same"), [("prompt", True), ("all", False)])
def test_decoding(model, ids, phase, same):
    target = torch.zeros(7)
    target[3] = 1.0
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        token = ids[:, :1]
        own = model(torch.cat([ids, token], 1)).logits[:, -1]
        with regard.attach(model, regard.SetAttention({(2, 1): target}, phase=phase)):
            said = model(token, past_key_values=past).logits[:, -1]
    assert torch.allclose(said, own, atol=1e-5) == same


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ([(1, 1)], TypeError, "targets"),
        ({1: "x"}, ValueError, "pairs"),
        ({(1, 1): 3}, TypeError, "targets"),
        ({(1, 1): torch.zeros(3)}, ValueError, "targets"),
    ],
)
def test_bad_targets(targets, error, words):
    with pytest.raises(error, match=words):
        regard.SetAttention(targets)


def test_bad_places(model, ids):
    with pytest.raises(ValueError, match="heads"):
        regard.attach(model, regard.SetAttention({(3, 1): "x"}))
    for target, words in (((1, 4), r"\[0, 4\)"), ((1, 1), "span")):
        with regard.attach(model, regard.SetAttention({target: "x"})), pytest.raises(ValueError, match=words):
            model(ids)
    with (
        regard.attach(model, regard.SetAttention({(0, 1): torch.ones(9)})),
        pytest.raises(ValueError, match="at most 7"),
    ):
        model(ids)
    with pytest.raises(ValueError, match="strength"):
        regard.SetAttention({}, strength=2.0)
