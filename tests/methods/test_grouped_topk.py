"""GroupedTopK on models: the rule of the paper, limits, padding, beams, crops, errors."""

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt

import regard
from regard import GroupedTopK, UnsupportedModelError
from regard.methods.call import AttentionCall, Method
from regard.ops.select import grouped_block_topk, grouped_topk
from tiny import tiny_llama

SMALL = {"budget": 24, "block_size": 4, "sink": 4, "recent": 8, "dense_layers": 0}


class FakeCache:
    def get_seq_length(self):
        return 60


def decode(seed=0, batch=1, **options):
    return call(rows=1, keys=60, seed=seed, batch=batch, cache=FakeCache(), **options)


@pytest.mark.parametrize(("block", "sink", "recent"), [(1, 4, 8), (4, 4, 8), (5, 4, 7), (8, 3, 9), (16, 0, 1)])
def test_a_call_follows_the_rule_on_scores(block, sink, recent):
    topk = 2 if block > 1 else 9
    one = decode(batch=2)
    method = GroupedTopK(sink + recent + topk * block, block, sink, recent, dense_layers=0)
    out = one.run([method])
    scores = (one.q @ one.k.repeat_interleave(2, 1).transpose(-1, -2))[:, :, 0]
    rule = {"num_kv_heads": 2, "recent": recent, "sink": sink}
    kept = (
        grouped_topk(scores, topk, **rule) if block == 1 else grouped_block_topk(scores, topk, **rule, block_size=block)
    )
    weights = (scores * 8**-0.5).masked_fill(~kept.repeat_interleave(2, 1), -torch.inf).softmax(-1)
    wanted = weights[:, :, None] @ one.v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    assert kept.sum(-1).max() < 60


def test_the_prompt_and_a_budget_of_the_whole_context_are_dense():
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    with regard.attach(model, GroupedTopK(**SMALL)):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
    for budget in (96, 1.0):
        with regard.attach(model, GroupedTopK(**SMALL | {"budget": budget})):
            assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


def test_padding_changes_nothing_and_the_count_is_the_budget():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    counts = []

    class Watch(Method):
        def edit(self, call: AttentionCall) -> None:
            if call.phase == "decode":
                call.on_output(lambda out: counts.append((call.weights() > 0).sum(-1).max()) or out)

    with regard.attach(model, GroupedTopK(**SMALL), Watch()):
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])
    assert counts and all(24 <= count < 24 + 4 for count in counts)  # keys that fill no block are read too


def test_summaries_follow_the_growing_row():
    """Step by step with kept summaries, or each step anew from the whole cache: the same."""
    model, ids = tiny_llama(), prompt()
    method = GroupedTopK(**SMALL)
    with regard.attach(model, method):
        told = generated(model, ids, tokens=14)

    class Forgetful(GroupedTopK):
        def choose(self, stretch):
            stretch.memory.clear()
            return super().choose(stretch)

    with regard.attach(model, Forgetful(**SMALL)):
        assert torch.equal(generated(model, ids, tokens=14), told)
        beams = generated(model, ids, tokens=12, num_beams=3)
    with regard.attach(model, method):
        assert torch.equal(generated(model, ids, tokens=12, num_beams=3), beams)
        assert torch.equal(generated(model, ids, cache_implementation="static", tokens=14), told)


def test_tokens_taken_back():
    """A cache that is cropped by one token and given another one: the last block is summarised anew, finished block or not."""
    model = tiny_llama()
    for length in (88, 89, 91):
        ids = prompt(length)
        results = []
        for detour in (False, True):
            with regard.attach(model, GroupedTopK(**SMALL)), torch.no_grad():
                cache = model(ids[:, :-3], use_cache=True).past_key_values
                steps = [ids[:, -3:-2], ids[:, -2:-1], ids[:, -1:]]
                if detour:
                    model(steps[0] * 0 + 7, past_key_values=cache)
                    cache.crop(-1)
                results.append([model(step, past_key_values=cache).logits for step in steps][-1])
        assert torch.equal(*results)


def test_a_fraction_and_short_contexts():
    model = tiny_llama()
    for length in (1, 2, 9, 30):
        with regard.attach(model, GroupedTopK(budget=0.1, block_size=4, recent=8, dense_layers=0)):
            assert generated(model, prompt(length), tokens=3).shape[1] == length + 3


def test_half_precision():
    model = tiny_llama().bfloat16()
    with regard.attach(model, GroupedTopK(**SMALL)):
        assert generated(model, prompt(), tokens=4).shape[1] == 94


def test_dense_layers_stay_dense():
    model, ids = tiny_llama(), prompt()
    told = generated(model, ids)
    with regard.attach(model, GroupedTopK(**SMALL | {"dense_layers": 3})):
        assert torch.equal(generated(model, ids), told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget": 20, "block_size": 16, "recent": 8},
            "budget: got 20, need at least sink . recent . block_size = 28",
        ),
        ({"budget": 0.0}, "budget: got 0.0"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"recent": 0}, "recent: got 0"),
        ({"sink": -1}, "sink: got -1"),
        ({"dense_layers": "all"}, "dense_layers: got str"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GroupedTopK(**options)


def test_models_that_it_cannot_serve():
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(UnsupportedModelError, match="BertModel has no causal self-attention, and GroupedTopK"):
        regard.attach(bert, GroupedTopK())
