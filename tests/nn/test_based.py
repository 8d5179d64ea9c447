"""Based: the Taylor features and what they are to softmax, the three layers against their definitions, states, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.nn import BasedLinearAttention, BasedSlidingAttention, GatedShortConv
from regard.ops import linear_attention
from regard.ops.state import TaylorExp


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dim, scale", [(1, None), (6, None), (5, 0.3)])
def test_features_give_the_series_to_second_order(dim, scale, compact):
    q, k = torch.randn(2, 3, 7, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    features = TaylorExp(scale, compact)
    s = q @ k.mT * (dim**-0.5 if scale is None else scale)
    made = features(q) @ features(k).mT
    torch.testing.assert_close(made, 1 + s + s**2 / 2, rtol=1e-12, atol=1e-12)
    assert features(q).shape[-1] == features.width(dim) and features(q).dtype == torch.float64
    assert made.min() >= 0.5 - 1e-12


def test_weights_approach_softmax_with_the_third_power_of_the_logits():
    q, k = torch.randn(2, 1, 1, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = torch.eye(12, dtype=torch.float64)[None, None]

    def error(size: float) -> float:
        made = linear_attention(size * q, size * k, v, feature_map="taylor", normalize=True, eps=0.0)
        return float((made - F.scaled_dot_product_attention(size * q, size * k, v, is_causal=True)).abs().max())

    # logits go with the square of the size
    assert error(0.1) < 1e-6 and error(0.2) / error(0.1) == pytest.approx(64, rel=0.2)


def test_compact_features_are_a_smaller_state_of_the_same_layer():
    torch.manual_seed(0)
    small, full = (
        BasedLinearAttention(12, 3, feature_dim=6, head_dim=5, compact=one).double() for one in (True, False)
    )
    full.load_state_dict(small.state_dict())
    x = torch.randn(2, 11, 12, dtype=torch.float64)
    (y, state), (z, large) = small(x, return_state=True), full(x, return_state=True)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-12)
    assert state.memory.kv.shape == (2, 3, 1 + 6 + 21, 5) and large.memory.kv.shape == (2, 3, 1 + 6 + 36, 5)
    assert state.memory.nbytes == small(x.repeat(1, 3, 1), return_state=True)[1].memory.nbytes
    both = BasedLinearAttention(12, 3, causal=False, feature_dim=6).double()
    order = torch.randperm(11)
    torch.testing.assert_close(both(x)[:, order], both(x[:, order]), rtol=1e-10, atol=1e-12)  # it has no positions


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_forms_agree(form):
    torch.manual_seed(0)
    layer = BasedLinearAttention(8, 2, feature_dim=3).double()
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, form=form), layer(x, form="chunk"), rtol=1e-10, atol=1e-12)


def test_gradients():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    for layer in (
        BasedLinearAttention(4, 2, feature_dim=2),
        GatedShortConv(4, kernel_size=3),
        BasedSlidingAttention(4, 2, window_size=4),
    ):
        assert torch.autograd.gradcheck(layer.double(), (x,))


@pytest.mark.parametrize("variant, sees", [("released", 4), ("paper", 7)])
def test_window_and_its_variants(variant, sees):
    torch.manual_seed(0)
    layer = BasedSlidingAttention(8, 2, window_size=7, variant=variant).eval()
    x = torch.randn(1, 20, 8, requires_grad=True)
    layer(x)[0, 15].sum().backward()
    reached = x.grad.abs().sum(-1)[0].nonzero().flatten().tolist()
    assert reached == list(range(16 - sees, 16))
    _, state = layer(x, return_state=True)
    assert state.k.shape[2] == sees - 1


@pytest.mark.parametrize("pieces", [[1, 1, 9], [5, 6], [0, 11]])
@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_convolution_goes_on_from_its_state(kernel, pieces):
    torch.manual_seed(0)
    layer = GatedShortConv(6, kernel_size=kernel, expand=3, conv_bias=True)
    x, state, made = torch.randn(2, 11, 6), None, []
    for piece in x.split(pieces, dim=1):
        y, state = layer(piece, state=state, return_state=True)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, dim=1), layer(x), rtol=1e-5, atol=1e-6)
    assert state.before.shape == (2, kernel - 1, 9)
    swapped = layer(x[:, :1], state=state.select(torch.tensor([1, 0])))
    torch.testing.assert_close(swapped[0], layer(x[:1, :1], state=state.select(torch.tensor([1])))[0])


def test_bf16_and_a_hybrid_model_that_generates():
    torch.manual_seed(0)
    x = torch.randn(1, 20, 16)
    for layer in (BasedLinearAttention(16, 2, feature_dim=4), GatedShortConv(16), BasedSlidingAttention(16, 2)):
        y = layer(x)
        torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), y, rtol=0.05, atol=0.02)
    options = {"based": {"feature_dim": 3}, "sliding_window": {"window": 5}, "gated_conv": {}}
    model = regard.models.SmallLM(20, 16, 3, 2, ("gated_conv", "based", "sliding_window"), mixer_options=options).eval()
    ids = torch.randint(20, (1, 9))
    made = model.generate(ids, 4)
    for end in range(9, 13):
        assert model(made[:, :end])[0, -1].argmax() == made[0, end]
    assert model.state_nbytes(10) == model.state_nbytes(40)


def test_bad_input():
    with pytest.raises(ValueError, match="scale"):
        TaylorExp(scale=0.0)
    with pytest.raises(ValueError, match="feature_dim"):
        BasedLinearAttention(8, 2, feature_dim=0)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        BasedLinearAttention(9, 2)
    with pytest.raises(ValueError, match="variant"):
        BasedSlidingAttention(8, 2, variant="official")
    with pytest.raises(ValueError, match="rope_dims"):
        BasedSlidingAttention(8, 2, rope_dims=6)
    with pytest.raises(ValueError, match="expand"):
        GatedShortConv(5, expand=3)
    layer = GatedShortConv(4)
    with pytest.raises(ValueError, match="x: "):
        layer(torch.randn(1, 3, 5))
    with pytest.raises(TypeError, match="ShortConvState"):
        layer(torch.randn(1, 3, 4), state=torch.zeros(1))
    _, other = GatedShortConv(4, kernel_size=5)(torch.randn(1, 3, 4), return_state=True)
    with pytest.raises(ValueError, match="state"):
        layer(torch.randn(1, 3, 4), state=other)
