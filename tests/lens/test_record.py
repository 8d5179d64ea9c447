"""`record`: the weights are those of eager attention, and only what is asked for is made."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import regard

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from families import CAUSAL, build, inputs


def eager(name):
    return build(name, implementation="eager")


def close(ours, theirs, rows=None):
    """Equal to 1e-5 where the query may see something (eager softmax is uniform over an empty row, ours is zero)."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    if rows is not None:
        ours, theirs = (w.movedim(2, 1)[rows] for w in (ours, theirs))
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "vit", "llava"])
@torch.no_grad()
def test_weights_are_those_of_eager_attention(name):
    model, given = eager(name), inputs(name)
    model.config._attn_implementation = "eager"
    expected = model(**given, output_attentions=True).attentions
    record = regard.record(model, given)
    real = given["attention_mask"].bool() if "attention_mask" in given else None
    assert record.layers == list(range(len(expected))) and record.num_heads == expected[0].shape[1]
    for layer, theirs in enumerate(expected):
        close(record.weights(layer), theirs, real)
        close(record.weights(layer, heads=[3, 1], rows=slice(6, 9)), theirs[:, [3, 1], 6:9])
        close(record.weights(layer - len(expected), heads=2, rows=-1), theirs[:, 2:3, -1:])
    if "input_ids" in given:
        assert torch.equal(record.tokens, given["input_ids"])


@torch.no_grad()
def test_encoder_decoder_and_cross_attention():
    model, given = eager("whisper"), inputs("whisper")
    expected = model(**given, output_attentions=True)
    record = regard.record(model, given, logits=True)
    assert record.tower == "decoder" and record.layers == record.layers_of("cross") == record.layers_of(
        tower="encoder"
    ) == [0, 1]
    for layer in range(2):
        close(record.weights(layer), expected.decoder_attentions[layer])
        close(record.weights(layer, kind="cross"), expected.cross_attentions[layer])
        close(record.weights(layer, tower="encoder"), expected.encoder_attentions[layer])
        assert record.weights(layer, kind="cross").shape == (2, 4, 17, 20)
    assert torch.allclose(record.logits, expected.logits, atol=1e-4)


@torch.no_grad()
def test_only_what_is_wanted_is_kept():
    model, given = eager("llama"), inputs("llama")
    expected = model(**given, output_attentions=True).attentions
    record = regard.record(model, given, layers=[-1, 0], heads=[2, 3], keep="qkv")
    assert record.layers == [0, 2] and record.heads(0) == [2, 3] and record.num_heads == 4 and record.logits is None
    assert record.q(0).shape == record.k(0).shape == record.call(0).v.shape == (2, 2, 17, 8)
    close(record.weights(2, rows=slice(5, None)), expected[2][:, 2:, 5:])
    close(record.weights(2, heads=[3, 2], rows=slice(5, None)), expected[2][:, [3, 2], 5:])
    everything = regard.record(model, given)
    assert everything.call(1).v.numel() == 0 and everything.k(1).shape == (2, 2, 17, 8)
    assert torch.equal(everything.q(2)[:, 2:], record.q(2)) and torch.equal(everything.k(2)[:, [1, 1]], record.k(2))
    assert {tower for tower, _, _ in regard.record(eager("llava"), inputs("llava"), heads=[0]).calls} == {"text"}
    towers = regard.record(eager("llava"), inputs("llava"), towers=["vision"])
    assert {tower for tower, _, _ in towers.calls} == {"vision"}
    close(
        towers.weights(0, heads=1, tower="vision"),
        regard.record(eager("llava"), inputs("llava")).weights(0, heads=1, tower="vision"),
    )


@dataclass
class Everything(regard.Method):
    """One contribution of every kind to the scores."""

    def mask(self, call):
        return regard.masks.per_head([regard.masks.sliding_window(9 + h) for h in range(4)])

    def score(self, call):
        return lambda score, b, h, i, j: score * (1 + 0.1 * h) + 0.01 * (i - j)

    def select(self, call):
        chosen = torch.ones(1, 2, 5, 5, dtype=torch.bool)
        chosen[:, 1, 4, 2] = False
        return regard.ops.Selection.from_block_map(chosen, block_q=4, block_k=4, q_len=call.q_len, kv_len=call.kv_len)

    def edit(self, call):
        call.add_bias(
            torch.linspace(0, 1, call.kv_len).expand(1, call.num_heads, 1, -1) * torch.arange(4).view(1, 4, 1, 1)
        )
        call.scale_keys(3, 2.0, heads=[1])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_what_is_attached_is_in_the_weights(name):
    model, given = build(name), inputs(name)
    seen = {}

    @dataclass
    class Watched(Everything):
        def edit(self, call):
            super().edit(call)
            call.on_weights(lambda w: seen.setdefault(call.layer, w))

    with regard.attach(model, Watched()) as session:
        record = regard.record(model, given)
        some = regard.record(model, given, heads=[1, 2])
        assert session.observers == []
    assert regard.integrations.session_of(model) is None
    for layer in record.layers:
        assert torch.equal(record.weights(layer), seen[layer])
        assert (some.weights(layer) - seen[layer][:, 1:3]).abs().max() <= 1e-6
        assert (record.weights(layer, heads=[3], rows=[16]) - seen[layer][:, 3:, 16:]).abs().max() <= 1e-6
        assert (record.weights(layer)[:, :, 8:].sum(-1) - 1).abs().max() <= 1e-5
    assert (record.weights(1) - regard.record(model, given).weights(1)).abs().max() > 1e-2


@torch.no_grad()
def test_a_continued_prompt():
    """With a cache, dynamic or static, the rows are the new tokens and the keys everything before them."""
    from transformers import DynamicCache, StaticCache

    model, ids = eager("mistral"), inputs("mistral")["input_ids"]
    whole = regard.record(model, ids)
    for past in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        model(ids[:, :9], past_key_values=past)
        rest = regard.record(model, {"input_ids": ids[:, 9:], "past_key_values": past, "use_cache": True})
        for layer in whole.layers:
            ours, theirs = rest.weights(layer), whole.weights(layer)[:, :, 9:]
            visible = ours.shape[-1]
            first = max(0, 17 - visible)  # a sliding cache has let go of the keys before
            assert (ours[..., : 17 - first] - theirs[..., first:]).abs().max() <= 1e-5
            assert ours[..., 17 - first :].sum() == 0


def test_the_model_is_left_alone():
    model, given = build("llama", implementation="sdpa"), inputs("llama")
    with torch.no_grad():
        before = model(**given).logits
    regard.record(model, given)
    with pytest.raises((TypeError, AttributeError)):
        regard.record(model, {"input_ids": "nonsense"})
    assert regard.integrations.session_of(model) is None and model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before)


def test_bad_requests():
    model, given = build("llama"), inputs("llama")
    for options, words in (
        ({"layers": [9]}, "layers.*9.*3"),
        ({"heads": [4]}, r"heads.*4.*\[0, 4\)"),
        ({"keep": "kq"}, "keep.*kq"),
    ):
        with pytest.raises(ValueError, match=words):
            regard.record(model, given, **options)
    with pytest.raises(TypeError, match="inputs"):
        regard.record(model, "some text")
    record = regard.record(model, given, layers=[0, 1], heads=[0, 1])
    for call, words in (
        (lambda: record.weights(2), r"layer.*2.*\[0, 1\]"),
        (lambda: record.weights(0, heads=3), r"heads.*3.*\[0, 1\]"),
        (lambda: record.weights(0, kind="crosswise"), "kind.*crosswise"),
        (lambda: record.weights(0, kind="cross"), "layer"),
        (lambda: record.weights(0, tower="vision"), "tower.*vision"),
        (lambda: record.weights(0, rows=17), "rows"),
    ):
        with pytest.raises((ValueError, IndexError), match=words):
            call()
