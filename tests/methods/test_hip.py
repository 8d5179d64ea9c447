"""HiP on models: limits, padding, decoding with and without refreshed searches, composition."""

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt

import regard
from regard import HiP, UnsupportedModelError
from regard.methods.call import AttentionCall, Method
from regard.methods.sparse import hip as hip_module
from regard.ops.select import hierarchical_topk_attention
from tiny import tiny_llama

SMALL = {"budget": 12, "window": 6, "block_q": 8, "dense_layers": 0}


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_budget_of_the_whole_context_is_dense(variant):
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    for budget in (96, 1.0):
        with regard.attach(
            model, HiP(budget=budget, window=4, block_q=8, dense_layers=0, variant=variant, refresh_every=3)
        ):
            torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
            assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


def test_a_call_is_the_op():
    one = call(rows=60, scale=0.5)
    wanted = hierarchical_topk_attention(one.q, one.k, one.v, 12, 8, 2, 6, scale=0.5)
    torch.testing.assert_close(one.run([HiP(**SMALL)]), wanted, rtol=1e-5, atol=1e-6)
    late = call(rows=20, keys=60)
    wanted = hierarchical_topk_attention(late.q, late.k, late.v, 15, 8, 2, 6, sink=4)
    torch.testing.assert_close(late.run([HiP(**SMALL | {"budget": 0.25, "sink": 4})]), wanted, rtol=1e-5, atol=1e-6)


def test_it_is_sparse_and_padding_changes_nothing():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    dense = logits(model, alone[0])
    with regard.attach(model, HiP(**SMALL)):
        rows = logits(model, ids, attention_mask=mask)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(rows[0], dense[0], atol=1e-3)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])


@pytest.mark.parametrize("refresh_every", [1, 4])
def test_a_static_cache_gives_the_same(refresh_every):
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, HiP(**SMALL, refresh_every=refresh_every)):
        assert torch.equal(generated(model, ids, cache_implementation="static"), generated(model, ids))


def test_decoding_searches_for_the_last_query():
    model, ids = tiny_llama(num_hidden_layers=1), prompt()
    seen = []

    class Watch(Method):
        def edit(self, call: AttentionCall) -> None:
            if call.phase == "decode":
                call.on_output(lambda out: seen.append((call, out)) or out)

    with regard.attach(model, HiP(**SMALL), Watch()):
        generated(model, ids, tokens=3)
    assert len(seen) == 2
    for one, out in seen:
        wanted = hierarchical_topk_attention(one.q, one.k, one.v, 12, 8, 2, 6, scale=one.scale)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_between_searches_what_was_found_stays(monkeypatch):
    model, ids = tiny_llama(num_hidden_layers=1), prompt()
    searched, sets = [], []
    original = hip_module.hierarchical_topk

    def counted(q, k, *args, **kwargs):
        searched.append((q.shape[2], k.shape[2]))
        return original(q, k, *args, **kwargs)

    monkeypatch.setattr(hip_module, "hierarchical_topk", counted)

    class Watch(Method):
        def edit(self, call: AttentionCall) -> None:
            if call.phase == "decode":
                call.on_output(
                    lambda out: sets.append((call.weights()[0, 0, 0] > 0).nonzero().flatten().tolist()) or out
                )

    with regard.attach(model, HiP(**SMALL, refresh_every=3), Watch()):
        generated(model, ids, tokens=8)
        generated(model, prompt(60, seed=5), tokens=3)  # another sequence begins with a search of its own
    assert searched == [(90, 90), (1, 91), (1, 94), (1, 97), (60, 60), (1, 61)]
    for first in (0, 3):  # steps of one search: the same old keys, and no recent key is lost
        assert set(sets[first]) < set(sets[first + 1]) < set(sets[first + 2])
        assert sets[first + 2][-8:] == list(range(91 + first - 6, 91 + first + 2))


@pytest.mark.parametrize(
    "options",
    [{"query_dims": 3}, {"resolution": 2}, {"sifters": 2}, {"representative": "random", "refresh_every": 2}],
)
def test_options_of_the_search_act_and_padding_changes_nothing(options):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    with regard.attach(model, HiP(**SMALL)):
        plain = logits(model, alone[0])
    with regard.attach(model, HiP(**SMALL, **options)):
        assert not torch.allclose(logits(model, alone[0]), plain, atol=1e-4)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])


def test_dense_layers():
    model, ids = tiny_llama(), prompt()
    dense = logits(model, ids)

    def given(dense_layers):
        with regard.attach(model, HiP(**SMALL | {"dense_layers": dense_layers})):
            return logits(model, ids)

    assert torch.equal(given(3), dense) and torch.equal(given([0, 1, -1]), dense)
    torch.testing.assert_close(given(1), given((0,)))
    torch.testing.assert_close(given(range(1, 3)), given([-1, -2]))
    assert not torch.allclose(given(1), given([-1]), atol=1e-4)


def test_layers_with_a_shorter_window_are_left_alone():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = MistralForCausalLM(MistralConfig(**config, num_key_value_heads=2, sliding_window=20)).eval()
    long, short = prompt(), prompt(20)
    dense = logits(model, long), logits(model, short)
    with regard.attach(model, HiP(**SMALL | {"budget": 4})):
        torch.testing.assert_close(logits(model, long), dense[0])
        assert not torch.allclose(logits(model, short), dense[1], atol=1e-4)


@pytest.mark.parametrize("padding", [None, [0, 11]])
def test_weights_and_edits_speak_of_what_was_chosen(padding):
    """Whoever reads the weights gets those that made the output; biases and edits of weights take part, padded or not."""
    torch.manual_seed(0)
    bias, factor = torch.randn(1, 4, 1, 60), torch.rand(4, 1, 1)

    class Edits(Method):
        def __init__(self, bias=None, factor=None):
            self.bias, self.factor = bias, factor

        def edit(self, call):
            if self.bias is not None:
                call.add_bias(self.bias)
            if self.factor is not None:
                call.on_weights(lambda weights: weights * self.factor)

    for edits in (Edits(), Edits(bias), Edits(bias, factor)):
        one = call(batch=2, padding=padding)
        out = one.run([edits, HiP(**SMALL)])
        weights = one.weights()
        assert (weights[:, :, -1] > 0).sum(-1).max() <= 12 + 6 + 2
        if edits.factor is not None:
            weights = weights * edits.factor
        by_hand = weights @ one.v.repeat_interleave(2, 1)
        torch.testing.assert_close(out, by_hand, rtol=1e-5, atol=1e-6)


def test_two_that_choose_get_in_each_others_way():
    model = tiny_llama()
    for other in (regard.DHSA(), regard.S2Attention(), regard.SlidingWindow(8)):
        with pytest.raises(ValueError, match="HiP"):
            regard.attach(model, HiP(), other)


def test_models_that_it_cannot_serve():
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(
        UnsupportedModelError, match="BertModel has no causal self-attention, and HiP is for causal models only"
    ):
        regard.attach(bert, HiP())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"budget": 1.2}, "budget: got 1.2"),
        ({"budget": 4, "group": 8}, "budget: got 4, need at least group = 8"),
        ({"window": 4, "group": 8}, "window: got 4, need at least group = 8"),
        ({"window": 0}, "window: got 0"),
        ({"refresh_every": 0}, "refresh_every: got 0"),
        ({"dense_layers": -1}, "dense_layers: got -1"),
        ({"dense_layers": "first"}, "dense_layers: got str"),
        ({"variant": "v1"}, "variant: unknown name 'v1'"),
        ({"query_dims": 0}, "query_dims: got 0"),
        ({"resolution": 0}, "resolution: got 0"),
        ({"sifters": 3}, "sifters: got 3"),
        ({"representative": "best"}, "representative: unknown name 'best'"),
        ({"sifters": 2, "variant": "paper"}, "variant: got 'paper', need sifters=1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        HiP(**options)


def test_a_model_of_which_nothing_is_left_to_treat_is_warned_of():
    model = tiny_llama()  # three layers, as many as stay dense by default
    with pytest.warns(UserWarning, match="dense_layers=3 leaves all 3 layers"):
        regard.attach(model, regard.HiP()).detach()
