"""Neighborhood attention as a layer. Its numbers are pinned by the conformance vectors 026-module*."""

import pytest
import torch

import regard
from regard.nn import NeighborhoodAttention, NeighborhoodAttention1D, NeighborhoodAttention3D


def test_a_kernel_as_large_as_the_map_is_self_attention():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(12, 3, (5, 4))
    x = torch.randn(2, 5, 4, 12)
    q, k, v = layer.qkv(x).reshape(2, 20, 3, 3, 4).permute(2, 0, 3, 1, 4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 4, 12)
    torch.testing.assert_close(layer(x), layer.proj(dense))


@pytest.mark.parametrize(("cls", "grid"), [(NeighborhoodAttention1D, (11,)), (NeighborhoodAttention3D, (3, 4, 5))])
def test_one_layer_serves_any_grid_and_learns(cls, grid):
    torch.manual_seed(0)
    layer = cls(8, 2, 3, rel_pos_bias=True, attn_drop=0.5)
    for sizes in (grid, tuple(length + 2 for length in grid)):
        x = torch.randn(2, *sizes, 8, requires_grad=True)
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert x.grad.abs().min() > 0 and all(p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_older_layers_load_with_their_biases():
    torch.manual_seed(0)
    layer, other = (NeighborhoodAttention(8, 2, 3, rel_pos_bias=True) for _ in range(2))
    state = {"rpb" if name == "rel_pos_bias" else name: value for name, value in layer.state_dict().items()}
    regard.load_official(other, state)
    x = torch.randn(1, 6, 7, 8)
    assert torch.equal(layer(x), other(x))


def test_small_maps_are_padded_where_asked():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, 3, dilation=(1, 2), pad_small=True)
    x = torch.randn(2, 2, 5, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    assert torch.equal(layer(x), layer(padded)[:, :2, :5]) and layer(x).shape == x.shape
    large = torch.randn(2, 7, 7, 8)
    layer_without = NeighborhoodAttention(8, 2, 3, dilation=(1, 2))
    layer_without.load_state_dict(layer.state_dict())
    assert torch.equal(layer(large), layer_without(large))


def test_bad_input():
    for bad in (
        {"dim": 10, "num_heads": 3},
        {"kernel_size": (3, 3), "grid_dims": 3},
        {"grid_dims": 4},
        {"kernel_size": (3,) * 4},
    ):
        with pytest.raises(ValueError, match="need"):
            NeighborhoodAttention(**{"dim": 8, "num_heads": 2, "kernel_size": 3} | bad)
    layer = NeighborhoodAttention(8, 2, 3)
    with pytest.raises(ValueError, match="x: got 'shape .2, 5, 8.', need 4 dimensions"):
        layer(torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match="x: got '6 channels', need dim = 8"):
        layer(torch.zeros(2, 5, 5, 6))
    with pytest.raises(ValueError, match="kernel_size"):
        layer(torch.zeros(2, 2, 5, 8))
