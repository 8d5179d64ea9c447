"""ELA beyond its recorded numbers: what must hold for any shape, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.nn import EfficientLocalAttention


def randomised(*args, **kwargs):
    layer = EfficientLocalAttention(*args, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    variant=st.sampled_from("TBSL"),
    seed=st.integers(0, 2**16),
)
def test_any_shape_against_the_definition_and_transposed(batch, channels, height, width, variant, seed):
    torch.manual_seed(seed)
    layer = randomised(channels, variant).double()
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    y = layer(x)

    def weigh(strip):  # one sample and one group at a time
        conv = layer.conv(strip)
        per = channels // layer.gn.num_groups
        out = torch.empty_like(conv)
        for b in range(batch):
            for g in range(layer.gn.num_groups):
                part = conv[b, g * per : (g + 1) * per]
                normed = (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt()
                scale, shift = layer.gn.weight[g * per : (g + 1) * per], layer.gn.bias[g * per : (g + 1) * per]
                out[b, g * per : (g + 1) * per] = normed * scale[:, None] + shift[:, None]
        return 1 / (1 + torch.exp(-out))

    want = x * weigh(x.mean(3))[:, :, :, None] * weigh(x.mean(2))[:, :, None, :]
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x.transpose(2, 3)), y.transpose(2, 3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1]), y[:1], rtol=1e-9, atol=1e-9)  # batch mates do not matter


def test_nothing_to_see_quarters_the_map():
    layer = EfficientLocalAttention(32, "B")
    torch.nn.init.zeros_(layer.conv.weight)
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(layer(x), x / 4)  # sigmoid(0) on both axes


def test_factors_are_two_strips():
    layer = randomised(16, "T")
    x = torch.randn(2, 16, 3, 5)
    rows, columns = layer.factors(x)
    assert rows.shape == (2, 16, 3, 1) and columns.shape == (2, 16, 1, 5)
    torch.testing.assert_close(layer.gate(x), (rows * columns).expand(2, 16, 3, 5))
    assert layer.gate(x).min() > 0 and layer.gate(x).max() < 1


def settings_of(layer):
    return layer.conv.kernel_size[0], layer.conv.groups, layer.gn.num_groups if layer.gn is not None else 0


@pytest.mark.parametrize(
    ("channels", "arguments", "want"),
    [
        (64, {}, (7, 8, 16)),  # "L"
        (64, {"variant": "T"}, (5, 64, 32)),
        (64, {"variant": "B"}, (7, 64, 16)),
        (64, {"variant": "S"}, (5, 8, 16)),
        (64, {"variant": "L", "kernel_size": 3, "groups": 2, "gn_groups": 4}, (3, 2, 4)),
        (64, {"variant": "S", "gn_groups": 0}, (5, 8, 0)),
        (64, {"variant": None, "kernel_size": 9, "groups": 1, "gn_groups": 0}, (9, 1, 0)),
        (20, {"variant": "L"}, (7, 2, 10)),  # 20 // 8 = 2 divides, as in the authors' code; 16 is lowered to 10
        (28, {"variant": "L"}, (7, 2, 14)),  # 28 // 8 = 3 does not divide: lowered to 2
        (24, {"variant": "T"}, (5, 24, 24)),
        (6, {"variant": "S"}, (5, 1, 6)),
        (17, {"variant": "B"}, (7, 17, 1)),
    ],
)
def test_settings(channels, arguments, want):
    assert settings_of(EfficientLocalAttention(channels, **arguments)) == want


def test_half_and_gradients():
    torch.manual_seed(0)
    layer = randomised(8, "S", kernel_size=3)
    x = torch.randn(2, 8, 4, 3)
    half = randomised(8, "S", kernel_size=3).bfloat16()
    half.load_state_dict(layer.state_dict())
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)
    assert torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels: got 0, need an int >= 1"),
        ({"channels": 16, "variant": "X"}, "variant: unknown name 'X'; one of: B, L, S, T"),
        ({"channels": 16, "kernel_size": 4}, "kernel_size: got 4, need an odd int >= 1"),
        ({"channels": 16, "groups": 3}, "groups: got 3, need a divisor of channels=16"),
        ({"channels": 16, "gn_groups": 5}, "gn_groups: got 5, need 0 or a divisor of 16"),
        ({"channels": 16, "variant": None, "kernel_size": 3, "groups": 1}, "gn_groups: got None, need a number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientLocalAttention(**arguments)


def test_bad_input():
    layer = EfficientLocalAttention(16)
    with pytest.raises(ValueError, match=r"x: got 'shape \(2, 8, 3, 3\)', need shape \(B, 16, H, W\)"):
        layer(torch.zeros(2, 8, 3, 3))
    with pytest.raises(ValueError, match=r"need shape \(B, 16, H, W\)"):
        layer(torch.zeros(2, 16, 3))
    with pytest.raises(TypeError, match="x: got list, need a torch.Tensor"):
        layer([1.0])
    with pytest.raises(TypeError, match="channels: got float"):
        EfficientLocalAttention(16.0)
