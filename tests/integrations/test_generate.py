"""`generate` while attached: every way of decoding gives what it gave before, and a method's cache and logits take part."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from families import CAUSAL, build, inputs
from transformers import DynamicCache, LogitsProcessor

import regard

MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "beam": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "beam sampling": dict(do_sample=True, num_beams=2),
    "no cache": dict(do_sample=False, use_cache=False),
    "static": dict(do_sample=False, cache_implementation="static"),
    "static beam": dict(do_sample=False, num_beams=2, cache_implementation="static"),
}


def generated(model, given, **options):
    torch.manual_seed(5)
    out = model.generate(**given, max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", [*CAUSAL, "llava", "whisper"])
@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_decoding_is_kept(name, mode):
    model = build(name, implementation="eager" if name == "gemma2" else "sdpa")
    given = inputs(name, length=11)
    if name == "whisper":
        given.pop("decoder_input_ids")
    options = MODES[mode] | ({"suppress_tokens": [90]} if name == "llava" else {})  # 90 stands for an image
    before = generated(model, given, **options)
    with regard.attach(model, regard.Dense()):
        during = generated(model, given, **options)
    after = generated(model, given, **options)
    assert torch.equal(during[0], before[0])
    assert relative(during[1], before[1]) <= 1e-5
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_left_padding_changes_nothing_for_the_row():
    """A padded row generates what it generates alone, also under a sliding window with sinks."""
    model = build("llama", implementation="sdpa")
    ids = inputs("llama", length=11)["input_ids"]
    padded = torch.cat([torch.full((1, 4), 0), ids[:1, :7]], dim=1)
    batch = {"input_ids": torch.cat([padded, ids[1:]]), "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, :4] = 0
    for method in (regard.Dense(), regard.SlidingWindow(4), regard.SlidingWindow(3, sink=2)):
        with regard.attach(model, method):
            together, logits = generated(model, batch, do_sample=False)
            alone, alone_logits = generated(
                model, {"input_ids": ids[:1, :7], "attention_mask": torch.ones(1, 7).long()}, do_sample=False
            )
        assert torch.equal(together[:1, 4:], alone)
        assert relative(logits[:, :1], alone_logits) <= 1e-5


@pytest.mark.parametrize("mode", ["greedy", "no cache", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_window_is_a_window_in_every_mode(name, mode):
    """Prefill, cached decoding, a static cache and no cache at all agree on what a window sees."""
    model, given = build(name, implementation="sdpa"), inputs(name, length=11)
    with regard.attach(model, regard.SlidingWindow(5, sink=1)):
        sequences, logits = generated(model, given, **MODES[mode])
        mask = torch.cat([given["attention_mask"], torch.ones(2, 12).long()], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # what generate feeds
        whole = model(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    expected = whole[:, 10:-1].transpose(0, 1)
    assert relative(logits, expected) <= 1e-4
    with regard.attach(model, regard.Dense()):
        assert relative(generated(model, given, **MODES[mode])[1], expected) > 1e-2


@dataclass
class OwnCache(regard.Method):
    """Brings a cache that counts what goes through it."""

    def cache(self, model):
        return CountingCache(config=model.config.get_text_config(decoder=True))

    def edit(self, call):
        if call.cache is None:
            return
        assert call.cache.keys.shape == call.k.shape
        assert call.phase == ("decode" if call.q_len == 1 else "prefill")
        assert call.position == call.kv_len - call.q_len


class CountingCache(DynamicCache):
    made = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        type(self).made += 1


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beam"])
def test_a_cache_takes_the_place_of_the_models(mode):
    model, given = build("llama", implementation="sdpa"), inputs("llama", length=11)
    before = generated(model, given, **MODES[mode])
    CountingCache.made = 0
    with regard.attach(model, OwnCache()):
        during = generated(model, given, **MODES[mode])
        assert CountingCache.made == 1
        assert torch.equal(during[0], before[0]) and relative(during[1], before[1]) <= 1e-5
        out = model(**given)
        assert isinstance(out.past_key_values, CountingCache)
        model(given["input_ids"][:, :1], past_key_values=out.past_key_values)
        assert out.past_key_values.get_seq_length() == 12
        assert model(**given, use_cache=False).past_key_values is None
    assert not isinstance(model(**given).past_key_values, CountingCache)
    assert "_prepare_cache_for_generation" not in model.__dict__


@torch.no_grad()
def test_a_loop_of_ones_own_and_copies_of_a_cache():
    model, ids = build("llama", implementation="sdpa"), inputs("llama")["input_ids"]
    with regard.attach(model, OwnCache()) as session:
        past = session.new_cache()
        model(ids, past_key_values=past)
        copied = copy.deepcopy(past)
        first, second = (model(ids[:, :1], past_key_values=p).logits for p in (past, copied))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cache_implementation": "static"}, ["cache_implementation", "static", "OwnCache"]),
        ({"use_cache": False}, ["use_cache", "OwnCache"]),
        ({"past_key_values": DynamicCache()}, ["past_key_values", "DynamicCache", "new_cache", "OwnCache"]),
    ],
)
def test_caches_that_get_in_the_way(options, words):
    model, given = build("llama", implementation="sdpa"), inputs("llama")
    with regard.attach(model, OwnCache()), pytest.raises(ValueError) as error:
        model.generate(**given, max_new_tokens=2, **options)
    assert all(word in str(error.value) for word in words)
    with regard.attach(model, OwnCache()), pytest.raises(ValueError, match="new_cache"):
        model(**given, past_key_values=DynamicCache())


def test_cache_needs_a_causal_model():
    with pytest.raises(regard.UnsupportedModelError, match="OwnCache"):
        regard.attach(build("bert"), OwnCache())


def test_cache_of_a_wrapped_and_an_encoder_decoder_model():
    whisper, given = build("whisper", implementation="sdpa"), inputs("whisper")
    before = whisper.generate(given["input_features"], max_new_tokens=6, do_sample=False)

    @dataclass
    class DecoderCache(regard.Method):
        def cache(self, model):
            return CountingCache()

    CountingCache.made = 0
    with regard.attach(whisper, DecoderCache()):
        assert torch.equal(whisper.generate(given["input_features"], max_new_tokens=6, do_sample=False), before)
    assert CountingCache.made == 1

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model, given = build("llama", implementation="sdpa"), inputs("llama")
    before = generated(model, given)
    CountingCache.made = 0
    with regard.attach(Wrapper(model), OwnCache()):
        assert torch.equal(generated(model, given)[0], before[0])
    assert CountingCache.made == 1


@dataclass
class LastLook(regard.Method):
    """Says the token that the last layer looked at most; reads attention and hidden states of the forward before."""

    strength: float = 1e4

    def setup(self, session):
        session.capture("hidden", session.model.model.norm)

    def edit(self, call):
        if call.layer == call.num_layers - 1:
            call.session.last["looked"] = call.weights(rows=[-1]).mean(1)[:, 0]

    def logits(self, model, session):
        return Say(session, self.strength)


class Say(LogitsProcessor):
    def __init__(self, session, strength):
        self.session, self.strength = session, strength

    def __call__(self, input_ids, scores):
        looked, hidden = self.session.last["looked"], self.session.last["hidden"]
        assert looked.shape == input_ids.shape and hidden.shape[:1] == input_ids.shape[:1]
        said = input_ids.gather(1, looked.argmax(-1, keepdim=True))
        return scores.scatter_add(1, said, torch.full_like(said, self.strength, dtype=scores.dtype))


def test_logits_processors_take_part_and_leave():
    model, given = build("llama", implementation="sdpa"), inputs("llama")
    before = generated(model, given, do_sample=False)[0]
    with regard.attach(model, LastLook()):
        said = generated(model, given, do_sample=False)[0]
        sampled = generated(model, given, do_sample=True)[0]
    assert torch.equal(said, sampled)  # the processor comes before everything else and leaves one choice
    assert not torch.equal(said, before)
    for row, prompt in zip(said, given["input_ids"]):
        assert set(row[17:].tolist()) <= set(prompt.tolist())
    with regard.attach(model, LastLook(strength=0.0)):
        assert torch.equal(generated(model, given, do_sample=False)[0], before)
    assert torch.equal(generated(model, given, do_sample=False)[0], before)
    with pytest.raises(regard.UnsupportedModelError, match="generate"):
        regard.attach(build("vit"), _Speaks())


@dataclass
class _Speaks(regard.Method):
    def logits(self, model, session):
        return []


def test_assisted_decoding():
    model, helper = build("llama", implementation="sdpa"), build("llama", seed=0, implementation="sdpa")
    given = {k: v[1:] for k, v in inputs("llama").items()}
    before = model.generate(**given, max_new_tokens=10, do_sample=False, assistant_model=helper)
    for method in (regard.Dense(), OwnCache()):
        with regard.attach(model, method) if isinstance(method, regard.Dense) else regard.attach(model, _Quiet()):
            assert torch.equal(
                model.generate(**given, max_new_tokens=10, do_sample=False, assistant_model=helper), before
            )


@dataclass
class _Quiet(regard.Method):
    def cache(self, model):
        return CountingCache()
