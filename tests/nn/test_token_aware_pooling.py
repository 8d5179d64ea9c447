"""TAP beyond its recorded numbers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.nn import TokenAwarePooling
from regard.nn.spatial.token_aware_pooling import dilated_average


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    dim=st.integers(1, 5),
    scales=st.integers(1, 6),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    temperature=st.floats(0.1, 10),
    seed=st.integers(0, 2**16),
)
def test_any_shape_against_convolutions(batch, dim, scales, height, width, temperature, seed):
    torch.manual_seed(seed)
    layer = TokenAwarePooling(dim, scales, temperature).double().eval()
    layer.predictor[1].running_mean.normal_()
    x = torch.randn(batch, dim, height, width, dtype=torch.float64)
    y, weights = layer(x, return_weights=True)
    torch.testing.assert_close(weights, (layer.predictor(x) / temperature).softmax(1))
    ninth = torch.full((dim, 1, 3, 3), 1 / 9, dtype=torch.float64)
    want = weights[:, :1] * x
    for r in range(1, scales):
        want = want + weights[:, r : r + 1] * F.conv2d(x, ninth, padding=r, dilation=r, groups=dim)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x[:1]), y[:1], rtol=1e-10, atol=1e-10)
    tokens = layer(x.flatten(2).transpose(1, 2), grid=(height, width))
    torch.testing.assert_close(tokens, y.flatten(2).transpose(1, 2))


def one_hot(scales, chosen):
    """A layer whose predictor always takes scale `chosen`."""
    layer = TokenAwarePooling(3, scales).eval()
    with torch.no_grad():
        layer.predictor[1].weight.zero_()
        layer.predictor[1].bias.fill_(1.0)
        layer.predictor[2].weight.zero_()
        layer.predictor[2].weight[chosen, :, 1, 1] = 1e4
    return layer


def test_only_the_identity_changes_nothing():
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(one_hot(4, 0)(x), x)
    layer = TokenAwarePooling(3, num_scales=1)
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_flat_map_stays_in_the_interior_and_falls_at_the_border(r):
    y = one_hot(4, r)(torch.full((1, 3, 9, 9), 2.0))
    torch.testing.assert_close(y[..., r:-r, r:-r], torch.full((1, 3, 9 - 2 * r, 9 - 2 * r), 2.0))
    torch.testing.assert_close(y[0, 0, 0, 0], torch.tensor(2.0 * 4 / 9))  # zeros beyond the border count


def test_average_of_a_single_cell():
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 3] = 9.0
    y = dilated_average(x, 3)
    assert y.sum() == 9.0 and torch.equal(y[0, 0, ::3, ::3], torch.ones(3, 3))
    assert dilated_average(x, 0) is x


def test_square_tokens_need_no_grid():
    torch.manual_seed(0)
    layer = TokenAwarePooling(4).eval()
    tokens = torch.randn(2, 9, 4)
    torch.testing.assert_close(layer(tokens), layer(tokens, grid=(3, 3)))
    assert not torch.allclose(layer(tokens), layer(tokens, grid=(1, 9)))


def test_official_names():
    theirs = {"proj.0.weight": 0, "proj.1.running_mean": 1, "proj.2.weight": 2}
    ours = {"predictor.0.weight": 0, "predictor.1.running_mean": 1, "predictor.2.weight": 2}
    assert TokenAwarePooling.official_keys(theirs) == ours
    assert TokenAwarePooling.official_keys({f"dilation_predictor.{name}": v for name, v in theirs.items()}) == ours
    assert TokenAwarePooling.official_keys(ours) == ours
    layer, other = TokenAwarePooling(4), TokenAwarePooling(4)
    renamed = {name.replace("predictor", "proj"): value for name, value in layer.state_dict().items()}
    regard.load_official(other, renamed)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(layer.eval()(x), other.eval()(x))


def test_gradients_and_half():
    torch.manual_seed(0)
    layer = TokenAwarePooling(3, 3)
    x = torch.randn(2, 3, 4, 3)
    want = layer.eval()(x)
    half = TokenAwarePooling(3, 3).eval().bfloat16()
    half.load_state_dict(layer.state_dict())
    torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=0.05, atol=0.05)
    assert torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())


def test_bad_input():
    with pytest.raises(ValueError, match="num_scales: got 0, need an int >= 1"):
        TokenAwarePooling(4, num_scales=0)
    with pytest.raises(ValueError, match="temperature: got 0, need a number > 0"):
        TokenAwarePooling(4, temperature=0)
    layer = TokenAwarePooling(4)
    with pytest.raises(ValueError, match=r"grid: got None, need \(height, width\) for 8 tokens, which are no square"):
        layer(torch.zeros(1, 8, 4))
    with pytest.raises(ValueError, match=r"grid: got \(3, 3\), need \(height, width\) with height \* width = 8 tokens"):
        layer(torch.zeros(1, 8, 4), grid=(3, 3))
    with pytest.raises(ValueError, match=r"x: got 'shape \(1, 3, 2, 2\)', need shape \(B, 4, H, W\) or \(B, N, 4\)"):
        layer(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"x: got 'shape \(4, 4\)', need"):
        layer(torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"x: got .*, need a floating point tensor"):
        layer(torch.zeros(1, 4, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="dilation: got -1, need an int >= 0"):
        dilated_average(torch.zeros(1, 1, 2, 2), -1)
