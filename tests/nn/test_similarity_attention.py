"""SimilarityAttention: what it equals in the limit, slots against keys, decoding, gpt-oss's sinks, loading, errors."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

import regard
from regard.nn import LinearAttention, SimilarityAttention, SoftmaxAttention


def tokens(length=9, dim=16):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_of(**options):
    torch.manual_seed(0)
    layer = SimilarityAttention(16, 4, num_kv_heads=2, rope_base=50.0, **options).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return layer


SCORES = [{"similarity": s, "normalize": n} for s, n in itertools.product(("exp", "sigmoid", "elu+1"), ("sum", "none"))]
SCORES += [{"kernel": "mlp"}, {"kernel": "identity"}, {"kernel": "elu+1"}, {"kernel": "taylor"}, {"normalize": "sum+1"}]
SLOTS = [{}, {"slot": "kv"}, {"slot": "k", "num_slots": 3}, {"slot": "score", "shared": True}, {"value_bias": True}]
ALL = [
    {**a, **b}
    for a, b in itertools.product(SCORES, SLOTS)
    if not (a.get("normalize") == "none" and b.get("slot") in ("k", "score"))
] + [{"slot": "kv", "window": 3}, {"prefix": 4}]


@pytest.mark.parametrize("options", ALL, ids=str)
def test_decodes_trains_and_sees_no_later_token(options):
    layer, x = layer_of(**options), tokens()
    whole = layer(x)
    state, outs = None, []
    for piece in x.split([4, 1, 1, 3], dim=1):
        y, state = layer(piece, state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    whole[:, :5].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    moved = torch.cat((x[:, :5], x[:, 5:] + 1), 1)
    torch.testing.assert_close(layer(moved)[:, :5], whole[:, :5])


def test_defaults_are_softmax_attention():
    layer, x = layer_of(), tokens()
    plain = SoftmaxAttention(16, 4, num_kv_heads=2, rope_base=50.0).double().eval()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.attention_weights(x), plain.attention_weights(x))
    assert not set(plain.state_dict()) ^ set(layer.state_dict())


def test_slots_that_nobody_looks_at_change_nothing():
    layer, x = layer_of(slot="score"), tokens()
    plain = layer_of()
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "slot_score"})
    with torch.no_grad():
        layer.slot_score.fill_(-200.0)
    torch.testing.assert_close(layer(x), plain(x))


def test_value_bias_is_a_constant_in_the_output():
    layer, x = layer_of(value_bias=True), tokens()
    plain = layer_of()
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "value_bias"})
    torch.testing.assert_close(layer(x) - plain(x), layer.o_proj(layer.value_bias.flatten()).expand(2, 9, -1))


def test_a_zero_key_is_softmax_off_by_one():
    layer, x = layer_of(slot="k"), tokens()
    other = layer_of(normalize="sum+1")
    other.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "slot_k"})
    with torch.no_grad():
        layer.slot_k.zero_()
    torch.testing.assert_close(layer(x), other(x))


def test_elu_kernel_is_linear_attention():
    layer = SimilarityAttention(16, 4, kernel="elu+1").double()
    linear = LinearAttention(16, 4, feature_map="elu+1", scale=0.5, eps=1e-8).double()
    linear.load_state_dict({name.replace("o_proj", "out_proj"): t for name, t in layer.state_dict().items()})
    torch.testing.assert_close(layer(tokens()), linear(tokens()))


def test_learned_scores_are_the_sinks_of_gpt_oss():
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    layer, x = SimilarityAttention(16, 4, num_kv_heads=2, slot="score").double().eval(), tokens()
    with torch.no_grad():
        layer.slot_score.normal_()
    q, k, v = layer._project(x)
    mask = torch.full((9, 9), -torch.inf).double().triu(1)[None, None]
    theirs = SimpleNamespace(sinks=layer.slot_score.flatten(), num_key_value_groups=2, training=False)
    out, weights = gpt_oss.eager_attention_forward(theirs, q, k, v, mask, 0.5)
    torch.testing.assert_close(layer.o_proj(out.flatten(2)), layer(x))
    torch.testing.assert_close(layer.attention_weights(x, normalized=False), weights[..., :9])


def test_weights_are_those_of_the_forward_pass():
    x = tokens()
    for options in (
        {"similarity": "sigmoid", "normalize": "none"},
        {"kernel": "taylor"},
        {"slot": "kv"},
        {"window": 3},
    ):
        layer = layer_of(**options)
        v = layer._project(x)[2].repeat_interleave(2, 1)
        weights = layer.attention_weights(x, normalized=False, slots=True)
        if layer.slot_v is not None:
            v = torch.cat((layer.slot_v[None].expand(2, -1, -1, -1), v), 2)
        torch.testing.assert_close(layer.o_proj((weights @ v).transpose(1, 2).flatten(2)), layer(x))
        shares = layer.attention_weights(x, slots=True)
        assert (shares >= 0).all()
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 4, 9).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(shares[..., -9:], layer.attention_weights(x))


def test_a_prefix_is_seen_by_all():
    layer, x = layer_of(prefix=4), tokens()
    moved = torch.cat((x[:, :3], x[:, 3:4] + 1, x[:, 4:]), 1)
    assert (layer(moved) - layer(x)).abs().amax(-1).min() > 1e-6
    everything = layer_of(prefix=9)
    full = SimilarityAttention(16, 4, False, num_kv_heads=2, rope_base=50.0).double()
    full.load_state_dict(everything.state_dict())
    torch.testing.assert_close(everything(x), full(x))


def test_padding_is_as_if_it_were_not_there():
    for options in ({"slot": "kv"}, {"similarity": "sigmoid", "normalize": "none"}):
        torch.manual_seed(0)
        layer, x = SimilarityAttention(16, 4, **options).double().eval(), tokens(6)
        padded = torch.cat((torch.full((2, 3, 16), 9.0, dtype=torch.float64), x), 1)
        there = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2)
        torch.testing.assert_close(layer(padded, padding_mask=there)[:, 3:], layer(x))


def test_loads_the_authors_layout():
    layer, x = layer_of(slot="kv"), tokens()
    own = layer.state_dict()
    rows = []
    for kv in range(2):
        rows += [
            own["q_proj.weight"][8 * kv : 8 * kv + 8],
            *(own[f"{n}_proj.weight"][4 * kv : 4 * kv + 4] for n in "kv"),
        ]
    theirs = {
        "attn.weight": torch.cat(rows), "proj.weight": own["o_proj.weight"],
        "k_bias": own["slot_k"][:, 0], "v_bias": own["slot_v"][:, 0],
    }  # fmt: skip
    other = SimilarityAttention(16, 4, num_kv_heads=2, rope_base=50.0, slot="kv").double().eval()
    regard.load_official(other, theirs)
    assert torch.equal(other(x), layer(x))
    regard.load_official(other, own)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"similarity": "tanh"}, "similarity"),
        ({"similarity": "linear"}, "similarity"),
        ({"similarity": "exp", "kernel": "mlp"}, "similarity"),
        ({"kernel": "cubic"}, "feature_map"),
        ({"normalize": "max"}, "normalize"),
        ({"slot": "q"}, "slot"),
        ({"num_slots": 2}, "num_slots"),
        ({"slot": "k", "normalize": "none"}, "slot"),
        ({"prefix": -1}, "prefix"),
        ({"prefix": 2, "causal": False}, "prefix"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        SimilarityAttention(16, 4, **options)
    with pytest.raises(ValueError, match="state"):
        layer_of()(tokens(), state=SimilarityAttention(16, 2).double()(tokens(), return_state=True)[1])
