"""RetrievalAttention: exact with an exact index, whatever lies where; batches, padding, beams, crops; clear errors."""

import copy

import pytest
import torch
from sparse_models import generated, padded_batch, prompt

import regard
from regard.methods.caches import RetrievalLayer, kv_bytes
from tiny import tiny_llama

FORCED = torch.tensor([[5, 9, 2, 44, 7, 3, 90, 8, 21, 60, 61, 62]])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@torch.no_grad()
def steps(model, ids, forced, *methods, mask=None):
    """Logits of each decoding step over a given continuation, and the cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    with regard.attach(model, *methods):
        out = model(ids, attention_mask=mask, use_cache=True)
        logits = [out.logits[:, -1]]
        for token in forced.expand(len(ids), -1).unbind(1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(token[:, None], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.stack(logits), out.past_key_values


ALL = {"top_k": 500, "index": "exact"}


@pytest.mark.parametrize(
    "options",
    [
        {"sink": 4, "recent": 8, "insert_every": 1},
        {"sink": 0, "recent": 1, "insert_every": 3},
        {"sink": 4, "recent": 8, "insert_every": None},
        {"sink": 100, "recent": 8, "insert_every": 2},  # sinks beyond the prompt: nothing to index
        {"sink": 4, "recent": 300},
        {"sink": 4, "recent": 8, "from_layer": 2},
        {"sink": 4, "recent": 8, "offload": None},
    ],
)
def test_attending_to_all_that_is_indexed_is_dense(model, options):
    want, _ = steps(model, prompt(), FORCED)
    got, cache = steps(model, prompt(), FORCED, regard.RetrievalAttention(**options, **ALL))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    kinds = [isinstance(layer, RetrievalLayer) for layer in cache.layers]
    assert kinds == [number >= options.get("from_layer", 0) for number in range(3)]


@pytest.mark.parametrize(
    "index,options",
    [("graph", {"reads": 1.0, "backend": "torch"}), ("graph", {"reads": 1.0}), ("ivf", {"probes": 999})],
)
def test_every_index_finds_everything_when_it_may_read_everything(model, index, options):
    long = prompt(330)
    want, _ = steps(model, long, FORCED)
    method = regard.RetrievalAttention(4, 8, top_k=500, index=index, index_options=options, insert_every=2)
    got, _ = steps(model, long, FORCED, method)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_only_the_best_keys_count(model):
    """One step against its definition: softmax over sinks, recent tokens and the top keys of the rest, per query head."""
    method = regard.RetrievalAttention(3, 5, top_k=4, index="exact", insert_every=None)
    layer = RetrievalLayer(method)
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 41, 8, generator=g), torch.randn(2, 2, 41, 8, generator=g)
    q = torch.randn(2, 4, 41, 8, generator=g)
    for begin, end in ((0, 40), (40, 41)):
        layer.update(k[:, :, begin:end], v[:, :, begin:end])
        call = regard.AttentionCall(
            torch.nn.Identity(), 0, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], causal=True, cache=layer
        )
        out = call.run([method])
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q[:, :, -1:] @ k.transpose(-1, -2))[:, :, 0]
    used = torch.zeros_like(scores, dtype=torch.bool)
    used[..., :3] = used[..., 35:] = True
    used.scatter_(-1, scores[..., 3:35].topk(4, -1).indices + 3, True)
    weights = (scores / 8**0.5).masked_fill(~used, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, weights[:, :, None] @ v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", ["exact", "graph"])
def test_rows_of_different_length_do_not_meet(model, index):
    ids, mask, alone = padded_batch(400, 130)
    method = regard.RetrievalAttention(4, 16, top_k=10, index=index, insert_every=8)
    both, _ = steps(model, ids, FORCED, method, mask=mask)
    for row, one in enumerate(alone):
        want, _ = steps(model, one, FORCED, method)
        torch.testing.assert_close(both[:, row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_a_row_shorter_than_sinks_and_window(model):
    ids, mask, alone = padded_batch(90, 86)  # four tokens
    method = regard.RetrievalAttention(8, 6, top_k=5, index="exact", insert_every=1)
    both, _ = steps(model, ids, FORCED, method, mask=mask)
    want, _ = steps(model, alone[1], FORCED, method)
    torch.testing.assert_close(both[:, 1:], want, rtol=1e-4, atol=1e-5)


def test_prompt_in_pieces_and_a_question_later(model):
    method = regard.RetrievalAttention(4, 8, top_k=6, index="exact", insert_every=4)
    want, _ = steps(model, prompt(), FORCED, method)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        for piece in prompt().split(45, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], want[0], rtol=1e-4, atol=1e-5)
        for token in FORCED[0, :6]:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], want[6], rtol=1e-4, atol=1e-5)
    full = regard.RetrievalAttention(4, 8, insert_every=4, **ALL)
    whole = torch.cat([prompt(), FORCED, prompt(40, seed=3), FORCED], 1)
    with regard.attach(model, full) as session, torch.no_grad():
        cache = session.new_cache()
        for piece in whole.split([90, 1, 1, 10, 40, 1, 11], dim=1):  # after decoding, more prompt and a short question
            out = model(piece, past_key_values=cache, use_cache=True)
        dense = dense_last(model, whole)
    torch.testing.assert_close(out.logits[:, -1], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [ALL, {"top_k": 6, "index": "graph"}])
def test_crop_takes_back_tokens_also_from_the_index(model, options):
    """Within the recent window and beyond it: what is decoded next is as if the tokens had never been there."""
    method = regard.RetrievalAttention(4, 8, insert_every=1, **options)
    long = prompt(300)
    with regard.attach(model, method) as session, torch.no_grad():
        for crop in (3, 12):
            cache = session.new_cache()
            model(long, past_key_values=cache, use_cache=True)
            for token in FORCED[0]:
                model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache.crop(-crop)
            assert cache.get_seq_length() == 312 - crop
            out = model(FORCED[:, :1], past_key_values=cache, use_cache=True).logits[:, -1]
            if options is ALL:
                whole = torch.cat([long, FORCED[:, : 12 - crop], FORCED[:, :1]], 1)
                torch.testing.assert_close(out, dense_last(model, whole), rtol=1e-4, atol=1e-5)
            assert all(len(layer.index) == layer.edge for layer in cache.layers) and bool(out.isfinite().all())


def dense_last(model, ids):
    """What the model says after `ids`, nothing attached to it."""
    return copy.deepcopy(model)(ids).logits[:, -1]


def test_beams_sampling_and_assisted_decoding(model):
    method = regard.RetrievalAttention(4, 8, insert_every=3, **ALL)
    options = {"do_sample": False, "num_beams": 3}
    with regard.attach(model, method):
        beams = model.generate(prompt(), max_new_tokens=8, **options)
        assisted = model.generate(prompt(), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4)
        bf16 = model.to(torch.bfloat16).generate(prompt(), max_new_tokens=3, do_sample=False)
    model.float()
    assert torch.equal(beams, model.generate(prompt(), max_new_tokens=8, **options))
    assert torch.equal(assisted, generated(model, prompt(), tokens=8))
    assert bf16.shape == (1, 93)


def test_beams_follow_their_rows(model):
    ids = torch.cat([prompt(300), prompt(300, seed=1)])
    method = regard.RetrievalAttention(4, 8, top_k=6, insert_every=2)
    want, _ = steps(model, ids, FORCED, method)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
        order = torch.tensor([0, 1])
        for token in FORCED[0]:
            order = order.flip(0)
            cache.reorder_cache(torch.tensor([1, 0]))
            out = model(token.view(1, 1).expand(2, 1), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1][order], want[-1], rtol=1e-4, atol=1e-5)


def test_the_device_holds_sinks_and_window_alone(model):
    method = regard.RetrievalAttention(4, 16, top_k=8, insert_every=8)
    _, cache = steps(model, prompt(700), FORCED, method)
    for layer in cache.layers:
        assert 16 <= layer.near.length < 24 and layer.edge + layer.near.length == 712
        assert layer.far_keys.empty and len(layer.index) == layer.edge
        assert kv_bytes(layer.near) <= 2 * 128 * 2 * 8 * 4
        assert int(layer.read.max()) <= 0.25 * 712


def test_detach_leaves_no_trace(model):
    before = generated(model, prompt())
    with regard.attach(model, regard.RetrievalAttention(4, 8, top_k=4)):
        generated(model, prompt())
    assert torch.equal(before, generated(model, prompt()))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 0}, "top_k: got 0"),
        ({"recent": 0}, "recent: got 0"),
        ({"sink": -1}, "sink: got -1"),
        ({"insert_every": 0}, "insert_every: got 0"),
        ({"index": "grahp"}, "index: unknown name 'grahp'; did you mean graph"),
        ({"index_options": {"reads": 2.0}}, r"reads: got 2\.0"),
        ({"index": "ivf", "index_options": {"cells": 0}}, "cells: got 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        regard.RetrievalAttention(**options)
