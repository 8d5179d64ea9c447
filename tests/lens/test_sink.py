"""The sink metric: closed forms, heads against the whole, a real model's sink, layers of ours, errors."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.lens import activation_norms, column_importance, model_weights, sink_rate, sink_scores
from regard.models import SmallLM


def causal(*shape, seed=0):
    scores = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(shape[-1], shape[-1]).triu(1).bool(), -torch.inf).softmax(-1)


def test_all_on_the_first_token_and_all_alike():
    first = torch.zeros(2, 3, 8, 8)
    first[..., 0] = 1.0
    assert sink_rate(first) == 100.0
    assert torch.equal(sink_rate(first, key=None)[1:], torch.zeros(7))
    uniform = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    harmonic = sum(1 / n for n in range(1, 9)) / 8
    assert float(column_importance(uniform)[0]) == pytest.approx(harmonic)
    assert sink_rate(uniform, epsilon=harmonic + 1e-6) == 0.0 and sink_rate(uniform, epsilon=harmonic - 1e-6) == 100.0


def test_importance_is_a_mean_over_the_queries_that_see_the_key():
    weights = causal(2, 3, 6)
    by_hand = torch.stack([weights[..., k:, k].mean(-1) for k in range(6)], -1)
    torch.testing.assert_close(column_importance(weights), by_hand)
    slots = torch.cat((0.5 * torch.ones(2, 3, 6, 1), 0.5 * weights), -1)
    torch.testing.assert_close(column_importance(slots, 1)[..., 1:], 0.5 * by_hand)
    torch.testing.assert_close(column_importance(slots, 1)[..., 0], torch.full((2, 3), 0.5))


def test_layers_in_a_list_are_layers_in_a_tensor():
    weights = causal(4, 3, 2, 6)
    assert sink_rate(list(weights), 0.2) == pytest.approx(sink_rate(weights, 0.2))
    want = sum(float((column_importance(w)[..., 0] > 0.2).float().mean()) for w in weights) / 4
    assert sink_rate(weights, 0.2) == pytest.approx(100 * want)


def test_layers_of_ours():
    model, ids = SmallLM(20, 16, 2, 2, "similarity", mixer_options={"slot": "k"}), torch.randint(20, (3, 7))
    found = model_weights(model, ids, slots=True)
    assert [tuple(w.shape) for w in found] == [(3, 2, 7, 8)] * 2
    torch.testing.assert_close(found[0].sum(-1), torch.ones(3, 2, 7))
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)
    assert len(sink_rate(found, key=None, slots=1)) == 8
    with pytest.raises(ValueError, match="attention_weights"):
        model_weights(SmallLM(20, 16, 1, 2, "linear"), ids)


@pytest.mark.slow
def test_a_trained_model_has_a_sink_at_its_first_token():
    """Large norm in the hidden state, small key and value, queries that point at it: SmolLM2 on text, by heads and as a whole."""
    model, tokenizer = regard.load("smollm2-135m")
    ids = tokenizer(" ".join(["The cat sat on a mat, and the dog did not."] * 12))
    record = regard.record(model, torch.tensor([ids["input_ids"][:64]]), keep="qkv")
    rates = sink_rate(record, key=None)
    assert rates[0] > 50 and rates[0] > 5 * rates[8:].max()
    table = sink_scores(record)
    assert 100 * float(table.scores.mean()) == pytest.approx(float(rates[0]), abs=1e-3)
    norms = activation_norms(record)
    assert norms["value"][5:25, 0].mean() < 0.7 * norms["value"][5:25, 1:].mean()
    eager = regard.load("smollm2-135m")[0]
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(torch.tensor([ids["input_ids"][:64]]), output_attentions=True).attentions
    assert sink_rate(theirs) == pytest.approx(float(rates[0]), abs=1.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w: sink_rate(w, 1.0), "epsilon"),
        (lambda w: sink_rate(w, key=6), "key"),
        (lambda w: sink_rate(w[..., :5]), "weights"),
        (lambda w: sink_rate([]), "weights"),
        (lambda w: sink_rate([w, causal(2, 5)]), "weights"),
        (lambda w: sink_rate("w"), "weights"),
        (lambda w: column_importance(w, slots=1), "weights"),
        (lambda w: activation_norms(w), "record"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(causal(2, 6))
