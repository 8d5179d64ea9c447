"""Combiner: full support under one softmax, exact limits, causality, any length."""

import pytest
import torch

from regard.ops import attention, combiner_attention, masks, span_summary

CAUSAL = [("fixed", 4), ("logsparse", 1), ("axial_mixture", 4)]
ANY = [(pattern, segment, True) for pattern, segment in CAUSAL] + [("fixed", 4, False), ("axial_mixture", 4, False)]


def qkv(length=24, heads=2, kv_heads=2, dim=6, batch=1, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=dtype)
    k = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, length, dim, generator=g, dtype=dtype)


def matrix(q, k, **options):
    """The effective attention weights, by values that are unit vectors."""
    length = q.shape[2]
    eye = torch.eye(length, dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return combiner_attention(q, k, eye, **options)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("pattern, segment, causal", ANY)
def test_every_allowed_token_is_attended_and_no_other(pattern, segment, causal, variant):
    q, k, _ = qkv()
    weights = matrix(q, k, pattern=pattern, segment=segment, causal=causal, variant=variant)
    allowed = torch.ones(24, 24).tril().bool() if causal else torch.ones(24, 24).bool()
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 24, dtype=q.dtype))
    assert bool((weights[..., allowed] > 0).all())
    assert float(weights[..., ~allowed].abs().sum()) == 0.0


@pytest.mark.parametrize("pattern, segment", CAUSAL)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 22])
def test_any_length_and_a_longer_sequence_changes_nothing_before(pattern, segment, length):
    q, k, v = qkv(26)
    options = {"pattern": pattern, "segment": segment, "variant": "paper"}
    short = combiner_attention(*(x[:, :, :length] for x in (q, k, v)), **options)
    assert torch.allclose(short, combiner_attention(q, k, v, **options)[:, :, :length])


@pytest.mark.parametrize("pattern, segment", [("fixed", 24), ("fixed", 100), ("fixed", 1), ("axial_mixture", 24)])
def test_one_segment_or_segments_of_one_are_exact(pattern, segment):
    q, k, v = qkv()
    want = attention(q, k, v, mask=masks.causal)
    assert torch.allclose(combiner_attention(q, k, v, pattern=pattern, segment=segment), want)


def test_the_first_rows_of_logsparse_are_exact():
    q, k, v = qkv()
    out = combiner_attention(q, k, v, pattern="logsparse")
    assert torch.allclose(out[:, :, :2], attention(q, k, v, mask=masks.causal)[:, :, :2])


def test_spans_count_once_whatever_their_size():
    q, k, _ = qkv(16)
    weights = matrix(q, torch.zeros_like(k), pattern="fixed", segment=4)
    # the last token sees 4 of its own segment and 3 spans of 4
    want = torch.tensor([1 / 28] * 12 + [1 / 7] * 4, dtype=q.dtype)
    assert torch.allclose(weights[0, 0, 15], want)
    weights = matrix(q, torch.zeros_like(k), pattern="logsparse")
    want = torch.tensor([1 / 5 / 8] * 8 + [1 / 5 / 4] * 4 + [1 / 5 / 2] * 2 + [1 / 5] * 2, dtype=q.dtype)
    assert torch.allclose(weights[0, 0, 15], want)


def test_the_released_logsparse_is_one_level_short_after_a_power_of_two():
    q, k, v = qkv(17)
    last = combiner_attention(q, k, v, pattern="logsparse")[:, :, 16]
    assert torch.allclose(last, v[:, :, 16])
    assert not torch.allclose(combiner_attention(q, k, v, pattern="logsparse", variant="paper")[:, :, 16], v[:, :, 16])
    q, k, v = qkv(22)
    both = [combiner_attention(q, k, v, pattern="logsparse", variant=variant) for variant in ("released", "paper")]
    assert torch.equal(*both)


def test_bidirectional_paper_counts_nothing_twice():
    q, k, _ = qkv(16)
    weights = matrix(q, torch.zeros_like(k), pattern="fixed", segment=4, causal=False, variant="paper")
    assert torch.allclose(weights[0, 0, 5, 4:8], torch.full((4,), 1 / 7, dtype=q.dtype))
    released = matrix(q, torch.zeros_like(k), pattern="fixed", segment=4, causal=False)
    assert torch.allclose(released[0, 0, 5, 4:8], torch.full((4,), 1 / 8 + 1 / 32, dtype=q.dtype))


def test_span_summary_is_attention_of_the_largest_query():
    q, k, v = (x.unflatten(2, (6, 4)) for x in qkv())
    keys, values = span_summary(q, k, v)
    assert torch.equal(keys, k.amax(3))
    weights = (q.amax(3)[..., None, :] * k).sum(-1).softmax(-1)
    assert torch.allclose(values, (weights[..., None] * v).sum(3))
    assert torch.allclose(span_summary(q, k, v, summary="mean")[0], k.mean(3))


@pytest.mark.parametrize("pattern, segment, causal", ANY)
def test_shared_kv_heads_equal_repeated_ones(pattern, segment, causal):
    q, k, v = qkv(heads=6, kv_heads=2)
    options = {"pattern": pattern, "segment": segment, "causal": causal, "scale": 0.7}
    repeated = combiner_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), **options)
    assert torch.allclose(combiner_attention(q, k, v, **options), repeated)


@pytest.mark.parametrize("pattern, segment, causal", ANY)
def test_gradients(pattern, segment, causal):
    q, k, v = (x.requires_grad_() for x in qkv(8, heads=1, kv_heads=1, dim=2))
    options = {"pattern": pattern, "segment": segment, "causal": causal}
    assert torch.autograd.gradcheck(lambda *x: combiner_attention(*x, **options), (q, k, v))


@pytest.mark.parametrize("pattern, segment, causal", ANY)
def test_running_sums_half_types_and_dropout(pattern, segment, causal):
    q, k, v = (x.float() for x in qkv())
    options = {"pattern": pattern, "segment": segment, "causal": causal}
    whole = combiner_attention(q, k, v, **options)
    half = combiner_attention(*(x.bfloat16() for x in (q, k, v)), **options)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), whole, atol=0.06)
    torch.manual_seed(0)
    dropped = combiner_attention(q, k, v, dropout=0.5, **options)
    assert torch.isfinite(dropped).all() and not torch.allclose(dropped, whole)
    if pattern == "axial_mixture":
        sums, most = (combiner_attention(q, k, v, running=how, **options) for how in ("sum", "max"))
        assert not torch.allclose(sums, most) and torch.equal(whole, most if causal else sums)


def test_bad_input():
    q, k, v = qkv()
    for options, match in (
        ({"pattern": "axial"}, "pattern"),
        ({"segment": 0}, "segment"),
        ({"summary": "last"}, "summary"),
        ({"pattern": "axial_mixture", "running": "mean"}, "running"),
        ({"pattern": "logsparse", "causal": False}, "causal"),
        ({"pattern": "axial_mixture", "causal": False, "segment": 5}, "segment"),
        ({"variant": "jax"}, "variant"),
    ):
        with pytest.raises(ValueError, match=match):
            combiner_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="k: got"):
        combiner_attention(q, k[:, :, 1:], v)
    assert combiner_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (1, 2, 0, 6)
