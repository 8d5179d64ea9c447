"""HyperAttention on a model: exact when short, independent of padding and batch mates, layers by specification."""

import pytest
import torch
from sparse_models import LENGTH, PADDING, call, generated, logits, padded_batch, prompt

import regard
from regard.methods.layer_spec import check_layers, in_layers
from tiny import tiny_llama

SMALL = {"min_len": 16, "block_size": 8, "samples": 8, "projections": 4}


def test_short_prompts_are_exact():
    model, ids = tiny_llama(), prompt()
    want = logits(model, ids)
    with regard.attach(model, regard.HyperAttention()):
        assert torch.allclose(logits(model, ids), want, atol=1e-6)


def test_long_prompts_are_approximate_and_detach_leaves_no_trace():
    model, ids = tiny_llama(), prompt()
    want = logits(model, ids)
    with regard.attach(model, regard.HyperAttention(**SMALL)):
        found = logits(model, ids)
        assert torch.equal(found, logits(model, ids))  # the draw depends on the seed alone
    assert not torch.allclose(found, want, atol=1e-4) and bool(torch.isfinite(found).all())
    assert torch.allclose(found[:, :8], want[:, :8], atol=1e-5)
    with regard.attach(model, regard.HyperAttention(**SMALL, seed=1)):
        assert not torch.equal(logits(model, ids), found)
    assert torch.equal(logits(model, ids), want)


def test_everything_in_one_block_is_exact():
    model, ids = tiny_llama(), prompt()
    want = logits(model, ids)
    with regard.attach(model, regard.HyperAttention(min_len=16, block_size=128)):
        assert torch.allclose(logits(model, ids), want, atol=1e-5)


def test_rows_of_a_padded_batch_are_what_they_are_alone():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    with regard.attach(model, regard.HyperAttention(**SMALL)):
        position = (mask.cumsum(-1) - 1).clamp(
            min=0
        )  # the hash sees rotated vectors, which depend on where counting begins
        together = logits(model, ids, attention_mask=mask, position_ids=position)
        assert torch.allclose(together[:1], logits(model, alone[0]), atol=1e-5)
        assert torch.allclose(together[1:, PADDING:], logits(model, alone[1]), atol=1e-5)
        both = generated(model, ids, attention_mask=mask)
        assert torch.equal(both[:1], generated(model, alone[0]))
        assert torch.equal(both[1, LENGTH:], generated(model, alone[1])[0, LENGTH - PADDING :])


def test_decoding_is_exact_over_what_prefill_kept():
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, regard.HyperAttention(**SMALL)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        step = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    with torch.no_grad():
        cache.crop(-1)
        want = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(step, want, atol=1e-5)


@pytest.mark.parametrize(
    "layers, chosen",
    [(None, {0, 1, 2}), ([0, -1], {0, 2}), ("last:2", {1, 2}), ("first:1", {0}), ("odd", {1}), ("even", {0, 2})],
)
def test_layers(layers, chosen):
    check_layers(layers)
    assert {layer for layer in range(3) if in_layers(layers, layer, 3)} == chosen
    method = regard.HyperAttention(layers=layers, **SMALL)
    for layer in range(3):
        one = call()
        one.layer, one.num_layers = layer, 3
        assert method.applies(one) == (layer in chosen)


def test_no_layer_is_the_model_itself():
    model, ids = tiny_llama(), prompt()
    want = logits(model, ids)
    with regard.attach(model, regard.HyperAttention(**SMALL, layers="last:0")):
        assert torch.equal(logits(model, ids), want)


def test_other_masks_stay_dense():
    method = regard.HyperAttention(**SMALL)
    windowed = call(window=20)
    assert not method.applies(windowed)
    odd = call()
    odd.mask, odd.causal = (torch.rand(1, 1, 60, 60) > 0.5) | torch.eye(60).bool(), False
    assert method.attend(odd) is None
    both_ways = call()
    both_ways.causal = False
    out = method.attend(both_ways)
    assert out is not None and out.shape == both_ways.q.shape
    more = method.attend(call(padding=[0, 0], batch=2))
    assert more is not None


def test_training_reaches_the_weights():
    model, ids = tiny_llama().train(), prompt()
    with regard.attach(model, regard.HyperAttention(**SMALL)):
        model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


def test_bad_fields():
    for options, match in (
        ({"min_len": 0}, "min_len"),
        ({"samples": 0, "block_size": 0}, "samples"),
        ({"projections": 63}, "projections"),
        ({"variant": "fast"}, "variant"),
        ({"layers": "middle:3"}, "layers"),
        ({"layers": "last"}, "layers"),
    ):
        with pytest.raises(ValueError, match=match):
            regard.HyperAttention(**options)
    with pytest.raises(TypeError, match="layers"):
        regard.HyperAttention(layers=3)
