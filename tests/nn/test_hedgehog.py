"""Learned feature maps, and Hedgehog's layer."""

import copy

import pytest
import torch

import regard
from regard.models import SmallLM
from regard.nn import LEARNED_MAPS, HedgehogAttention, LearnedFeatureMap, LinearAttention, build_mixer
from regard.nn.sequence.hedgehog import MODES
from regard.nn.sequence.learned_maps import build_map_pair


def _stir(module, seed=0, size=0.5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * size)
    return module


def test_an_untrained_map_is_its_activation():
    x = torch.randn(2, 3, 5, 4)
    for activation in ("symmetric_softmax", "elu+1", "relu"):
        want = regard.ops.state.feature_maps.resolve(activation)[0](x).clamp(min=1e-12)
        for options in ({}, {"skip": True}, {"hidden": 3}, {"bias": "feature"}, {"bias": "head"}):
            torch.testing.assert_close(LearnedFeatureMap(3, 4, activation=activation, **options)(x), want)


def test_heads_do_not_mix():
    one = _stir(LearnedFeatureMap(3, 4, 5))
    x = torch.randn(2, 3, 5, 4)
    before = one(x)
    with torch.no_grad():
        one.weight[1] *= 2
    after = one(x)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]]) and not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_layer_is_linear_attention_with_its_map(mode):
    torch.manual_seed(0)
    layer = _stir(HedgehogAttention(12, 3, mode=mode, rope_base=None, feature_dim=5)).eval()
    plain = LinearAttention(12, 3, feature_map=(layer.maps.q, layer.maps.k), eps=1e-12)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(plain, name).load_state_dict(getattr(layer, name).state_dict())
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(plain(x), layer(x))


def test_state_forms_and_batch_mates():
    layer = _stir(HedgehogAttention(16, 4, num_kv_heads=2)).double().eval()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    whole = layer(x)
    for form in ("parallel", "chunk", "recurrent"):
        torch.testing.assert_close(layer(x, form=form), whole)
    first, state = layer(x[:, :6], return_state=True)
    rest, state = layer(x[:, 6:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    assert state.memory.kv.shape == (3, 4, 8, 4) and state.position == 11
    torch.testing.assert_close(layer(x[1:2]), whole[1:2])


def test_padding_is_not_read():
    layer = _stir(HedgehogAttention(12, 2)).eval()
    x, mask = torch.randn(2, 8, 12), torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3], mask[1, 5:] = False, False
    other = torch.where(mask[..., None], x, torch.full_like(x, float("nan")).nan_to_num(1e3))
    a, b = layer(x, padding_mask=mask), layer(other, padding_mask=mask)
    torch.testing.assert_close(a[mask], b[mask])
    torch.testing.assert_close(a[1, :5], layer(x[1:, :5])[0])
    with pytest.raises(ValueError, match="padding_mask: got"):
        layer(x, padding_mask=mask[:, :4])


@pytest.mark.parametrize("kind", sorted(LEARNED_MAPS))
def test_every_learned_map_trains_in_linear_attention(kind):
    torch.manual_seed(0)
    layer = LinearAttention(12, 3, feature_map=kind, map_options={"feature_dim": 5})
    x = torch.randn(2, 9, 12)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    assert layer.maps.q.weight.grad.abs().max() > 0
    tied = LinearAttention(12, 3, feature_map=kind, map_options={"tie": True})
    assert tied.maps.q is tied.maps.k


def test_grouped_keys_repeat_for_the_map_and_may_share_it():
    torch.manual_seed(0)
    layer = _stir(HedgehogAttention(16, 4, num_kv_heads=2))
    full = HedgehogAttention(16, 4)
    with torch.no_grad():
        for name, p in full.named_parameters():
            source = layer.get_parameter(name)
            if name in ("k_proj.weight", "v_proj.weight"):
                source = source.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
            p.copy_(source)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(layer(x), full(x))
    shared = build_map_pair("hedgehog", 4, 3, num_kv_heads=2)
    assert shared.k.num_heads == 2 and shared.q.num_heads == 4
    with pytest.raises(ValueError, match="num_kv_heads: got 2"):
        build_map_pair("hedgehog", 4, 3, num_kv_heads=2, tie=True)


def test_as_a_mixer_it_learns_and_generates():
    torch.manual_seed(0)
    model = SmallLM(17, 16, 2, 2, "hedgehog")
    ids = torch.randint(17, (4, 12))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert model.generate(ids[:, :5], 4).shape == (4, 9)
    assert model.state_nbytes(10) == model.state_nbytes(40)
    assert not build_mixer("hedgehog", 16, 2, causal=False).causal


def test_the_cosine_map_knows_where_it_is_while_decoding():
    layer = _stir(LinearAttention(12, 3, feature_map="cosine")).double().eval()
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    first, state = layer(x[:, :4], return_state=True)
    rest, _ = layer(x[:, 4:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), layer(x))


def test_half_types_and_copies():
    layer = _stir(HedgehogAttention(16, 2)).bfloat16()
    y = copy.deepcopy(layer)(torch.randn(1, 5, 16).bfloat16())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda: HedgehogAttention(12, 3, mode="cosh"), "mode"),
        (lambda: HedgehogAttention(16, 4, num_kv_heads=3), "num_kv_heads"),
        (lambda: LinearAttention(12, 3, feature_map="hedgehogg"), "feature_map"),
        (lambda: LinearAttention(12, 3, feature_map="relu", map_options={"feature_dim": 4}), "feature_dim"),
        (lambda: LearnedFeatureMap(3, 4, 5, skip=True), "feature_dim"),
        (lambda: LearnedFeatureMap(3, 4, init="zeros"), "init"),
        (lambda: LearnedFeatureMap(3, 4, hidden=2, bias="head"), "bias"),
        (lambda: LearnedFeatureMap(3, 4)(torch.randn(1, 2, 5, 4)), "x: got"),
        (lambda: HedgehogAttention(12, 3)(torch.randn(1, 2, 11)), "x: got"),
    ],
)
def test_errors_name_the_argument(change, names):
    with pytest.raises((ValueError, TypeError), match=names):
        change()
