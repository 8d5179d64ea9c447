"""Attention with an ingredient taken out: each variant is what it says, its forms agree, and models of them train; indicators; errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard.lens import attention_indicators, compare_indicators
from regard.models import DeconstructedLM, layer_places
from regard.nn import CumulativeScoreAttention, FixedMapAttention, GatedMLPMixer, SoftmaxAttention, TaylorAttention


def test_cumulative_scores_are_softmax_attention_whose_queries_have_no_say():
    torch.manual_seed(0)
    layer, x = CumulativeScoreAttention(12, 3).double(), torch.randn(2, 9, 12, dtype=torch.float64)
    weights = layer.attention_weights(x)
    v = layer.v_proj(x).view(2, 9, 3, 4).transpose(1, 2)
    want = layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want)
    # between two keys, every later query chooses alike
    odds = weights[:, :, :, 0] / weights[:, :, :, 1]
    torch.testing.assert_close(odds[:, :, 1:], odds[:, :, 1:2].expand(-1, -1, 8))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cumulative_state_continues_and_large_scores_do_not_hurt(qk_norm):
    torch.manual_seed(1)
    layer, x = CumulativeScoreAttention(8, 2, qk_norm=qk_norm), torch.randn(2, 11, 8)
    with torch.no_grad():
        layer.k_proj.weight.mul_(400)  # scores far beyond what exp can hold
        scores = layer.scores(x)
        assert qk_norm or scores.abs().max() > 100
        whole, state, made = layer(x), None, []
        assert whole.isfinite().all()
        for piece in x.split([1, 4, 0, 6], dim=1):
            y, state = layer(piece, state=state, return_state=True)
            made.append(y)
        torch.testing.assert_close(torch.cat(made, dim=1), whole, rtol=1e-4, atol=1e-5)
        want = (layer.attention_weights(x) @ layer.v_proj(x).view(2, 11, 2, 4).transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(whole, layer.o_proj(want.flatten(2)), rtol=1e-4, atol=1e-5)


def test_cumulative_gradients_are_those_of_the_weights():
    torch.manual_seed(2)
    layer = CumulativeScoreAttention(6, 2).double()
    x = torch.randn(1, 7, 6, dtype=torch.float64, requires_grad=True)
    score, v = layer.scores(x), layer.v_proj(x).view(1, 7, 2, 3).transpose(1, 2)
    seen = torch.ones(7, 7).tril().bool()
    plain = score[:, :, None].masked_fill(~seen, -torch.inf).softmax(-1) @ v
    want = torch.autograd.grad(layer.o_proj(plain.transpose(1, 2).flatten(2)).sin().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(layer(x).sin().sum(), x)[0], want)


def test_taylor_weights():
    torch.manual_seed(3)
    layer, x = TaylorAttention(8, 2).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (p(x).view(1, 6, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    s = q @ k.mT * 4**-0.5
    weights = ((1 + s + s * s / 2) * torch.ones(6, 6).tril()).double()
    out = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(layer(x), layer.out_proj(out.transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-7)


def test_fixed_maps_do_not_look_at_the_text():
    torch.manual_seed(4)
    layer, x, y = FixedMapAttention(8, 2, std=1.0, rope_base=100.0), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    assert torch.equal(layer.attention_weights(x), layer.attention_weights(y))
    # so the layer is linear in its input
    torch.testing.assert_close(layer(x + 2 * y), layer(x) + 2 * layer(y), rtol=1e-4, atol=1e-5)
    assert not layer.noise.requires_grad


def test_fixed_maps_from_the_input_itself_are_attention():
    torch.manual_seed(5)
    layer, x = FixedMapAttention(8, 2, rope_base=100.0), torch.randn(2, 7, 8)
    plain = SoftmaxAttention(8, 2, rope_base=100.0)
    plain.load_state_dict({name: one for name, one in layer.state_dict().items() if name != "noise"})
    torch.testing.assert_close(layer(x, source=x), plain(x))
    torch.testing.assert_close(layer.attention_weights(x, source=x), plain.attention_weights(x))


def test_no_mixing_is_no_mixing_at_attentions_size():
    torch.manual_seed(6)
    layer, x = GatedMLPMixer(12), torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x)[:, 3:4], layer(x[:, 3:4]))
    count = sum(p.numel() for p in GatedMLPMixer(96).parameters())
    assert count == sum(p.numel() for p in SoftmaxAttention(96, 4).parameters())


VARIANTS = ("standard", "mlp", "approximate", "non_approximate", "random", "sequence", "static")


def model(variant, standard="none", layers=4, **options):
    torch.manual_seed(7)
    if variant == "sequence":
        options["fixed_ids"] = torch.randint(13, (24,))
    return DeconstructedLM(13, 16, layers, 2, variant=variant, standard=standard, mlp_ratio=2, max_len=32, **options)


@pytest.mark.parametrize("standard", ["none", "even"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_models_are_causal_train_and_generate(variant, standard):
    lm = model(variant, standard).eval()
    ids = torch.randint(13, (2, 20))
    logits = lm(ids)
    changed = torch.cat((ids[:, :12], (ids[:, 12:] + 1) % 13), dim=1)
    torch.testing.assert_close(lm(changed)[:, :12], logits[:, :12], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lm(ids[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    for name, one in lm.named_parameters():
        assert one.grad is not None and one.grad.isfinite().all(), name
    assert lm.generate(ids[:, :4], 3).shape == (2, 7)
    assert lm.decodes == (variant not in ("random", "sequence", "static"))


@pytest.mark.parametrize("variant", ["random", "sequence"])
def test_fixed_models_have_the_same_maps_for_every_text(variant):
    lm = model(variant).eval()
    a, b = (lm.attentions(torch.randint(13, (1, 10))) for _ in range(2))
    assert sorted(a) == [0, 1, 2, 3]
    for layer in a:
        assert torch.equal(a[layer], b[layer])
    assert not torch.allclose(a[0], a[1])  # but each layer its own
    hybrid = model(variant, "even").eval()
    a, b = (hybrid.attentions(torch.randint(13, (1, 10))) for _ in range(2))
    assert torch.equal(a[1], b[1]) and not torch.allclose(a[0], b[0])


def test_fixed_sequence_read_as_the_text_is_the_standard_model():
    """Given its own fixed text, the model's maps are those that standard attention makes of it."""
    lm, plain = model("sequence").eval(), model("standard").eval()
    plain.load_state_dict({k: v for k, v in lm.state_dict().items() if "noise" not in k and k != "fixed_ids"})
    ids = lm.fixed_ids[None, :15]
    torch.testing.assert_close(lm(ids), plain(ids), rtol=1e-4, atol=1e-5)


def test_static_maps_are_standard_in_the_first_layer_alone():
    lm, plain = model("static").eval(), model("standard").eval()
    plain.load_state_dict({k: v for k, v in lm.state_dict().items() if "noise" not in k})
    ids = torch.randint(13, (2, 12))
    ours, theirs = lm.attentions(ids), plain.attentions(ids)
    torch.testing.assert_close(ours[0], theirs[0])
    assert not torch.allclose(ours[1], theirs[1], atol=1e-4)


def test_skipped_layers_are_gone_and_come_back():
    lm, ids = model("mlp", "even").eval(), torch.randint(13, (1, 9))
    before = lm(ids)
    with lm.skip_layers("odd"):
        x = lm.embedding(ids)
        for index in (0, 2):
            x, _ = lm.blocks[index](x)
        torch.testing.assert_close(lm(ids), lm.head(lm.norm(x)))
        assert not lm.decodes
        with pytest.raises(ValueError, match="^state"):
            lm(ids, return_state=True)
    assert torch.equal(lm(ids), before)


def test_places():
    assert layer_places("odd", 6) == (1, 3, 5) and layer_places("even", 5) == (0, 2, 4)
    assert layer_places("top_half", 6) == (3, 4, 5) and layer_places("bottom_half", 6) == (0, 1, 2)
    assert layer_places("middle_half", 8) == (2, 3, 4, 5) and layer_places("quarter", 8) == (0, 4)
    assert layer_places("ends", 6) == (0, 5) and layer_places("ends", 1) == (0,)
    assert layer_places([-1, 0, 0], 4) == (0, 3) and layer_places("none", 3) == ()


def test_indicators_of_known_maps():
    length = 9
    harmonic = sum(1 / i for i in range(1, length + 1))
    uniform = (torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]).expand(2, 3, -1, -1)
    found = attention_indicators(uniform)
    assert found["sink"] == pytest.approx(harmonic / length) == found["local_0"]
    assert found["concentration"] == pytest.approx(harmonic**0.5)
    assert found["entropy"] == pytest.approx(math.log(math.factorial(length)))
    assert found["head_diversity"] == pytest.approx(0.0, abs=1e-7)
    one = torch.eye(length).expand(1, 1, -1, -1)
    found = attention_indicators(one, offsets=2)
    assert found["concentration"] == pytest.approx(3.0) and found["entropy"] == 0.0
    assert (found["local_0"], found["local_1"]) == (1.0, 0.0) and found["sink"] == pytest.approx(1 / 9)
    first = torch.zeros(1, 1, length, length)
    first[..., 0] = 1.0
    assert attention_indicators(first)["sink"] == pytest.approx(1.0)
    two = torch.cat((one, first), dim=1)
    apart = attention_indicators(two)["head_diversity"]
    assert apart == pytest.approx((2 * (length - 1)) * 0.5 * 2 / (length * (length + 1)))
    scaled = compare_indicators(
        {"a": attention_indicators(one), "b": attention_indicators(first), "c": attention_indicators(two)}
    )
    assert scaled["a"]["head_diversity"] == 0 and scaled["c"]["head_diversity"] == 1
    assert scaled["a"]["concentration"] == 0.0 == scaled["b"]["concentration"]


def test_errors_name_the_argument():
    x = torch.zeros(1, 3, 8)
    cases = [
        ("dim", lambda: CumulativeScoreAttention(9, 2)),
        ("dim", lambda: TaylorAttention(9, 2)),
        ("head_dim", lambda: FixedMapAttention(6, 2, rope_base=10.0)),
        ("x", lambda: FixedMapAttention(8, 2, max_len=2)(x)),
        ("source", lambda: FixedMapAttention(8, 2)(x, source=x[:, :2])),
        ("state", lambda: FixedMapAttention(8, 2)(x, state=1)),
        ("state", lambda: CumulativeScoreAttention(8, 2)(x, state=1)),
        ("x", lambda: GatedMLPMixer(8)(x[..., :2])),
        ("variant", lambda: model("rnd")),
        ("where", lambda: layer_places("upper", 4)),
        ("where", lambda: layer_places([4], 4)),
        ("fixed_ids", lambda: DeconstructedLM(5, 8, 2, 2, variant="sequence")),
        ("fixed_ids", lambda: DeconstructedLM(5, 8, 2, 2, fixed_ids=torch.zeros(4).long())),
        ("options", lambda: DeconstructedLM(5, 8, 2, 2, mixer="softmax")),
        ("ids", lambda: model("sequence")(torch.zeros(1, 25).long())),
        ("weights", lambda: attention_indicators(torch.ones(1, 1, 3, 3))),
        ("weights", lambda: attention_indicators(torch.ones(1, 3, 3))),
        ("offsets", lambda: attention_indicators(torch.eye(3)[None, None])),
        ("models", lambda: compare_indicators({})),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            call()
