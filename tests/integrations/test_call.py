"""What can be contributed to an `AttentionCall`, each against its definition on the dense weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import regard
from regard.methods.call import AttentionCall


def make(kv_len=11, q_len=11, heads=4, kv_heads=2, dtype=torch.float64, **options) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 8, generator=generator, dtype=dtype)
        for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    return AttentionCall(module=nn.Identity(), layer=0, q=q, k=k, v=v, **{"causal": True, **options})


def by_hand(call, factors=1.0, heads=None):
    """Weights by the definition: softmax, times the factors, renormalised; for query i at position M - N + i."""
    k = call.k.repeat_interleave(2, dim=1)
    scores = call.q @ k.mT * 8**-0.5
    if call.q_len > 1:
        scores = scores.masked_fill(
            ~torch.ones_like(scores, dtype=torch.bool).tril(call.kv_len - call.q_len), -torch.inf
        )
    weights = scores.softmax(-1)
    treated = weights * factors
    treated = treated / treated.sum(-1, keepdim=True)
    if heads is not None:
        weights[:, heads] = treated[:, heads]
        return weights
    return treated


def out_of(weights, call):
    return weights @ call.v.repeat_interleave(2, dim=1)


@pytest.mark.parametrize("q_len", [1, 4, 11])
def test_plain(q_len):
    call = make(q_len=q_len)
    assert torch.allclose(call.weights(), by_hand(call), atol=1e-12)
    assert torch.allclose(call.run(), out_of(by_hand(call), call), atol=1e-12)
    assert torch.allclose(call.weights([2], rows=[-1]), by_hand(call)[:, 2:3, -1:], atol=1e-12)


@pytest.mark.parametrize("keys", [3, -2, slice(2, 5), torch.tensor([1, 7]), "span", "spans"])
@pytest.mark.parametrize("heads", [None, [1], [3, 0]])
def test_scaling_keys_is_reweighting_and_renormalising(keys, heads):
    call = make()
    factors = torch.ones(2, 1, 1, 11, dtype=torch.float64)
    if keys in ("span", "spans"):
        keys = torch.zeros(2, 11, dtype=torch.bool)
        keys[0, 1:4] = keys[1, 6:] = True
        factors[keys[:, None, None]] = 3.0
    else:
        factors[..., keys] = 3.0
    expected = by_hand(call, factors, heads)
    call.scale_keys(keys, 3.0, heads=heads)
    assert torch.allclose(call.weights(), expected, atol=1e-12)
    assert torch.allclose(call.run(), out_of(expected, call), atol=1e-12)


def test_factors_one_a_head_and_one_a_key():
    call = make()
    call.scale_keys(0, torch.tensor([2.0, 5.0]), heads=[3, 1])
    expected = make()
    expected.scale_keys(0, 2.0, heads=[3])
    expected.scale_keys(0, 5.0, heads=[1])
    assert torch.allclose(call.weights(), expected.weights(), atol=1e-12)
    call, expected = make(), make()
    call.scale_keys(torch.tensor([2, 4]), torch.tensor([2.0, 5.0]).view(1, 1, 1, 2))
    expected.scale_keys(2, 2.0)
    expected.scale_keys(4, 5.0)
    assert torch.allclose(call.weights(), expected.weights(), atol=1e-12)


def test_factor_zero_removes_and_one_changes_nothing():
    call = make(q_len=1)
    call.scale_keys(slice(0, 3), 0.0)
    short = make(q_len=1)
    short.k, short.v = short.k[:, :, 3:], short.v[:, :, 3:]
    assert torch.allclose(call.run(), short.run(), atol=1e-12)
    call = make()
    call.scale_keys(5, 1.0)
    assert torch.allclose(call.run(), make().run(), atol=1e-12)


def test_the_factor_can_be_trained():
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def run(factor):
        call = make(kv_len=5, q_len=5)
        call.scale_keys(0, factor.expand(1), heads=[1, 2])
        return call.run()

    assert torch.autograd.gradcheck(run, (factor,))


def test_keys_a_cache_has_dropped_are_left_out():
    class Sliding:
        is_sliding = True

        def get_seq_length(self):
            return 20

    call = make(q_len=1, cache=Sliding())
    assert (call.key_offset, call.position, call.q_offset, call.phase) == (9, 19, 10, "decode")
    call.scale_keys(torch.tensor([3, 10, 25]), torch.tensor([7.0, 2.0, 5.0]).view(1, 1, 1, 3))
    factors = torch.ones(11, dtype=torch.float64)
    factors[1] = 2.0
    assert torch.allclose(call.weights(), by_hand(call, factors), atol=1e-12)


@dataclass
class Sinks(regard.Method):
    def mask(self, call):
        return regard.masks.sink(4) | regard.masks.sliding_window(5)

    def score(self, call):
        return lambda score, b, h, i, j: score + 0.1 * j


def test_masks_and_mods_speak_of_absolute_positions():
    class Sliding:
        is_sliding = True

        def get_seq_length(self):
            return 13

    whole, rest = make(kv_len=13, q_len=1), make(kv_len=13, q_len=1, cache=Sliding())
    rest.k, rest.v = rest.k[:, :, 2:], rest.v[:, :, 2:]  # the first two keys are gone
    rest.run([Sinks()])
    whole.run([Sinks()])
    expected = whole.weights()[..., 2:]
    assert torch.allclose(rest.weights(), expected / expected.sum(-1, keepdim=True), atol=1e-12)
    assert (rest.weights()[0, 0, 0] > 0).tolist() == [True, True] + [False] * 4 + [True] * 5


def test_edits_of_weights_reach_only_their_heads():
    call, shapes = make(), []

    def swap(weights):
        shapes.append(tuple(weights.shape))
        return weights.flip(-1)

    call.on_weights(swap, heads=[2, 1])
    call.on_weights(lambda w: w * 2, heads=[2])
    expected = by_hand(call)
    expected[:, 1:3] = expected[:, 1:3].flip(-1)
    expected[:, 2] *= 2
    assert torch.allclose(call.run(), out_of(expected, call), atol=1e-12)
    assert shapes == [(2, 2, 11, 11)]
    call = make()
    call.on_weights(lambda w: w * 0)
    assert call.run().abs().max() == 0


def test_edits_of_outputs_come_last_and_in_order():
    call = make()
    call.on_output(lambda out: out + 1)
    call.on_output(lambda out: out * 2)
    assert torch.allclose(call.run(), (make().run() + 1) * 2)


def test_sinks_take_their_share():
    sinks = torch.randn(4, dtype=torch.float64)
    call = make(sinks=sinks)
    with_sink = make()
    scores = torch.cat(
        [by_hand(with_sink).log() + lse_of(with_sink), sinks.view(1, 4, 1, 1).expand(2, 4, 11, 1)], dim=-1
    )
    expected = scores.softmax(-1)[..., :-1]
    assert torch.allclose(call.weights(), expected, atol=1e-12)
    assert torch.allclose(call.run(), out_of(expected, call), atol=1e-12)
    assert torch.allclose(call.weights([3, 1]), expected[:, [1, 3]], atol=1e-12)


def lse_of(call):
    return regard.ops.attention(call.q, call.k, call.v, mask=regard.masks.causal, return_lse=True)[1][..., None]


def test_narrowed_speaks_of_the_same_heads():
    @dataclass
    class ByHead(regard.Method):
        def mask(self, call):
            return regard.masks.per_head([regard.masks.sliding_window(2 + h) for h in range(4)])

        def score(self, call):
            return lambda score, b, h, i, j: score * (1 + h)

        def edit(self, call):
            call.add_bias(torch.randn(1, 4, 1, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

        def select(self, call):
            chosen = torch.ones(1, 2, 3, 3, dtype=torch.bool)
            chosen[:, 1, :, 0] = False
            return regard.ops.Selection.from_block_map(chosen, block_q=4, block_k=4, q_len=11, kv_len=11)

    call = make()
    out = call.run([ByHead()])
    assert torch.allclose(call.narrowed([1, 3]).attention(), out[:, [1, 3]], atol=1e-12)
    assert torch.allclose(call.narrowed([1, 3]).weights(rows=slice(3, 7)), call.weights()[:, [1, 3], 3:7], atol=1e-12)
    assert torch.allclose(out_of(call.weights(), call), out, atol=1e-12)


def test_bad_contributions():
    call = make()
    for bad, words in (
        (lambda: call.add_bias(torch.zeros(3, 1, 1, 11)), r"bias.*\(3, 1, 1, 11\).*\(2, 4, 11, 11\)"),
        (lambda: call.add_bias(torch.zeros(2, 2, 4, 11, 11)), "bias"),
        (lambda: call.scale_keys(0, -1.0), "factor.*-1.0"),
        (lambda: call.scale_keys(0, 2.0, heads=[4]), r"heads.*\[0, 4\)"),
        (lambda: call.scale_keys(0, torch.ones(3), heads=[0, 1]), "factor.*3 values.*2"),
        (lambda: call.on_weights(lambda w: w, heads=[-1]), "heads"),
        (lambda: call.weights([9]), "heads"),
        (lambda: call.weights(rows=[11]), r"rows.*\[11\].*11"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
