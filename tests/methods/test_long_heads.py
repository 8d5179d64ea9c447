"""LongHeads: within the budget the model as it is, beyond it what the op says, decoding included; batches, beams, crops, errors."""

import copy

import pytest
import torch
from sparse_models import generated, padded_batch, prompt
from transformers import GPT2Config, GPT2LMHeadModel

import regard
from regard.methods.caches import LongHeadsLayer
from regard.methods.rotary import RotaryOf
from regard.ops.select import chunk_select_attention
from tiny import tiny_llama

FORCED = torch.tensor([[5, 9, 2, 44, 7, 3, 90, 8, 21, 60, 61, 62]])
SMALL = {"chunk": 8, "budget": 40}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@torch.no_grad()
def steps(model, ids, forced, *methods, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    with regard.attach(model, *methods):
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        for token in forced.expand(len(ids), -1).unbind(1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            at = positions(mask)[:, -1:]
            out = model(token[:, None], attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.stack(logits), cache


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("options", [{"chunk": 8, "budget": 200}, {"chunk": 16, "budget": 0.99, "start": 300}])
def test_texts_within_start_are_read_as_usual(model, options):
    want, _ = steps(model, prompt(), FORCED)
    got, _ = steps(model, prompt(), FORCED, regard.LongHeads(**options))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_decoding_with_all_chunks_chosen_is_dense(model):
    """n div w = budget / w - 1: taking all chunks side by side moves nothing."""
    ids = prompt(32)
    want, _ = steps(model, ids, FORCED[:, :7])
    got, _ = steps(model, ids, FORCED[:, :7], regard.LongHeads(chunk=8, budget=40, start=32))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_prompt_is_the_op(model, variant):
    """One layer's call against `chunk_select_attention` on queries and keys before the rotary embedding."""
    seen = {}

    class Spy(regard.Method):
        def edit(self, call):
            if call.layer == 0:
                call.on_output(lambda out: seen.setdefault("out", out))
                seen.update(q=call.q, k=call.k, v=call.v)

    with torch.no_grad(), regard.attach(model, regard.LongHeads(**SMALL, variant=variant), Spy()):
        model(prompt(), use_cache=True)
    rotary = RotaryOf(model, "test")
    at = torch.arange(90)[None]
    q, k = rotary.undo(seen["q"], at), rotary.undo(seen["k"], at)
    want = chunk_select_attention(q, k, seen["v"], rotate=rotary.turn, **SMALL, include_self=variant == "paper")
    torch.testing.assert_close(seen["out"], want, rtol=1e-4, atol=1e-5)


def test_decoding_goes_on_like_a_prompt(model):
    """In variant "paper", where prompt and decoding follow one rule but for the last token of a chunk."""
    method = regard.LongHeads(chunk=8, budget=40, variant="paper")
    ids = torch.cat([prompt(80), FORCED], 1)
    got, _ = steps(model, ids[:, :80], FORCED[:, :7], method)
    with torch.no_grad(), regard.attach(model, method):
        want = model(ids[:, :87], use_cache=False).logits[:, 79:87]
    torch.testing.assert_close(got[:, 0], want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [SMALL, {"chunk": 4, "budget": 0.3}, {**SMALL, "offload": "cpu", "start": 50}])
def test_rows_of_different_length_do_not_meet(model, options):
    ids, mask, alone = padded_batch(90, 61)
    both, _ = steps(model, ids, FORCED, regard.LongHeads(**options), mask=mask)
    for row, one in enumerate(alone):
        want, _ = steps(model, one, FORCED, regard.LongHeads(**options))
        torch.testing.assert_close(both[:, row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_prompt_in_pieces(model):
    method = regard.LongHeads(**SMALL)
    want, _ = steps(model, prompt(180), FORCED, method)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        for piece in prompt(180).split([35, 60, 85], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], want[0], rtol=1e-4, atol=1e-5)
        out = model(FORCED, past_key_values=cache, use_cache=True)  # twelve tokens at once are decoded one by one
    torch.testing.assert_close(out.logits[0], want[1:, 0], rtol=1e-4, atol=1e-5)


def test_positions_stay_within_the_budget(model, monkeypatch):
    turned = []
    turn = RotaryOf.turn
    monkeypatch.setattr(RotaryOf, "turn", lambda self, x, at: turned.append(int(at.max())) or turn(self, x, at))
    _, cache = steps(model, prompt(300), FORCED, regard.LongHeads(**SMALL))
    assert max(turned) < 40
    lists = [layer._chosen(torch.randn(1, 4, 1, 8), torch.tensor([39]), torch.tensor([4])) for layer in cache.layers]
    for chosen in lists:
        assert (chosen[..., 0] == 0).all() and (chosen[..., -1] == 38).all() and chosen.shape[-1] == 4
    assert any(len({tuple(head) for head in chosen[0].tolist()}) > 1 for chosen in lists)  # heads read different parts


def test_features_made_while_decoding_are_those_of_a_prompt(model):
    method = regard.LongHeads(**SMALL, start=1000)
    _, grown = steps(model, prompt(50), FORCED, method)
    with torch.no_grad(), regard.attach(model, method) as session:
        whole = session.new_cache()
        model(torch.cat([prompt(50), FORCED], 1), past_key_values=whole, use_cache=True)
    for a, b in zip(grown.layers, whole.layers):
        torch.testing.assert_close(a.features[:, :, :7], b.features[:, :, :7], rtol=1e-4, atol=1e-5)


def test_crop_and_decode_again(model):
    method = regard.LongHeads(**SMALL)
    want, _ = steps(model, prompt(85), FORCED, method)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt(85), past_key_values=cache, use_cache=True)
        for token in (11, 12, 13, 14, 15):  # over the end of a chunk, and back
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache.crop(-5)
        for number, token in enumerate(FORCED[0]):
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, -1], want[number + 1], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="crop: got -40, need at most about a chunk"):
            cache.crop(-40)


def test_generate_beams_assisted_and_bf16(model):
    wide = regard.LongHeads(chunk=8, budget=200)
    beams = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with regard.attach(model, wide):
        got = model.generate(prompt(), **beams)
    assert torch.equal(got, model.generate(prompt(), **beams))
    with regard.attach(model, regard.LongHeads(**SMALL)):
        plain = generated(model, prompt(), tokens=10)
        assert torch.equal(
            model.generate(prompt(), max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3), plain
        )
    half = copy.deepcopy(model).to(torch.bfloat16)
    with regard.attach(half, regard.LongHeads(**SMALL)):
        assert generated(half, prompt(), tokens=3).shape == (1, 93)


def test_beams_follow_their_rows(model):
    ids = torch.cat([prompt(), prompt(seed=1)])
    method = regard.LongHeads(**SMALL)
    want, _ = steps(model, ids, FORCED, method)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
        for token in FORCED[0]:
            cache.reorder_cache(torch.tensor([1, 0]))
            out = model(token.view(1, 1).expand(2, 1), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], want[-1], rtol=1e-4, atol=1e-5)  # twelve swaps


def test_detach_leaves_no_trace(model):
    before = generated(model, prompt())
    with regard.attach(model, regard.LongHeads(**SMALL)):
        out = model(prompt(), use_cache=True)
        assert all(isinstance(layer, LongHeadsLayer) for layer in out.past_key_values.layers)
    assert torch.equal(before, generated(model, prompt()))


def test_models_without_rotary_embeddings_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    with pytest.raises(regard.UnsupportedModelError, match="LongHeads needs rotary"):
        regard.attach(gpt2, regard.LongHeads())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"budget": 700}, "budget: got 700, need at least three chunks, 768"),
        ({"budget": 1.5}, r"budget: got 1\.5"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"start": -1}, "start: got -1"),
        ({"variant": "papers"}, "variant: unknown name 'papers'; did you mean paper"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        regard.LongHeads(**options)
