"""SHSA beyond its recorded numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regard.nn import SingleHeadSelfAttention
from regard.ops import reference


def randomised(*args, **kwargs):
    layer = SingleHeadSelfAttention(*args, **kwargs).double()
    for part in layer.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return layer.eval()


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    dim=st.integers(1, 12),
    part=st.integers(1, 12),
    qk_dim=st.integers(1, 20),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_any_shape_against_the_definition(batch, dim, part, qk_dim, height, width, seed):
    torch.manual_seed(seed)
    pdim = min(part, dim)
    layer = randomised(dim, qk_dim, pdim)
    x = torch.randn(batch, dim, height, width, dtype=torch.float64)
    first = x[:, :pdim]
    mean = first.mean(dim=(1, 2, 3), keepdim=True)
    variance = first.var(dim=(1, 2, 3), correction=0, keepdim=True)
    normed = (first - mean) / (variance + 1e-5).sqrt()
    normed = normed * layer.norm.weight.view(1, -1, 1, 1) + layer.norm.bias.view(1, -1, 1, 1)
    q, k, v = layer.qkv(normed).flatten(2).split([qk_dim, qk_dim, pdim], dim=1)
    weights = torch.einsum("bdi,bdj->bij", q, k).div(qk_dim**0.5).softmax(-1)
    attended = torch.einsum("bij,bdj->bdi", weights, v).reshape(batch, pdim, height, width)
    want = layer.proj(torch.cat([attended, x[:, pdim:]], 1).clamp(min=0))
    torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.attention_weights(x), weights, rtol=1e-9, atol=1e-9)


def test_whole_width_is_plain_single_head_attention():
    torch.manual_seed(0)
    layer = randomised(6, 4, pdim=6)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).split([4, 4, 6], dim=-1)
    y = reference.attention(q, k, v, q_offset=0, scale=0.5).squeeze(1).transpose(1, 2).reshape(2, 6, 3, 4)
    torch.testing.assert_close(layer(x), layer.proj(y.relu()))


def test_passing_channels_may_be_permuted_with_the_projection():
    torch.manual_seed(0)
    layer = randomised(9, 4, pdim=3)
    x = torch.randn(2, 9, 4, 5, dtype=torch.float64)
    want = layer(x)
    order = torch.cat([torch.arange(3), 3 + torch.randperm(6)])
    with torch.no_grad():
        layer.proj.conv.weight.copy_(layer.proj.conv.weight[:, order])
    torch.testing.assert_close(layer(x[:, order]), want)


def test_passing_channels_mix_no_positions():
    torch.manual_seed(0)
    layer = randomised(8, 4, pdim=2)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    moved = x.clone()
    moved[:, 2:, 1, 1] += 1.0
    changed = (layer(moved) - layer(x)).abs().amax(1)[0] > 1e-12
    assert changed[1, 1] and changed.sum() == 1


def test_fresh_layer_returns_zeros():
    assert torch.count_nonzero(SingleHeadSelfAttention(14)(torch.randn(2, 14, 3, 3))) == 0


@pytest.mark.parametrize(
    ("dim", "pdim"), [(224, 48), (320, 68), (308, 66), (448, 96), (352, 75), (336, 72), (4, 1), (1, 1)]
)
def test_default_part_is_that_of_the_released_networks(dim, pdim):
    assert SingleHeadSelfAttention(dim).pdim == pdim


def test_official_names_and_gradients():
    theirs = {
        "pre_norm.weight": 0,
        "qkv.c.weight": 1,
        "qkv.bn.running_var": 2,
        "proj.1.c.weight": 3,
        "proj.1.bn.bias": 4,
    }
    ours = dict(
        zip(("norm.weight", "qkv.conv.weight", "qkv.bn.running_var", "proj.conv.weight", "proj.bn.bias"), range(5))
    )
    assert SingleHeadSelfAttention.official_keys(theirs) == ours
    assert SingleHeadSelfAttention.official_keys(ours) == ours
    torch.manual_seed(0)
    layer = randomised(5, 2, 2)
    x = torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_bad_input():
    with pytest.raises(ValueError, match=r"pdim: got 9, need an int in 1\.\.dim=8"):
        SingleHeadSelfAttention(8, pdim=9)
    with pytest.raises(ValueError, match="qk_dim: got 0, need an int >= 1"):
        SingleHeadSelfAttention(8, qk_dim=0)
    with pytest.raises(TypeError, match="dim: got str"):
        SingleHeadSelfAttention("8")
    with pytest.raises(ValueError, match=r"x: got 'shape \(2, 7, 3, 3\)', need shape \(B, 8, H, W\)"):
        SingleHeadSelfAttention(8)(torch.zeros(2, 7, 3, 3))
