"""SeerAttention's gates: what pooling, turning and masks do, and the decoding gate step by step against all rows at once."""

import pytest
import torch

from regard.methods.sparse.seer_attention_r import GateKeys
from regard.nn import AttentionGate, DecodeAttentionGate
from regard.nn.sequence.attention_gate import GATE_TYPES, turned


def rope(width):
    frequency = 100.0 ** -(torch.arange(0, width, 2) / width)

    def angles(positions):
        angle = (positions[..., None].float() * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    return angles


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_type_of_the_authors_is_there():
    assert len(GATE_TYPES) == 49 and GATE_TYPES["Qavg_Kmaxminavg"] == (("avg",), ("max", "min", "avg"))
    gate = AttentionGate.of_type("Qmaxmin_Kavg", 4, 2, 8, gate_dim=6, block_size=4)
    assert gate.linear_q.weight.shape == (4, 16, 6) and gate.linear_k.weight.shape == (2, 8, 6)
    single = AttentionGate(4, 2, 8, gate_dim=8)
    assert single.linear_q is None and single.linear_k.weight.shape == (4, 24, 8)
    with pytest.raises(ValueError, match="did you mean"):
        AttentionGate.of_type("Qavg_Kmaxminmean", 4, 2, 8)


def test_an_average_gate_with_unit_weights_is_the_product_of_means():
    gate = AttentionGate(2, 2, 8, gate_dim=8, block_size=4, k_pool=("avg",))
    gate.linear_k.weight.data.copy_(torch.eye(8).expand(2, 8, 8))
    q, k = randn(1, 2, 10, 8), randn(1, 2, 10, 8, seed=1)
    means = [torch.stack([x[:, :, i : i + 4].mean(2) for i in (0, 4, 8)], 2) for x in (q, k)]
    wanted = means[0] @ means[1].transpose(-1, -2) * 8**-0.5
    found = gate(q, k)
    low = torch.ones(3, 3, dtype=torch.bool).tril()
    torch.testing.assert_close(found[..., low], wanted[..., low])
    assert bool((found[..., ~low] < -1e30).all())
    probs = gate(q, k, softmax=True)
    assert not probs[..., ~low].any()
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 2, 3))


def test_turning_sees_distances_only():
    gate = AttentionGate(2, 1, 8, gate_dim=12, block_size=4)
    q, k, angles = randn(1, 2, 16, 8), randn(1, 1, 16, 8, seed=1), rope(12)
    near = gate(q, k, angles(torch.arange(0, 16, 4)[None]), torch.ones(4, 4, dtype=torch.bool))
    far = gate(q, k, angles(torch.arange(100, 116, 4)[None]), torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-6)
    assert torch.equal(turned(q, None), q)


@pytest.mark.parametrize("pool", ["Qproj", "Qavgproj", "Qavg", "Qorig"])
@pytest.mark.parametrize("norm", [False, True])
def test_decoding_is_the_last_row_of_training(pool, norm):
    torch.manual_seed(0)
    gate = DecodeAttentionGate(6, 2, 8, 8, block_size=4, q_head_pool=pool, qk_norm=norm)
    q, k, angles = randn(2, 6, 24, 8), randn(2, 2, 24, 8, seed=1), rope(8)
    rotary = (angles(torch.arange(24)[None]), angles(torch.arange(0, 24, 4)[None]))
    whole = gate(q, k, rotary)
    assert whole.shape == (2, 2, 24, 6)
    running = GateKeys(gate, angles, variant="paper").append(k[:, :, :10])
    for n in range(11, 25):
        found = running.append(k[:, :, n - 1 : n]).scores(q[:, :, n - 1 : n], n - 1)
        done = n // 4  # finished blocks; the one being filled counts as zero
        torch.testing.assert_close(found[:, :, 0, :done], whole[:, :, n - 1, :done], rtol=1e-4, atol=1e-5)
        assert not found[:, :, 0, done:].any()
    assert bool((whole[:, :, 5, 2:] < -1e19).all()) and bool((whole[:, :, 5, :2] > -1e19).all())


def test_gradients_reach_every_weight():
    for gate in (
        AttentionGate(4, 2, 8, gate_dim=6, block_size=4),
        DecodeAttentionGate(4, 2, 8, 6, block_size=4, qk_norm=True),
    ):
        gate(randn(1, 4, 12, 8), randn(1, 2, 12, 8)).log_softmax(-1)[..., 0].sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: got 3"),
        ({"q_pool": ()}, "q_pool: got"),
        ({"k_pool": ("mean",)}, "k_pool: unknown name 'mean'"),
        ({"block_size": 0}, "block_size: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AttentionGate(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | options))


def test_bad_input():
    gate = AttentionGate(4, 2, 8, block_size=4)
    with pytest.raises(ValueError, match="k: got 'shape"):
        gate(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="whole blocks of them"):
        gate(torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 11, 8))
    with pytest.raises(ValueError, match="gate_dim: got 16, need 'head_dim = 8 with Qavg'|gate_dim: got 16"):
        DecodeAttentionGate(4, 2, 8, 16, q_head_pool="Qavg")
