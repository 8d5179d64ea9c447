"""Combiner layers: the pattern with parameters, causality, and training."""

import pytest
import torch

from regard.nn import CombinerAttention, CombinerBlock
from regard.ops import attention, combiner_attention, masks

PATTERNS = ("fixed", "logsparse", "axial_mixture", "axial_rowmajor")


def layer(pattern="axial_rowmajor", seed=0, **options):
    torch.manual_seed(seed)
    return CombinerAttention(16, 2, **({"pattern": pattern, "segment": 4} | options)).eval()


def tokens(length=20, seed=1):
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(seed))


def heads(m, x):
    return (to(x).unflatten(-1, (2, -1)).transpose(1, 2) for to in (m.to_q, m.to_k, m.to_v))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [0, 1, 5, 20, 23])
def test_no_gradient_from_later_tokens_and_some_from_all_earlier_ones(pattern, length):
    m, x = layer(pattern, variant="paper"), tokens(length).requires_grad_()
    y = m(x)
    assert y.shape == x.shape
    for t in range(0, length, 4):
        grad = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().sum(-1)
        assert float(grad[t + 1 :].sum()) == 0.0 and bool((grad[: t + 1] > 0).all())


def test_one_row_is_causal_attention():
    m, x = layer(segment=20), tokens()
    q, k, v = heads(m, x)
    want = m.proj(attention(q, k, v, mask=masks.causal).transpose(1, 2).flatten(2))
    assert torch.allclose(m(x), want, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_other_patterns_are_the_op(pattern):
    m, x = layer(pattern), tokens()
    want = m.proj(combiner_attention(*heads(m, x), pattern=pattern, segment=4).transpose(1, 2).flatten(2))
    assert torch.allclose(m(x), want, atol=1e-6)


def test_row_summaries_without_a_projection_are_plain():
    """Weights over tokens, written out for one query: its row up to itself, and at its column what earlier rows found."""
    m, x = layer(row_summary="none"), tokens()
    q, k, v = heads(m, x)
    q = q * 8**-0.5
    rows = [slice(4 * r, 4 * r + 4) for r in range(5)]
    found = torch.cat([attention(q[:, :, r], k[:, :, r], v[:, :, r], scale=1.0) for r in rows], 2)
    i, column = 14, 2  # row 3
    keys = torch.cat([k[:, :, 12:15], k[:, :, [2, 6, 10]]], 2)
    values = torch.cat([v[:, :, 12:15], found[:, :, [2, 6, 10]]], 2)
    want = attention(q[:, :, i : i + 1], keys, values, scale=1.0)
    assert i % 4 == column
    assert torch.allclose(m(x)[:, i : i + 1], m.proj(want.transpose(1, 2).flatten(2)), atol=1e-5)


@pytest.mark.parametrize("row_summary", ["proj", "wsum", "wsum_proj", "none"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_bidirectional_rows_see_everything(row_summary, variant):
    m, x = layer(causal=False, row_summary=row_summary, variant=variant), tokens().requires_grad_()
    grad = torch.autograd.grad(m(x)[0, 9].sum(), x)[0][0].abs().sum(-1)
    assert bool((grad > 0).all())
    with pytest.raises(ValueError, match="segment"):
        m(tokens(21))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_train(pattern):
    torch.manual_seed(0)
    block = CombinerBlock(16, 2, mlp_dim=24, drop=0.1, pattern=pattern, segment=4, attn_drop=0.2).train()
    block(tokens()).square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in block.parameters())


def test_bad_input():
    for options, match in (
        ({"pattern": "rows"}, "pattern"),
        ({"qkv_dim": 15}, "qkv_dim"),
        ({"segment": 0}, "segment"),
        ({"row_summary": "sum"}, "row_summary"),
        ({"pattern": "logsparse", "causal": False}, "causal"),
        ({"variant": "tf"}, "variant"),
        ({"attn_drop": 1.5}, "attn_drop"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(**options)
    with pytest.raises(ValueError, match="x: got"):
        layer()(torch.randn(2, 4, 8))
