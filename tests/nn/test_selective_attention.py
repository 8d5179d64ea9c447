"""SelectiveAttention: temperatures by their formula, limits in which it is plain attention, decoding, loading, spikiness, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.nn import SelectiveAttention, SoftmaxAttention, position_temperature, spikiness


def tokens(length=9, dim=16):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_of(filled=True, **options):
    torch.manual_seed(0)
    layer = SelectiveAttention(16, 4, **options).double().eval()
    if filled:
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if name.startswith(("beta", "value_beta", "scores", "scorers")):
                    p.normal_()
    return layer


def plain_like(layer, **options):
    plain = SoftmaxAttention(16, 4, **options).double().eval()
    plain.load_state_dict(
        {name: t for name, t in layer.state_dict().items() if name.split(".")[0].endswith(("proj", "norm"))}
    )
    return plain


OPTIONS = [
    {},
    {"growth": "linear", "num_kv_heads": 2, "rope_base": 50.0},
    {"growth": "sigmoid", "window": 4},
    {"variant": "paper"},
    {"variant": "paper", "num_kv_heads": 2, "qk_norm": True, "rope_base": 50.0, "bias": True},
    {"variant": "paper", "shared": False},
    {"variant": "paper", "token": False},
    {"variant": "paper", "position": False, "window": 3},
    {"variant": "paper", "value": False, "growth": "exp"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decodes_trains_and_sees_no_later_token(options):
    layer, x = layer_of(**options), tokens()
    whole, state, outs = layer(x), None, []
    for piece in x.split([4, 1, 1, 3], 1):
        y, state = layer(piece, state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    moved = torch.cat((x[:, :5], x[:, 5:] * 2), 1)
    torch.testing.assert_close(layer(moved)[:, :5], whole[:, :5])
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_of_logits_and_columns_of_weights_are_scaled(options):
    layer, x = layer_of(**options), tokens()
    of_queries, of_values = layer.temperatures(x)
    q, k, v = layer._project(x)
    q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rope_base is not None:
        table = regard.nn.rotary_table(torch.arange(9), 4, layer.rope_base)
        q, k = regard.nn.rotate(q, table), regard.nn.rotate(k, table)
    k, v = (t.repeat_interleave(4 // layer.num_kv_heads, 1) for t in (k, v))
    logits = q @ k.mT / 2 * of_queries[:, None, :, None]
    age = torch.arange(9)[:, None] - torch.arange(9)
    gone = (age < 0) | (age >= (layer.window or 9))
    weights = logits.masked_fill(gone, -math.inf).softmax(-1)
    torch.testing.assert_close(layer.attention_weights(x), weights)
    if of_values is not None:
        weights = weights * of_values[:, None, None, :]
    else:
        assert options.get("variant") != "paper" or not options.get("value", True)
    torch.testing.assert_close(layer(x), layer.o_proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("shared", [True, False])
def test_temperatures_of_the_paper_by_their_formula(shared):
    layer, x = layer_of(variant="paper", shared=shared), tokens()
    for side, beta, got in zip("qv", (layer.beta, layer.value_beta), layer.temperatures(x, past=3)):
        if shared:
            score = F.gelu(getattr(layer, f"{side}_proj")(x)) @ layer.scores[side].flatten()
        else:
            score = layer.scorers[side](x)[..., 0]
        want = score.tanh() + 1 + beta.sigmoid() * torch.arange(4, 13, dtype=torch.float64).log()
        torch.testing.assert_close(got, want)


def test_cold_limits_are_plain_attention():
    x = tokens()
    layer = layer_of(beta=50.0)
    with torch.no_grad():
        layer.beta.fill_(50.0)
    torch.testing.assert_close(layer(x), plain_like(layer)(x))
    fresh = layer_of(filled=False, variant="paper", position=False)  # w starts at zero
    torch.testing.assert_close(fresh(x), plain_like(fresh)(x))
    sharp = layer_of()
    torch.testing.assert_close(sharp(x)[:, 0], plain_like(sharp)(x)[:, 0])
    assert not torch.allclose(sharp(x), plain_like(sharp)(x))


def test_what_it_begins_at():
    assert float(SelectiveAttention(8, 2).beta.detach()) == 1.5
    assert float(SelectiveAttention(8, 2, growth="linear").beta.detach()) == pytest.approx(1e-5)
    assert float(SelectiveAttention(8, 2, variant="paper").beta.detach()) == 0.0
    assert float(SelectiveAttention(8, 2, beta=2.0).beta.detach()) == 2.0


def test_position_temperature():
    places, beta = torch.arange(4), torch.tensor(0.3)
    logs = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    torch.testing.assert_close(position_temperature(places, beta), 1 + math.exp(-math.exp(0.3)) * logs)
    torch.testing.assert_close(position_temperature(places, beta, "linear"), 1 + 0.3 * logs)
    torch.testing.assert_close(position_temperature(places, beta, "sigmoid"), 1 + logs / (1 + math.exp(-0.3)))
    with pytest.raises(ValueError, match="growth"):
        position_temperature(places, beta, "log")


def test_official_layers_with_and_without_groups():
    layer, x = layer_of(num_kv_heads=2, bias=True), tokens()
    own = layer.state_dict()
    theirs = {"beta": own["beta"], "proj.weight": own["o_proj.weight"], "proj.bias": own["o_proj.bias"]}
    for kind in ("weight", "bias"):
        q, k, v = (own[f"{side}_proj.{kind}"].unflatten(0, (2, -1)) for side in "qkv")
        theirs[f"attn.{kind}"] = torch.cat((q, k, v), 1).flatten(0, 1)
    other = SelectiveAttention(16, 4, num_kv_heads=2, bias=True).double().eval()
    regard.load_official(other, theirs)
    assert torch.equal(other(x), layer(x))
    regard.load_official(other, own)


def test_spikiness():
    one, even = torch.eye(5)[:2], torch.full((2, 5), 0.2)
    torch.testing.assert_close(spikiness(one), torch.full((2,), 0.2))
    torch.testing.assert_close(spikiness(even), torch.ones(2))
    half = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(spikiness(half, torch.tensor([2, 1])), torch.tensor([1.0, 0.0]))


def test_bfloat16_and_padding():
    layer = SelectiveAttention(16, 4, variant="paper").bfloat16()
    x = tokens().bfloat16()
    y = layer(x, padding_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"causal": False}, "causal"),
        ({"variant": "official"}, "variant"),
        ({"growth": "square"}, "growth"),
        ({"token": False}, "variant='paper'"),
        ({"value": False}, "variant='paper'"),
        ({"num_heads": 3}, "dim"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        SelectiveAttention(**({"dim": 16, "num_heads": 4} | options))
