"""Gaussian adaptive attention: the densities by their formula, what weights do not depend on, padding, the floor, loading, errors."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.nn import GaussianAdaptiveAttention, GaussianBlock, gaussian_gate, importance_factor


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OFFSETS = torch.tensor([0.3, -0.5, 0.0], dtype=torch.float64)
WIDTHS = torch.tensor([0.8, -1.7, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_densities_by_their_formula(axis):
    x = values(4, 5, 6)
    mean, deviation = x.mean(axis, keepdim=True), (x.var(axis, keepdim=True) + 1e-8).sqrt()
    product = 1.0
    for offset, width in zip(OFFSETS, WIDTHS):
        far = (x - mean - offset) / deviation
        product = product * (-0.5 * far**2 / width**2).exp() / (2 * math.pi * width**2) ** 0.5
    want = product / product.sum(axis, keepdim=True)
    torch.testing.assert_close(gaussian_gate(x, OFFSETS, WIDTHS, axis), want)
    torch.testing.assert_close(gaussian_gate(x, OFFSETS, WIDTHS, axis).sum(axis), torch.ones_like(want.sum(axis)))


def test_what_weights_do_not_depend_on():
    x, none = values(3, 8), torch.zeros(3, dtype=torch.float64)
    base = gaussian_gate(x, OFFSETS, WIDTHS)
    torch.testing.assert_close(gaussian_gate(x + 5, OFFSETS, WIDTHS), base)
    centred = gaussian_gate(x, none, WIDTHS)
    torch.testing.assert_close(gaussian_gate(-3 * x, none, WIDTHS), centred, rtol=1e-6, atol=1e-8)
    equal = torch.full((3,), 1.5, dtype=torch.float64)
    one = gaussian_gate(x, none[:1], equal[:1] / 3**0.5)
    torch.testing.assert_close(gaussian_gate(x, none, equal), one)
    torch.testing.assert_close(
        gaussian_gate(x, none[:1], equal[:1] * 1e4), torch.full_like(x, 1 / 8), rtol=1e-6, atol=0
    )


def test_the_floor_holds_weights_down_and_can_be_taken_away():
    x, wide = values(2, 6), torch.full((3,), 1e4, dtype=torch.float64)
    held = gaussian_gate(x, OFFSETS, wide)
    expected = 6 * (2 * math.pi * 1e8) ** -1.5 / 1e-8
    torch.testing.assert_close(held.sum(-1), torch.full((2,), expected, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(gaussian_gate(x, OFFSETS, wide, floor=0.0).sum(-1), torch.ones(2, dtype=torch.float64))
    many = torch.full((400,), 3.0)
    half = gaussian_gate(x.bfloat16(), torch.zeros(400), many, floor=0.0)
    assert half.dtype == torch.bfloat16 and half.isfinite().all() and abs(float(half.float().sum()) - 2) < 0.05


def test_padding_left_out_is_as_if_it_were_not_there():
    x = values(2, 7)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 5:] = True
    got = gaussian_gate(x, OFFSETS, WIDTHS, padding=padding, count_padding=False)
    torch.testing.assert_close(got[:, :5], gaussian_gate(x[:, :5], OFFSETS, WIDTHS))
    assert (got[:, 5:] == 0).all()
    counted = gaussian_gate(x, OFFSETS, WIDTHS, padding=padding)
    assert not torch.allclose(counted[:, :5], got[:, :5])
    empty = gaussian_gate(x, OFFSETS, WIDTHS, padding=torch.ones_like(padding), count_padding=False)
    assert (empty == 0).all()
    layer = GaussianAdaptiveAttention(1, 1, 3, padding_value=0.0, count_padding=False).double()
    y, weights = layer(x.masked_fill(padding, 0.0), return_weights=True)
    assert (y[:, 5:] == 0).all() and (weights[:, 5:] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("axis", [1, -1])
def test_heads_have_their_own_piece(axis):
    torch.manual_seed(0)
    layer, x = GaussianAdaptiveAttention(axis, 3, 2).double(), values(2, 7, 8)
    y, weights = layer(x, return_weights=True)
    sizes = [2, 2, 3] if axis == 1 else [2, 2, 4]
    for head, (piece, part) in enumerate(zip(x.split(sizes, axis), weights.split(sizes, axis))):
        torch.testing.assert_close(part, gaussian_gate(piece, layer.offsets[head], layer.widths[head], axis))
    torch.testing.assert_close(y, x * weights)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert sum(p.numel() for p in layer.parameters()) == 2 * 2 * 3


def test_gradients():
    x = values(2, 5).requires_grad_()
    offsets, widths = OFFSETS.clone().requires_grad_(), WIDTHS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: gaussian_gate(*a), (x, offsets, widths))


def test_block_adds_each_layer_to_its_input():
    torch.manual_seed(0)
    block, x = GaussianBlock([-1, 1], 2, [3, 4], num_layers=2).double(), values(2, 6, 8)
    y, weights = block(x, return_weights=True)
    first = block.layers[0](x) + x
    torch.testing.assert_close(y, block.layers[1](first) + first)
    assert len(weights) == 2 and torch.equal(block(x), y)


def test_official_names():
    torch.manual_seed(0)
    theirs = {f"attention_heads.{h}.{n}": torch.randn(3) for h in range(2) for n in ("mean_offsets", "c")}
    layer = GaussianAdaptiveAttention(-1, 2, 3)
    regard.load_official(layer, theirs)
    assert torch.equal(layer.widths[1], theirs["attention_heads.1.c"])
    regard.load_official(layer, layer.state_dict())
    with pytest.raises(ValueError, match="unexpected|left"):
        regard.load_official(layer, theirs | {"attention_heads.2.c": torch.randn(3)})
    block = GaussianBlock(num_heads=2, num_gaussians=3, num_layers=1)
    regard.load_official(block, {f"layers.0.{name}": t for name, t in theirs.items()})
    assert torch.equal(block.layers[0].offsets, layer.offsets)
    regard.load_official(block, block.state_dict())


def test_importance_factor():
    weights = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    factor = importance_factor(weights)
    assert factor.shape == (2, 3) and factor.min() == 0 and factor.max() == 1
    torch.testing.assert_close(importance_factor(iter(weights.split([1, 5]))), factor)
    assert (importance_factor(torch.ones(2, 4)) == 0).all()
    with pytest.raises(ValueError, match="one shape"):
        importance_factor([torch.ones(2, 4), torch.ones(2, 5)])
    with pytest.raises(ValueError, match="at least one sample"):
        importance_factor([])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: GaussianAdaptiveAttention(axis="last"), TypeError, "axis"),
        (lambda: GaussianAdaptiveAttention(num_heads=0), ValueError, "num_heads"),
        (lambda: GaussianAdaptiveAttention(num_gaussians=0), ValueError, "num_gaussians"),
        (lambda: GaussianAdaptiveAttention(floor=-1.0), ValueError, "floor"),
        (lambda: GaussianAdaptiveAttention(2)(values(2, 8)), ValueError, "axis 2"),
        (lambda: GaussianAdaptiveAttention(-1, 4)(values(2, 7)), ValueError, "at least 8 along axis -1"),
        (lambda: GaussianBlock([1, -1], num_layers=3), ValueError, "axis"),
        (lambda: gaussian_gate(values(3), OFFSETS, WIDTHS[:2]), ValueError, "widths"),
        (lambda: gaussian_gate(values(3), OFFSETS, WIDTHS, padding=torch.zeros(2)), ValueError, "padding"),
        (lambda: gaussian_gate(values(3, 1), OFFSETS, WIDTHS), ValueError, "at least 2 entries"),
    ],
)
def test_bad_arguments(make, error, says):
    with pytest.raises(error, match=says):
        make()
