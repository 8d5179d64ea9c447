"""S2-Attention that frees what no head will read again: the same numbers from a smaller cache; and training through it."""

import pytest
import torch
from sparse_models import generated, logits, padded_batch, prompt

import regard
from regard import S2Attention
from regard.methods.caches import kv_bytes
from tiny import tiny_llama

VARIANTS = {
    "plain": {},
    "sinks": {"sink": 3},
    "one dense head": {"dense_heads": 1},
    "every second layer dense": {"dense_layers": range(1, 3, 2)},
    "homogeneous": {"homogeneous": True},
    "wide stride": {"stride": 5, "local_blocks": 1},
}


@pytest.mark.filterwarnings("ignore:S2Attention")
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_from_what_is_left_is_the_masked_model(name):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    options = {"block_size": 8, "local_blocks": 2, "stride": 2} | VARIANTS[name]
    with regard.attach(model, S2Attention(**options)):
        want = logits(model, ids, attention_mask=mask)
        told = generated(model, ids, 20, attention_mask=mask)
    with regard.attach(model, S2Attention(**options, free_cache=True)) as session:
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids, 20, attention_mask=mask), told)
        for row, text in zip(want, alone):
            for first in (1, 20, 41):
                cache, at, outs = session.new_cache(), 0, []
                with torch.no_grad():
                    for n in (first, 1, 1, 9, *[1] * (text.shape[1] - first - 11)):
                        outs.append(model(text[:, at : at + n], past_key_values=cache).logits)
                        at += n
                torch.testing.assert_close(torch.cat(outs, 1)[0], row[-text.shape[1] :], rtol=1e-5, atol=1e-5)


def test_a_head_keeps_its_band_and_its_columns():
    """local_blocks + n / (block * stride) blocks, each head its own, freed while decoding goes on."""
    model, ids = tiny_llama(), prompt(700)
    method = S2Attention(8, 2, 2, free_cache=True)
    sizes = []
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids[:, :500], past_key_values=cache)
        for i in range(500, 700):
            model(ids[:, i : i + 1], past_key_values=cache)
            if i in (503, 699):
                sizes.append(kv_bytes(cache))
    entry = 3 * 2 * 2 * 8 * 4  # 3 layers, keys and values, 2 heads of 8 numbers
    for size, length in zip(sizes, (504, 700)):
        kept = 16 + length / 2
        assert kept - 16 <= size / entry <= kept + 16
    rule = method.rules_of(4, 2)
    assert [r.phase for r in rule] == [0, 0, 1, 1] and all(abs(r.tokens(700) - 358) <= 8 for r in rule)


def test_beams_and_what_cannot_be_taken_back():
    model = tiny_llama()
    ids, mask, _ = padded_batch()
    options = {"block_size": 8, "local_blocks": 2, "stride": 2}
    with regard.attach(model, S2Attention(**options)):
        want = generated(model, ids, 8, attention_mask=mask, num_beams=3)
    with regard.attach(model, S2Attention(**options, free_cache=True)) as session:
        assert torch.equal(generated(model, ids, 8, attention_mask=mask, num_beams=3), want)
        cache = session.new_cache()
        with torch.no_grad():
            model(ids[:1], past_key_values=cache)
        with pytest.raises(ValueError, match="cannot: it has evicted"):
            cache.crop(50)
    with pytest.raises(TypeError, match="free_cache: got str"):
        S2Attention(free_cache="yes")


@pytest.mark.parametrize("free_cache", [False, True])
def test_gradients_through_attach_are_those_of_the_dense_mask(free_cache):
    model, ids = tiny_llama().train(), prompt(60)
    grads = []
    for method in (S2Attention(8, 2, 2, free_cache=free_cache), AsTensor()):
        model.zero_grad()
        with regard.attach(model, method):
            model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class AsTensor(regard.Method):
    """The same pattern as a bool tensor, entry by entry."""

    def mask(self, call):
        i, j = torch.arange(60)[:, None], torch.arange(60)
        heads = torch.arange(4)[:, None, None] // 2
        return regard.masks.dense(((j <= i) & ((i // 8 - j // 8 < 2) | ((j // 8 + heads) % 2 == 0)))[None])


def test_it_trains():
    model, ids = tiny_llama().train(), prompt(64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    with regard.attach(model, S2Attention(8, 2, 2)):
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
