"""similarity_attention: its definition, the ops it equals in the limit, slots as real keys, masks, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.ops import attention, linear_attention, masks, similarity_attention, similarity_weights


def qkv(n=7, heads=4, kv=2, dim=6, m=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    shapes = ((2, heads, n, dim), (2, kv, m, dim), (2, kv, m, 5))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def by_hand(q, k, v, f, normalize, seen, scores_extra=None, values_extra=None):
    """Row by row, weight by weight."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            of = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                weights, values = [], []
                if scores_extra is not None:
                    for s in range(scores_extra.shape[-1]):
                        weights.append(f(float(scores_extra[b, h, i, s])))
                        values.append(values_extra[h, s])
                for j in range(k.shape[2]):
                    if seen[i, j]:
                        weights.append(f(float(q[b, h, i] @ k[b, of, j]) / q.shape[-1] ** 0.5))
                        values.append(v[b, of, j])
                total = sum(weights)
                divisor = {"sum": total + 1e-8, "sum+1": total + 1, "clamp": max(1, abs(total)), "none": 1}[normalize]
                for w, value in zip(weights, values):
                    out[b, h, i] += w / divisor * value
    return out


FUNCTIONS = {
    "exp": math.exp,
    "sigmoid": lambda s: 1 / (1 + math.exp(-s)),
    "elu+1": lambda s: s + 1 if s > 0 else math.exp(s),
    "linear": lambda s: s,
}


@pytest.mark.parametrize("normalize", ["sum", "sum+1", "clamp", "none"])
@pytest.mark.parametrize("similarity", list(FUNCTIONS))
def test_definition(similarity, normalize):
    if similarity == "linear" and normalize.startswith("sum"):
        pytest.skip("a sum of signed weights may be as near to zero as it likes")
    q, k, v = qkv(5)
    seen = torch.ones(5, 5).tril().bool()
    g = torch.Generator().manual_seed(3)
    scores, values = torch.randn(2, 4, 5, 2, generator=g).double(), torch.randn(4, 2, 5, generator=g).double()
    for slots in (None, (scores, values)):
        got = similarity_attention(q, k, v, similarity=similarity, normalize=normalize, mask=masks.causal, slots=slots)
        want = by_hand(q, k, v, FUNCTIONS[similarity], normalize, seen, *(slots or ()))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 6), more=st.integers(0, 5), kv=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_softmax_without_slots_is_attention(n, more, kv, seed):
    q, k, v = qkv(n, 4, kv, m=n + more, seed=seed)
    mask = masks.sliding_window(3) & masks.causal
    torch.testing.assert_close(similarity_attention(q, k, v, mask=mask), attention(q, k, v, mask=mask))


def test_a_slot_is_a_key_in_front():
    """Scores and values of a real key, attended to as a key or as a slot: the same, gradients included."""
    q, k, v = (t.requires_grad_() for t in qkv(6, kv=4))
    key, value = torch.randn(4, 1, 6).double(), torch.randn(4, 1, 5).double()
    longer = [torch.cat((t[None].expand(2, -1, -1, -1), of), 2) for t, of in ((key, k), (value, v))]
    for name, normalize in (("exp", "sum"), ("exp", "sum+1"), ("sigmoid", "sum"), ("elu+1", "none")):
        slots = (6**-0.5 * q @ key.mT, value)
        one = similarity_attention(q, k, v, similarity=name, normalize=normalize, mask=masks.causal, slots=slots)
        other = similarity_attention(q, *longer, similarity=name, normalize=normalize, mask=masks.causal)
        torch.testing.assert_close(one, other)
        grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (one, other)]
        torch.testing.assert_close(*grads)


def test_off_by_one_is_a_slot_of_score_zero():
    q, k, v = qkv()
    zero = (torch.zeros(1, 1, 1, 1).double(), None)
    one = similarity_attention(q, k, v, normalize="sum+1", mask=masks.causal)
    torch.testing.assert_close(one, similarity_attention(q, k, v, mask=masks.causal, slots=zero))
    both = similarity_attention(q, k, v, normalize="sum+1", slots=zero)
    two = similarity_attention(q, k, v, slots=(zero[0].expand(1, 1, 1, 2), None))
    torch.testing.assert_close(both, two)
    never = similarity_attention(q, k, v, slots=(torch.full((1, 1, 1, 1), -200.0).double(), None))
    torch.testing.assert_close(never, attention(q, k, v))


def test_kernel_with_sum_is_linear_attention():
    q, k, v = qkv(9)
    fq, fk = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    got = similarity_attention(fq, fk, v, similarity="linear", mask=masks.causal, scale=1.0)
    want = linear_attention(q, k, v, feature_map="elu+1", normalize=True, eps=1e-8)
    torch.testing.assert_close(got, want)


def test_constant_logits_are_uniform_whatever_the_similarity():
    q, k, _ = qkv()
    for name in ("exp", "sigmoid", "elu+1"):
        weights = similarity_weights(torch.zeros_like(q), k, similarity=name, mask=masks.causal)
        uniform = torch.ones(7, 7).tril().double()
        torch.testing.assert_close(weights[1, 2], uniform / uniform.sum(-1, keepdim=True))


def test_weights_meet_the_values():
    q, k, v = qkv()
    for name, normalize in (("exp", "sum"), ("sigmoid", "none"), ("linear", "clamp")):
        weights = similarity_weights(q, k, similarity=name, normalize=normalize, mask=masks.causal)
        out = similarity_attention(q, k, v, similarity=name, normalize=normalize, mask=masks.causal)
        torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)


def test_rows_that_see_nothing_give_zeros_and_no_gradient():
    q, k, v = (t.requires_grad_() for t in qkv())
    nothing = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    for name, normalize in (("exp", "sum"), ("exp", "none"), ("exp", "sum+1"), ("sigmoid", "sum"), ("linear", "clamp")):
        out = similarity_attention(q, k, v, similarity=name, normalize=normalize, mask=nothing)
        assert torch.equal(out, torch.zeros_like(out))
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    far = similarity_attention(q * 1e6, k, v, similarity="exp", normalize="none", mask=nothing)
    assert far.isfinite().all()
    value = torch.randn(4, 1, 5).double()
    slot = similarity_attention(q, k, v, mask=nothing, slots=(torch.zeros(1, 1, 1, 1).double(), value))
    torch.testing.assert_close(slot, value[None].expand_as(slot))


def test_half_precision_and_dropout():
    q, k, v = (t.bfloat16() for t in qkv())
    for name in ("exp", "sigmoid"):
        slots = (torch.zeros(1, 4, 1, 1).bfloat16(), torch.ones(1, 1, 5).bfloat16())
        out = similarity_attention(q, k, v, similarity=name, slots=slots, mask=masks.causal)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
    torch.manual_seed(0)
    one = torch.stack([similarity_attention(*qkv(), similarity="sigmoid", dropout=0.5) for _ in range(400)])
    torch.testing.assert_close(one.mean(0), similarity_attention(*qkv(), similarity="sigmoid"), atol=0.25, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"similarity": "tanh"}, "similarity"),
        ({"normalize": "max"}, "normalize"),
        ({"slots": torch.zeros(1)}, "slots"),
        ({"slots": (torch.zeros(1, 1, 1, 0), None)}, r"slots\[0\]"),
        ({"slots": (torch.zeros(1, 3, 1, 1), None)}, r"slots\[0\]"),
        ({"slots": (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 5))}, r"slots\[1\]"),
        ({"slots": (torch.zeros(1, 1, 1, 2), torch.zeros(1, 2, 4))}, r"slots\[1\]"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        similarity_attention(*qkv(), **options)
