"""Linear attention of every query to every key, its rules for the sums of rows, and the limit cases that tie them together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.ops import global_linear_attention, global_linear_weights, linear_attention
from regard.ops.state.global_linear import NORMALISERS, magnitude, ratio


def draw(seed=0, batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, dim=4, value_dim=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    q_len=st.integers(0, 5),
    kv_len=st.integers(0, 6),
    rule=st.sampled_from(sorted(NORMALISERS)),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_is_the_weights_times_the_values(kv_heads, group, q_len, kv_len, rule, padded, seed):
    q, k, v = draw(seed, 2, kv_heads * group, kv_heads, q_len, kv_len)
    lengths = torch.tensor([kv_len // 2, kv_len]) if padded else None
    options = dict(normaliser=rule, feature_map="elu+1", lengths=lengths, rotate=lambda x: x.flip(-1) * 0.7)
    weights = global_linear_weights(q, k, **options)
    assert weights.shape == (2, kv_heads * group, q_len, kv_len)
    want = weights @ v.repeat_interleave(group, 1)
    torch.testing.assert_close(global_linear_attention(q, k, v, **options), want)


@pytest.mark.parametrize("rule", ["ratio", "subtract", "magnitude"])
def test_rows_sum_to_one(rule):
    q, k, _ = draw()
    sums = global_linear_weights(q, k, normaliser=rule, feature_map="elu+1").sum(-1)
    torch.testing.assert_close(
        sums, torch.ones_like(sums), atol=1e-4, rtol=0
    )  # magnitude and ratio hold an eps of 1e-6


def test_ratio_is_the_normalised_linear_attention_of_this_library():
    q, k, v = draw()
    want = linear_attention(q, k, v, causal=False, normalize=True, feature_map="elu+1", eps=0.0)
    have = global_linear_attention(q, k, v, normaliser=ratio(), feature_map="elu+1")
    torch.testing.assert_close(have, want)


def test_floor_scales_small_rows_down_and_leaves_large_ones():
    q, k, v = draw()
    q, k = q.abs(), k.abs()
    sums = q @ k.repeat_interleave(2, 1).sum(2)[..., None]
    floor = float(sums.median())
    want = global_linear_attention(q, k, v, normaliser=ratio()) * (sums / floor).clamp(max=1)
    torch.testing.assert_close(global_linear_attention(q, k, v, normaliser=ratio(floor), scale=1.0), want)


def test_only_the_ratio_forgets_the_size_of_the_query():
    q, k, _ = draw()
    rows = lambda rule, factor: global_linear_weights(q.abs() * factor, k.abs(), normaliser=rule)  # noqa: E731
    torch.testing.assert_close(rows(ratio(), 2.0), rows(ratio(), 1.0))
    for rule in ("subtract", "magnitude"):
        assert float((rows(rule, 2.0) - rows(rule, 1.0)).abs().max()) > 1e-3


def test_small_queries():
    """phi(q) -> 0: subtract gives the mean of the values, magnitude the plain ratio."""
    q, k, v = draw()
    mean = v.repeat_interleave(2, 1).mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(global_linear_attention(0 * q, k, v, normaliser="subtract"), mean)
    q, k = q.abs() * 1e-7, k.abs()
    have = global_linear_weights(q, k, normaliser=magnitude(eps=0.0))
    torch.testing.assert_close(have, global_linear_weights(q, k, normaliser=ratio()), atol=1e-5, rtol=1e-5)


def test_padding_is_not_seen():
    q, k, v = draw()
    for rule in NORMALISERS:
        want = global_linear_attention(q[:1], k[:1, :, :4], v[:1, :, :4], normaliser=rule, feature_map="elu+1")
        dirty_k, dirty_v = k.clone(), v.clone()
        dirty_k[0, :, 4:], dirty_v[0, :, 4:] = float("nan"), float("inf")
        lengths = torch.tensor([4, 0])
        have = global_linear_attention(q, dirty_k, dirty_v, normaliser=rule, feature_map="elu+1", lengths=lengths)
        torch.testing.assert_close(have[:1], want)
        assert not have[1].any()


def test_own_rule_and_half_types():
    q, k, v = draw()
    halved = global_linear_attention(q, k, v, normaliser=lambda total, count: (0.5, 0.0), scale=1.0)
    torch.testing.assert_close(halved, 0.5 * linear_attention(q, k, v, causal=False))
    halves = [x.to(torch.bfloat16) for x in (q, k, v)]
    want = global_linear_attention(*(x.double() for x in halves), normaliser="magnitude", feature_map="elu+1")
    have = global_linear_attention(*halves, normaliser="magnitude", feature_map="elu+1")
    assert have.dtype == torch.bfloat16
    assert float((have.double() - want).abs().max()) < 0.01 * float(want.abs().max())


@pytest.mark.parametrize("rule", sorted(NORMALISERS))
def test_gradients(rule):
    inputs = [x.requires_grad_() for x in draw(batch=1, heads=2, kv_heads=1, q_len=3, kv_len=4, dim=2, value_dim=2)]
    call = lambda q, k, v: global_linear_attention(q, k, v, normaliser=rule, feature_map="elu+1")  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (dict(normaliser="softmax"), ValueError, "normaliser"),
        (dict(normaliser=3), TypeError, "normaliser"),
        (dict(scale="1"), TypeError, "scale"),
        (dict(rotate=1), TypeError, "rotate"),
        (dict(lengths=torch.tensor([9, 1])), ValueError, "lengths"),
        (dict(feature_map="nothing"), ValueError, "feature_map"),
    ],
)
def test_errors_name_the_argument(change, error, names):
    q, k, v = draw()
    with pytest.raises(error, match=names):
        global_linear_attention(q, k, v, **change)
    with pytest.raises(error, match=names):
        global_linear_weights(q, k, **change)


def test_floor_must_be_positive():
    with pytest.raises(ValueError, match="floor"):
        ratio(floor=0.0)
    q, k, v = draw()
    with pytest.raises(ValueError, match="v: got"):
        regard.ops.global_linear_attention(q, k, v[:, :, 1:])
