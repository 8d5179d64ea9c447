"""Plans on models: the cache holds what its rules say, decoding sees what the masks say, and nothing depends on padding."""

import copy

import pytest
import torch
import transformers
from sparse_models import generated, logits, padded_batch, prompt
from torch import nn
from transformers import BertConfig, BertModel

import regard
from regard import HeadPlan, PlannedAttention, UnsupportedModelError
from regard.methods import AttentionCall
from regard.methods.caches import kv_bytes
from regard.methods.caches.planned import PlannedLayer
from regard.methods.plans import BlockLocal, Full, Sharded, Window
from tiny import tiny_llama

PLANS = {
    "block-local": HeadPlan(((Full(),), (BlockLocal(8, 1),), (BlockLocal(5, 0),))),
    "windows": HeadPlan(
        ((Window(3, 9),), (Window(0, 20), Full()), (Window(3, 4), Window(3, 30), Window(3, 9), Window(3, 9)))
    ),
    "sharded": HeadPlan(
        (
            (Sharded(4, 2, 3, 0), Sharded(4, 2, 3, 1)),
            (Sharded(4, 2, 2, 0, sink=3), Sharded(4, 2, 2, 1, sink=3)),
            (Sharded(8, 1, 4, 3),),
        )
    ),
    "mixed": HeadPlan(((Full(), Window(2, 6)), (BlockLocal(8, 0), Full()), (Full(), Full(), Window(1, 8), Full()))),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def in_pieces(model, session, ids, pieces, attention_mask=None):
    """Logits of all tokens, read in pieces of the given sizes and then one by one."""
    cache, outs, at = session.new_cache(), [], 0
    pieces = [*pieces, *[1] * (ids.shape[1] - sum(pieces))]
    with torch.no_grad():
        for n in pieces:
            mask = {} if attention_mask is None else {"attention_mask": attention_mask[:, : at + n]}
            outs.append(model(ids[:, at : at + n], past_key_values=cache, **mask).logits)
            at += n
    return torch.cat(outs, 1), cache


@pytest.mark.parametrize("name", PLANS)
def test_decoding_sees_what_the_masks_say_and_padding_changes_nothing(model, name):
    ids, mask, alone = padded_batch()
    with regard.attach(model, PlannedAttention(PLANS[name])) as session:
        rows = logits(model, ids, attention_mask=mask, use_cache=False)
        for row, text in zip(rows, alone):
            whole = logits(model, text, use_cache=False)
            torch.testing.assert_close(row[-text.shape[1] :], whole[0], rtol=1e-5, atol=1e-5)
            for pieces in ((5, 1, 3, 1, 1, 11, 1), (50, 1, 1, 17), (1,)):
                got, _ = in_pieces(model, session, text, pieces)
                torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
        for pieces in ((40, 1, 1, 5, 1), (10, 3, 30)):  # the second begins inside the padding
            got, _ = in_pieces(model, session, ids, pieces, mask)
            torch.testing.assert_close(got[mask.bool()], rows[mask.bool()], rtol=1e-5, atol=1e-5)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])


@pytest.mark.parametrize("name", PLANS)
def test_the_cache_holds_what_the_plan_says(model, name):
    ids, plan = prompt(400), PLANS[name]
    with regard.attach(model, PlannedAttention(plan)) as session:
        _, cache = in_pieces(model, session, ids, (390,))
    for layer, rules in zip(cache.layers, plan.layers):
        for group in layer.groups:
            held = group.positions(400, torch.zeros(1, dtype=torch.long))
            assert int((held >= 0).sum(-1).max()) >= max(1, min(rule.tokens(400) for rule in rules))
    stored = kv_bytes(cache) / (2 * 8 * 4)  # entries: keys and values, 8 numbers of 4 bytes
    kept = sum(
        max(rules[i * len(rules) // 2].tokens(400), rules[(i + 1) * len(rules) // 2 - 1].tokens(400))
        for rules in plan.layers
        for i in range(2)
        if len(rules) > 1
    ) + sum(2 * rules[0].tokens(400) for rules in plan.layers if len(rules) == 1)
    pages = 128 * sum(
        isinstance(rule, Full) for rules in plan.layers for rule in (rules if len(rules) > 1 else rules * 2)
    )
    assert kept <= stored * 1.05 and stored <= kept + pages + 64


def test_a_plan_that_keeps_everything_changes_nothing(model):
    ids = prompt()
    dense, told = logits(model, ids), generated(model, ids)
    for rule in (Full(), Window(0, 200), BlockLocal(100, 0), Sharded(8, 12, 3), Sharded(8, 1, 1)):
        with regard.attach(model, PlannedAttention(HeadPlan(((rule,),) * 3))):
            torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
            assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


def test_windows_are_streaming_llm(model):
    ids = prompt()
    with regard.attach(model, PlannedAttention(HeadPlan(((Window(4, 20),),) * 3))):
        one = generated(model, ids, 12)
    with regard.attach(model, regard.StreamingLLM(sink=4, window=20, positions="kept")):
        assert torch.equal(generated(model, ids, 12), one)


def test_gates_are_duo_attention(model):
    ids, gates = prompt(), torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6]])
    with regard.attach(model, PlannedAttention(HeadPlan.from_gates(gates, 0.5, sink=4, recent=20))):
        one = logits(model, ids), generated(model, ids, 12)
    with regard.attach(model, regard.DuoAttention(0.5, gates, sink=4, recent=20, variant="paper")):
        torch.testing.assert_close(logits(model, ids), one[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids, 12), one[1])


@pytest.mark.parametrize("name", PLANS)
def test_beams_copies_and_reset(model, name):
    ids, mask, _ = padded_batch()
    with regard.attach(model, PlannedAttention(PLANS[name])) as session:
        beams = generated(model, ids, attention_mask=mask, num_beams=3)
        swapped = generated(model, ids.flip(0), attention_mask=mask.flip(0), num_beams=3)
        assert torch.equal(beams.flip(0), swapped)
        _, cache = in_pieces(model, session, prompt(), (60,))
        step = torch.tensor([[7]])
        twin = copy.deepcopy(cache)
        with torch.no_grad():
            one = model(step, past_key_values=cache).logits
            two = model(step, past_key_values=twin).logits
        assert torch.equal(one, two)
        cache.layers[0].reset()
        assert cache.layers[0].get_seq_length() == 0 and not cache.layers[0].groups


def test_taking_back_works_until_something_was_evicted(model):
    layer = HeadPlan(((Window(2, 30),),) * 3)
    ids = prompt(40)
    with regard.attach(model, PlannedAttention(layer)) as session:
        want, _ = in_pieces(model, session, ids, (20,))
        _, cache = in_pieces(model, session, ids[:, :25], (20,))
        cache.crop(20)
        with torch.no_grad():
            outs = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]
        torch.testing.assert_close(torch.cat(outs, 1), want[:, 20:], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="cannot: it has evicted"):
            cache.crop(30)


def family(name):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if name == "GPT2LMHead":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128, **special)
        ).eval()
    more = {"Gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24}}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**sizes, **special, **more, max_position_embeddings=128)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["GPT2LMHead", "GPTNeoX", "Gemma2"])
def test_other_families(name):
    """Learned positions, partial rotary embeddings, soft caps beside sliding windows of the model's own."""
    other, ids = family(name), prompt(60).clamp(max=96)
    with regard.attach(
        other, PlannedAttention(HeadPlan(((Window(2, 14),), (BlockLocal(8, 1),), (Sharded(4, 2, 3, 1),))))
    ):
        whole = logits(other, ids, use_cache=False)
        with torch.no_grad():
            past = other(ids[:, :40], use_cache=True).past_key_values
            steps = [other(ids[:, i : i + 1], past_key_values=past).logits for i in range(40, 60)]
        torch.testing.assert_close(torch.cat(steps, 1), whole[:, 40:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(other, ids), whole, atol=1e-4)


def test_half_precision_and_gradients_through_the_mask(model):
    ids = prompt()
    half = tiny_llama().bfloat16()
    with regard.attach(half, PlannedAttention(PLANS["mixed"])):
        assert generated(half, ids).dtype == torch.long
        assert logits(half, ids).dtype == torch.bfloat16
    trained = tiny_llama().train()
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    with regard.attach(trained, PlannedAttention(PLANS["mixed"])):
        loss = {}
        for use_cache in (False, True):
            trained.zero_grad()
            trained(ids, labels=ids, use_cache=use_cache).loss.backward()
            loss[use_cache] = [p.grad.clone() for p in trained.parameters()]
    for a, b in zip(*loss.values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(bool(g.abs().max() > 0) for g in loss[True])


def test_a_gradient_flows_through_the_cache():
    layer = PlannedLayer(lambda seen, heads, kv: [Window(1, 3)] * heads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=generator, requires_grad=True) for _ in range(3))
    outs = []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 9)):
        layer.update(k[:, :, piece], v[:, :, piece])
        call = AttentionCall(nn.Identity(), 0, q[:, :, piece], k[:, :, piece], v[:, :, piece], causal=True, cache=layer)
        call.extra_mask = Window(1, 3).mask()
        outs.append(layer.attend(call))
    got = torch.autograd.grad(torch.cat(outs, 2).square().sum(), (q, k, v))
    mask = Window(1, 3).mask() & regard.masks.causal
    want = torch.autograd.grad(regard.ops.attention(q, k, v, mask=mask).square().sum(), (q, k, v))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_it_says(model):
    with pytest.raises(ValueError, match="plan: got .2 layers., need 3"):
        regard.attach(model, PlannedAttention(HeadPlan(((Full(),),) * 2)))
    with pytest.raises(ValueError, match="plan: got .3 rules in layer 1"):
        regard.attach(model, PlannedAttention(HeadPlan(((Full(),), (Full(),) * 3, (Full(),)))))
    with pytest.raises(TypeError, match="plan: got int"):
        PlannedAttention(3)
    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(UnsupportedModelError, match="BertModel has no causal self-attention"):
        regard.attach(bert, PlannedAttention(HeadPlan(((Full(),),))))
