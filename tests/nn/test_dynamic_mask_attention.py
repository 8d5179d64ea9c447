"""The DMA layer: decoding equals the whole, forms, padding, gradients, checkpoints' names, errors."""

import pytest
import torch

from regard.nn import DynamicMaskAttention


def layer(**options):
    torch.manual_seed(0)
    made = DynamicMaskAttention(**({"dim": 24, "num_heads": 4, "num_kv_heads": 2, "keep": 5} | options)).double()
    made.A.data.normal_()
    return made.eval()


def tokens(length=19, batch=2, seed=1):
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"form": "linear"}, {"form": "linear", "select": "relu"}, {"rope_base": None}])
def test_decoding_is_the_whole(options):
    module, x = layer(**options), tokens()
    whole = module(x)
    out, state = module(x[:, :8], return_state=True)
    parts = [out]
    for step in (slice(8, 9), slice(9, 14), *(slice(i, i + 1) for i in range(14, 19))):
        out, state = module(x[:, step], state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state.length == 19 and state.key_bias.shape == (2, 2, 19)
    swapped = state.reorder(torch.tensor([1, 0]))
    more = tokens(1, seed=5)
    torch.testing.assert_close(module(more.flip(0), state=swapped).flip(0), module(more, state=state))


@pytest.mark.parametrize("options", [{}, {"block": 4}])
def test_left_padding_changes_nothing(options):
    module, x = layer(**options), tokens(batch=1)
    padded = torch.cat((torch.randn(1, 6, 24, dtype=torch.float64), x), dim=1)
    mask = torch.arange(25)[None] >= 6
    found = module(padded, padding_mask=mask, positions=(torch.arange(25) - 6).clamp(min=0))[:, 6:]
    if options:  # blocks begin elsewhere
        assert found.shape == x.shape
    else:
        torch.testing.assert_close(found, module(x))
    _, state = module(padded, padding_mask=mask, positions=torch.arange(25) - 6, return_state=True)
    more = tokens(1, 1, seed=3)
    _, alone = module(x, return_state=True)
    if not options:
        torch.testing.assert_close(module(more, state=state, positions=torch.tensor([19])), module(more, state=alone))


def test_fresh_layers_keep_a_window_and_learn_what_to_keep():
    torch.manual_seed(0)
    fresh = DynamicMaskAttention(24, 4, keep=4).double()
    x = tokens()
    old = x.clone()
    old[:, :5] += 1.0
    torch.testing.assert_close(fresh(x)[:, 9:], fresh(old)[:, 9:])  # out of the window: A = 0
    module = layer()
    module(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_causal_and_not():
    module, x = layer(), tokens()
    late = x.clone()
    late[:, 12:] += 1.0
    torch.testing.assert_close(module(x)[:, :12], module(late)[:, :12])
    free = layer(causal=False)
    assert not torch.allclose(free(x)[:, :12], free(late)[:, :12])
    with pytest.raises(ValueError, match="a causal layer"):
        free(x, state=module(x, return_state=True)[1])


def test_forms():
    module, v = layer(), torch.randn(2, 2, 7, 6, dtype=torch.float64)
    linear = layer(form="linear")
    linear.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.key_bias(v), linear.key_bias(v).exp())
    assert bool((layer(form="exp").key_bias(v) > 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: got 3"),
        ({"dim": 25}, "dim: got 25"),
        ({"keep": 0}, "keep: got 0"),
        ({"form": "log"}, "form: unknown name 'log'"),
        ({"head_dim": 5}, "head_dim: got 5"),
        ({"select": "best"}, "select: unknown name"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        layer(**options)


def test_bad_input():
    module = layer()
    with pytest.raises(ValueError, match=r"x: got 'shape \(2, 19, 24\)'|x: got"):
        module(torch.zeros(2, 19, 23, dtype=torch.float64))
    with pytest.raises(ValueError, match="padding_mask: got"):
        module(tokens(), padding_mask=torch.ones(2, 4))
    with pytest.raises(TypeError, match="state: got tuple"):
        module(tokens(), state=(1, 2))
