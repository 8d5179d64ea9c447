"""Feature maps without weights, and the weights of a linear attention written down."""

import math

import pytest
import torch

from regard.ops import linear_attention, linear_attention_weights
from regard.ops.state import CosineReweighting, Focused, feature_maps
from regard.ops.state.feature_maps import FEATURE_MAPS, at_offset, resolve


def _qkv(n=9, d=6, heads=2, kv_heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, n, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return q, k, v


def test_products_of_the_exponential_pair_are_hyperbolic_cosines():
    q, k, _ = _qkv()
    phi = feature_maps.exp_pair
    torch.testing.assert_close(phi(q) @ phi(k).mT, 2 * torch.cosh(q[:, :, :, None] + k[:, :, None]).sum(-1))


def test_sums_and_shifts():
    x = _qkv()[0]
    for name, total in (("symmetric_softmax", 2.0), ("joint_softmax", 1.0)):
        torch.testing.assert_close(resolve(name)[0](x).sum(-1), torch.full(x.shape[:3], total, dtype=x.dtype))
    far = 1e4 * x.float()
    assert torch.isfinite(feature_maps.stable_exp_pair(far)).all() and feature_maps.stable_exp_pair(far).max() == 1
    assert not torch.isfinite(feature_maps.exp_pair(far)).all()


def test_focused_keeps_the_norm_and_sharpens():
    x = _qkv()[0]
    plain, sharp = Focused(1.0)(x), Focused(6.0)(x)
    torch.testing.assert_close(plain, x.relu() + 1e-6)
    torch.testing.assert_close(plain.norm(dim=-1), sharp.norm(dim=-1))
    assert (sharp.amax(-1) >= plain.amax(-1)).all()
    assert torch.isfinite(Focused()(torch.zeros(1, 1, 2, 4))).all()
    with pytest.raises(ValueError, match="power"):
        Focused(0)


def test_cosine_reweighting_is_a_cosine_of_the_distance():
    q, k, v = _qkv()
    phi = CosineReweighting(20)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    want = q.relu() @ k.relu().mT * torch.cos(math.pi / 2 * distance / 20)
    torch.testing.assert_close(phi(q) @ phi(k).mT, want)
    # one piece or two, with the offset of the second
    whole, state = linear_attention(q, k, v, feature_map=phi, normalize=True, return_state=True)
    _, state = linear_attention(
        q[:, :, :5], k[:, :, :5], v[:, :, :5], feature_map=phi, normalize=True, return_state=True
    )
    rest = linear_attention(
        q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], feature_map=at_offset(phi, 5), normalize=True, state=state
    )
    torch.testing.assert_close(rest, whole[:, :, 5:])
    with pytest.raises(ValueError, match="max_len: got 8"):
        CosineReweighting(8)(q)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_weights_are_those_of_the_op(name, kv_heads):
    q, k, v = _qkv(kv_heads=kv_heads)
    positive = name not in ("identity", "silu")
    options = {"feature_map": name, "normalize": positive, "scale": 0.5}
    weights = linear_attention_weights(q, k, **options)
    wide = v.repeat_interleave(2 // kv_heads, dim=1)
    torch.testing.assert_close(weights @ wide, linear_attention(q, k, v, **options))
    if positive:
        assert (weights >= 0).all() and weights.triu(1).abs().max() == 0


def test_weights_with_a_mask_and_more_keys_than_queries():
    q, k, _ = _qkv()
    whole = linear_attention_weights(q, k, feature_map="elu+1")
    torch.testing.assert_close(linear_attention_weights(q[:, :, 6:], k, feature_map="elu+1"), whole[:, :, 6:])
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :, 3] = False
    weights = linear_attention_weights(q, k, feature_map="elu+1", mask=mask, causal=False)
    assert weights.masked_select(~mask).abs().max() == 0 and weights[0, :, 3].abs().max() == 0
    torch.testing.assert_close(weights[1].sum(-1)[:, mask[1, 0].any(-1)], torch.ones(2, int(mask[1, 0].any(-1).sum())).double(),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
