"""PrFlashAttention and HarmonicALiBi on models: prefill, decoding, padding, training."""

import pytest
import torch
from sparse_models import LENGTH, call, generated, logits, padded_batch, prompt

import regard
from regard import HarmonicALiBi, PrFlashAttention, UnsupportedModelError
from regard.bench.roster import parse_method
from tiny import tiny_llama

SMALL = {"block_size": 8, "gamma": 1.5}


def test_gamma_zero_changes_nothing():
    model = tiny_llama()
    dense = logits(model, prompt())
    for method in (PrFlashAttention(gamma=0.0), HarmonicALiBi(strength=0.0), PrFlashAttention(block_size=LENGTH)):
        with regard.attach(model, method):
            assert torch.equal(logits(model, prompt()), dense)
    assert torch.equal(logits(model, prompt()), dense)


@pytest.mark.parametrize("method", [PrFlashAttention(**SMALL), HarmonicALiBi()])
def test_decoding_sees_what_prefill_sees(method):
    model = tiny_llama()
    dense = logits(model, prompt())
    with regard.attach(model, method):
        whole = logits(model, prompt())
        assert (whole - dense).abs().max() > 1e-3
        out = model(prompt()[:, :60], use_cache=True)
        torch.testing.assert_close(out.logits, whole[:, :60], rtol=1e-4, atol=1e-5)
        cache = out.past_key_values
        for position in range(60, LENGTH):
            out = model(prompt()[:, position : position + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], whole[:, position], rtol=1e-4, atol=1e-5)
        assert generated(model, prompt(), num_beams=2).shape == (1, LENGTH + 6)
    assert torch.equal(logits(model, prompt()), dense)


@pytest.mark.parametrize("method", [PrFlashAttention(**SMALL), HarmonicALiBi()])
def test_left_padding_changes_nothing(method):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    with regard.attach(model, method):
        together = logits(model, ids, attention_mask=mask)
        for row, single in enumerate(alone):
            part = together[row, LENGTH - single.shape[1] :]
            torch.testing.assert_close(part, logits(model, single)[0], rtol=1e-4, atol=1e-5)
        batch = generated(model, ids, attention_mask=mask)
        assert torch.equal(batch[1, LENGTH:], generated(model, alone[1])[0, alone[1].shape[1] :])


def test_layers_and_groups_have_their_draws():
    method = PrFlashAttention(**SMALL)
    first, other = call(), call()
    other.layer = 1
    for one in (first, other):
        one.module.eval()
    kept = [method.mask(one).materialize(60, 60, num_heads=4)[0] for one in (first, other)]
    assert torch.equal(kept[0][0], kept[0][1]) and not torch.equal(kept[0][0], kept[0][2])
    assert not torch.equal(kept[0], kept[1])
    assert method.mask(first) is method.mask(first)  # so that plans are kept
    assert method.mask(first) is not PrFlashAttention(**SMALL, seed=1).mask(first)


def test_training_draws_anew_and_gradients_flow():
    model = tiny_llama()
    with regard.attach(model, PrFlashAttention(**SMALL)):
        torch.manual_seed(0)
        model.train()
        first, second = (model(prompt()).logits for _ in range(2))
        assert not torch.equal(first, second)
        first.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.eval()
        assert torch.equal(logits(model, prompt()), logits(model, prompt()))


def test_dense_layers_and_half_precision():
    model = tiny_llama()
    dense = logits(model, prompt())
    with pytest.warns(UserWarning, match="leaves all"):
        session = regard.attach(model, PrFlashAttention(**SMALL, dense_layers=range(-8, 8)))
    with session:
        assert torch.equal(logits(model, prompt()), dense)
    model = model.bfloat16()
    with regard.attach(model, PrFlashAttention(**SMALL)):
        assert logits(model, prompt()).isfinite().all()


def test_by_name_at_a_budget():
    for budget in (16, 64, 0.25, 1.0):
        _, method = parse_method("pr-flash-attention", budget=budget, context=512)
        assert isinstance(method, PrFlashAttention)
        blocks = -(-512 // method.block_size)
        kept = sum((1 + d) ** -method.gamma for d in range(blocks)) * method.block_size
        assert kept <= (budget if budget > 1 else budget * 512) + method.block_size
    with pytest.raises(UnsupportedModelError, match="no causal self-attention"):
        PrFlashAttention().check(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrFlashAttention(gamma=-1), "gamma: got -1, need a number >= 0"),
        (lambda: PrFlashAttention(gamma="1"), "gamma: got '1'"),
        (lambda: PrFlashAttention(block_size=0), "block_size: got 0"),
        (lambda: PrFlashAttention(sink=-1), "sink: got -1"),
        (lambda: PrFlashAttention(seed=-1), "seed: got -1"),
        (lambda: HarmonicALiBi(strength=-0.1), "strength: got -0.1"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()
