"""LongHeads' op: dense within the budget, against a plain loop beyond it, chunks forced and counted, errors."""

import pytest
import torch

from regard.ops import attention, masks
from regard.ops.select import choose_chunks, chunk_features, chunk_select_attention

W = 8


def rotate(x, position, base=100.0):
    half = x.shape[-1] // 2
    angle = position[:, None, :, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def qkv(length=90, heads=4, kv_heads=2, batch=2, dim=8):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, h, length, dim, generator=g, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def everywhere(length):
    return torch.arange(length)[None]


def test_within_the_budget_it_is_causal_attention():
    q, k, v = qkv()
    want = attention(rotate(q, everywhere(90)), rotate(k, everywhere(90)), v, mask=masks.causal)
    for options in ({"budget": 200}, {"budget": 96, "start": 0}, {"budget": 24, "start": 90}):
        got = chunk_select_attention(q, k, v, rotate=rotate, chunk=W, **options)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("include_self", [True, False])
def test_against_its_definition_in_a_loop(include_self):
    """Gather the chosen chunks, turn their keys at 0, 1, 2 ..., the query right behind, one softmax."""
    q, k, v = qkv()
    count, start = 4, 37
    local = everywhere(90) % W
    features = chunk_features(rotate(q, local), rotate(k, local), v, W)[0]
    got = chunk_select_attention(
        q, k, v, rotate=rotate, chunk=W, budget=count * W + 3, start=start, include_self=include_self
    )
    for b in range(2):
        for h in range(4):
            for p in (37, 40, 47, 48, 63, 89):
                c, r = p // W, p % W
                score = features[b, h // 2, : c - 1] @ q[b, h, p]
                best = [j for j in score.argsort(descending=True).tolist() if j != 0][: count - 3]
                keep = sorted([0, *best, c - 1, c])
                rows = [t for j in keep for t in range(j * W, (j + 1) * W)][: (len(keep) - 1) * W + r + include_self]
                keys = rotate(k[b, h // 2, rows][None, None], everywhere(len(rows)))[0, 0]
                query = rotate(q[b, h, p][None, None, None], torch.tensor([[(len(keep) - 1) * W + r]]))[0, 0, 0]
                weights = (keys @ query / 8**0.5).softmax(-1)
                torch.testing.assert_close(got[b, h, p], weights @ v[b, h // 2, rows])


def test_features():
    """Of equal keys: those keys, averaged over their turns; other chunks and a ragged end do not matter."""
    q, k, v = qkv(20)
    k[:, :, :W] = k[:, :, :1]
    turned = rotate(k, everywhere(20) % W)
    features, queries = chunk_features(rotate(q, everywhere(20) % W), turned, v, W)
    assert features.shape == queries.shape == (2, 2, 2, 8)
    weights = (turned[:, :, :W] @ queries[:, :, 0, :, None] / 8**0.5).softmax(2)
    torch.testing.assert_close(features[:, :, 0], (weights * turned[:, :, :W]).sum(2))
    changed = torch.cat([torch.randn(2, 2, W, 8, dtype=torch.float64), turned[:, :, W:]], 2)
    again = chunk_features(rotate(q, everywhere(20) % W), changed, v, W)[0]
    torch.testing.assert_close(again[:, :, 1], features[:, :, 1])
    assert chunk_features(q[:, :, :3], k[:, :, :3], v[:, :, :3], W)[0].shape == (2, 2, 0, 8)


def test_choose_chunks():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0, 9.0]])
    forced = torch.tensor([[True, False, False, False, False]])
    assert choose_chunks(scores, torch.tensor([3]), forced, torch.tensor([3])).tolist() == [[0, 1, 3]]
    assert choose_chunks(scores, torch.tensor([1]), forced, torch.tensor([3])).tolist() == [[0, 1]]
    both = choose_chunks(scores.repeat(2, 1), torch.tensor([3, 0]), forced.repeat(2, 1), torch.tensor([2, 2]))
    assert both.tolist() == [[0, 1], [0, -1]]


def test_half_precision_and_nothing():
    q, k, v = (x.float() for x in qkv())
    want = chunk_select_attention(q, k, v, rotate=rotate, chunk=W, budget=32)
    half = chunk_select_attention(
        *(x.bfloat16() for x in (q, k, v)), rotate=lambda x, p: rotate(x.float(), p).bfloat16(), chunk=W, budget=32
    )
    assert half.dtype == torch.bfloat16
    # choices may differ where features are close; most rows agree
    assert ((half.float() - want).abs().amax(-1) < 0.1).float().mean() > 0.8
    none = chunk_select_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], rotate=rotate, chunk=W, budget=32)
    assert none.shape == (2, 4, 0, 8)


def test_bad_input():
    q, k, v = qkv(20)
    with pytest.raises(ValueError, match="budget: got 20, need an int >= 24"):
        chunk_select_attention(q, k, v, rotate=rotate, chunk=8, budget=20)
    with pytest.raises(ValueError, match="k: got 'length 19'"):
        chunk_select_attention(q, k[:, :, 1:], v, rotate=rotate, chunk=8, budget=24)
    with pytest.raises(ValueError, match="v: got 'head_dim 4'"):
        chunk_features(q, k, v[..., :4], 8)
