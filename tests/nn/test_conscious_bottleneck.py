"""The consciousness prior: few elements get through, all hear of them; what its losses reward; a factor graph's energy; errors."""

from __future__ import annotations

import math

import pytest
import torch

from regard.losses import factor_contrast, key_usage_entropy, named_prediction, thought_contrast
from regard.nn import ConsciousBottleneck, ConsciousState, SparseFactorEnergy
from regard.ops import noisy_topk_gate


def test_gate_keeps_the_largest_and_is_softmax_with_all():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 9)
    indices, weights = noisy_topk_gate(logits, 9)
    whole = torch.zeros_like(logits).scatter(-1, indices, weights)
    torch.testing.assert_close(whole, logits.softmax(-1))
    indices, weights = noisy_topk_gate(logits, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))
    assert torch.equal(indices.sort(-1).values, logits.argsort(-1)[..., -4:].sort(-1).values)
    kept = logits.gather(-1, indices)
    torch.testing.assert_close(weights[..., 0] / weights[..., 3], (kept[..., 0] - kept[..., 3]).exp())


def test_gate_noise_is_for_training_and_has_its_floor():
    logits, noise = torch.zeros(20000, 6), torch.full((20000, 6), -50.0)
    draw = torch.Generator().manual_seed(0)
    indices, weights = noisy_topk_gate(logits, 6, noise, training=True, generator=draw)
    # log weights differ by the noise alone: its standard deviation is the floor
    drawn = torch.zeros_like(logits).scatter(-1, indices, weights.log())
    assert abs((drawn[:, 0] - drawn[:, 1]).std() - 0.01 * 2**0.5) < 2e-4
    still = noisy_topk_gate(logits, 6, noise)[1]
    torch.testing.assert_close(still, torch.full_like(logits, 1 / 6))


def test_gradients_reach_what_was_chosen_alone():
    torch.manual_seed(1)
    layer, h = ConsciousBottleneck(8, 3), torch.randn(2, 10, 8, requires_grad=True)
    layer.eval()
    state = layer(h)
    state.scatter().square().sum().backward()
    touched = h.grad.abs().sum(-1) > 0
    assert torch.equal(touched, state.gates() > 0) and touched.sum() == 6
    assert layer.q_proj.weight.grad.abs().sum() > 0


def test_all_elements_chosen_is_attention_with_one_query():
    torch.manual_seed(2)
    layer, h = ConsciousBottleneck(8, 7, noise=0, gate_noise=False), torch.randn(2, 7, 8)
    previous = layer(torch.randn(2, 9, 8))
    state = layer(h, previous)
    q = layer.q_proj(previous.summary)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, None], layer.k_proj(h), layer.v_proj(h))[:, 0]
    torch.testing.assert_close(state.summary, want)
    torch.testing.assert_close(state.scatter().sum(1), want)


def test_the_set_has_no_order_and_rows_do_not_matter_to_each_other():
    torch.manual_seed(3)
    layer, h = ConsciousBottleneck(8, 3).eval(), torch.randn(3, 12, 8)
    state, order = layer(h), torch.randperm(12)
    moved = layer(h[:, order])
    torch.testing.assert_close(moved.summary, state.summary)
    assert torch.equal(order[moved.indices], state.indices)
    torch.testing.assert_close(layer.broadcast(h[:, order], moved), layer.broadcast(h, state)[:, order])
    alone = layer(h[1:2])
    torch.testing.assert_close(alone.summary, state.summary[1:2])


def test_noise_only_in_training():
    torch.manual_seed(4)
    layer, h = ConsciousBottleneck(8, 2), torch.randn(64, 12, 8)
    layer.eval()
    assert torch.equal(layer(h).indices, layer(h).indices)
    layer.train()
    assert not torch.equal(layer(h).indices, layer(h).indices)


def test_broadcast_brings_only_what_got_through():
    torch.manual_seed(5)
    layer, h = ConsciousBottleneck(8, 2).eval(), torch.randn(1, 6, 8)
    state = layer(h)
    unseen = next(i for i in range(6) if i not in state.indices[0].tolist())
    moved = h.clone()
    moved[0, unseen] += 0.01
    others = [i for i in range(6) if i != unseen]
    torch.testing.assert_close(layer.broadcast(moved, layer(moved))[:, others], layer.broadcast(h, state)[:, others])
    muted = ConsciousState(state.indices, torch.tensor([[1.0, 0.0]]), state.values, 6)
    alone = ConsciousState(state.indices[:, :1], torch.ones(1, 1), state.values[:, :1], 6)
    torch.testing.assert_close(layer.broadcast(h, muted), layer.broadcast(h, alone))


def test_prediction_costs_nothing_for_what_is_not_named():
    torch.manual_seed(6)
    mean, target = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    gates = torch.zeros(4, 5)
    gates[:, 1], gates[:, 3] = 0.25, 0.75
    loss = named_prediction(mean, target, gates, std=0.5)
    want = -torch.distributions.Normal(mean, 0.5).log_prob(target)
    torch.testing.assert_close(loss, (0.25 * want[:, 1] + 0.75 * want[:, 3]).mean())
    loss.backward()
    assert target.grad is None and torch.equal(mean.grad.abs().sum(0) > 0, torch.tensor([0, 1, 0, 1, 0]).bool())
    deep = named_prediction(mean[..., None], target[..., None], gates, std=0.5, stop_gradient=False)
    torch.testing.assert_close(deep, loss)


def test_usage_entropy_is_one_for_all_alike_and_none_for_one():
    assert float(key_usage_entropy(torch.eye(5))) == pytest.approx(1.0)
    assert float(key_usage_entropy(torch.eye(5)[:1].repeat(7, 1))) == pytest.approx(0.0, abs=1e-6)
    half = torch.eye(4)[[0, 1, 0, 1]]
    assert float(key_usage_entropy(half)) == pytest.approx(0.5)


def test_contrast_tells_apart():
    torch.manual_seed(7)
    x = torch.randn(16, 32)
    assert thought_contrast(x, x) < 0.05
    assert float(thought_contrast(x, torch.ones(16, 32))) == pytest.approx(math.log(16), rel=1e-4)


def test_energy_of_independent_variables_stays_and_of_a_pair_is_found():
    """Variables 0 and 3 agree, the rest is noise: what energy is learned tells agreeing from disagreeing, at 0 and 3 alone."""
    torch.manual_seed(8)
    energy = SparseFactorEnergy(5, 4, 2, hidden=8)
    optimizer = torch.optim.Adam(energy.parameters(), 0.05)
    for step in range(300):
        values = torch.randint(2, (256, 5)) * 2.0 - 1.0
        values[:, 3] = values[:, 0]
        loss = factor_contrast(energy, values) + step / 3000 * energy.slot_entropy()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert frozenset({0, 3}) in energy.scopes()
    same, other = torch.ones(1, 5), torch.tensor([[1.0, 1, 1, -1, 1]])
    assert energy(same) < energy(other) - 1
    energy.hard = True
    assert torch.equal(energy.reads().detach().amax(-1), torch.ones(4, 2))
    for scope in energy.scopes():
        assert len(scope) in (1, 2)


def test_errors_name_the_argument():
    layer, h = ConsciousBottleneck(4, 3), torch.zeros(2, 5, 4)
    state = layer(h)
    cases = [
        ("k", lambda: noisy_topk_gate(torch.zeros(2, 3), 4)),
        ("k", lambda: ConsciousBottleneck(4, 0)),
        ("noise_logits", lambda: noisy_topk_gate(torch.zeros(2, 3), 1, torch.zeros(3))),
        ("h", lambda: layer(h[..., :3])),
        ("h", lambda: layer(h[:, :2])),
        ("previous", lambda: layer(h, 3)),
        ("previous", lambda: layer(h[:1], state)),
        ("state", lambda: layer.broadcast(h, None)),
        ("gates", lambda: named_prediction(h[..., 0], h[..., 0], torch.zeros(2, 4))),
        ("target", lambda: named_prediction(h, h[:, :2], torch.zeros(2, 5))),
        ("gates", lambda: key_usage_entropy(torch.zeros(2, 1))),
        ("thought", lambda: thought_contrast(torch.zeros(1, 3), torch.zeros(1, 3))),
        ("values", lambda: factor_contrast(lambda x: x, torch.zeros(1, 3))),
        ("energy", lambda: factor_contrast(None, torch.zeros(2, 3))),
        ("size", lambda: SparseFactorEnergy(3, 1, 4)),
        ("values", lambda: SparseFactorEnergy(3, 1)(torch.zeros(2, 4))),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            call()
