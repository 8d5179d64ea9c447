"""Pooled attention maps against pooling the full softmax, and the rules that turn gate scores into blocks."""

import sys

import pytest
import torch
from torch.nn import functional as F

from regard import masks
from regard.ops import pooled_attention_map
from regard.ops.reference import attention_scores, softmax_with_lse
from regard.ops.select import decode_block_map, gate_block_map


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(q, k, mask=masks.causal):
    scores = attention_scores(q, k, mask=mask, q_offset=k.shape[2] - q.shape[2], scale=q.shape[3] ** -0.5)
    return softmax_with_lse(scores)[0]


@pytest.mark.parametrize("size", [(32, 32), (29, 29), (7, 30), (1, 9)])
def test_it_is_the_pooled_softmax(size, monkeypatch):
    q, k = randn(2, 4, size[0], 8), randn(2, 2, size[1], 8, seed=1)
    full = weights(q, k)
    found = {r: pooled_attention_map(q, k, 8, r, block_q=4) for r in ("max", "sum", "mean")}
    wanted = F.max_pool2d(full, (4, 8), ceil_mode=True)
    torch.testing.assert_close(found["max"], wanted)
    torch.testing.assert_close(found["sum"].sum(-1), torch.ones_like(found["sum"][..., 0]))
    torch.testing.assert_close(found["mean"], F.avg_pool2d(full, (4, 8), ceil_mode=True))
    monkeypatch.setattr(sys.modules[pooled_attention_map.__module__], "_AT_ONCE", 1)
    for reduce, map_ in found.items():
        torch.testing.assert_close(pooled_attention_map(q, k, 8, reduce, block_q=4), map_)


def test_options():
    q, k = randn(1, 4, 20, 8), randn(1, 2, 20, 8, seed=1)
    free = pooled_attention_map(q, k, 4, mask=None)
    torch.testing.assert_close(free, F.max_pool2d(weights(q, k, None), 4))
    by_group = pooled_attention_map(q, k, 4, per_kv_head=True)
    torch.testing.assert_close(by_group, F.max_pool2d(weights(q, k), 4).unflatten(1, (2, 2)).amax(2))
    normal = pooled_attention_map(q, k, 4, normalize=True)
    torch.testing.assert_close(normal.sum(-1), torch.ones_like(normal[..., 0]))
    rows = pooled_attention_map(q, k, 4, block_q=1)
    assert rows.shape == (1, 4, 20, 5)
    nothing = pooled_attention_map(q, k, 4, mask=masks.padding(torch.zeros(1, dtype=torch.long)), normalize=True)
    assert not nothing.any()
    assert pooled_attention_map(q[:, :, :0], k, 4).shape == (1, 4, 0, 5)
    with pytest.raises(ValueError, match="reduce: unknown name 'average'"):
        pooled_attention_map(q, k, 4, "average")
    with pytest.raises(ValueError, match="a divisor of q's 4 heads"):
        pooled_attention_map(q, k[:, :1].expand(-1, 3, -1, -1), 4)


def test_gate_rules_limits():
    probs = randn(2, 3, 6, 6).softmax(-1)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for rule in ({"threshold": -1.0}, {"ratio": 1.0}):
        assert torch.equal(gate_block_map(probs, **rule), causal.expand(2, 3, 6, 6))
    none = gate_block_map(probs, threshold=2.0)
    assert not none.any()
    assert torch.equal(gate_block_map(probs, threshold=2.0, diagonal=True)[0, 0], torch.eye(6, dtype=torch.bool))
    last = gate_block_map(probs, threshold=2.0, dense_last=2)
    assert torch.equal(last.sum(-1)[0, 0], torch.tensor([0, 0, 0, 0, 5, 6]))
    late = gate_block_map(probs[:, :, 4:], threshold=2.0, diagonal=True)  # the last two query blocks of six
    assert late.nonzero()[:, 2:].unique(dim=0).tolist() == [[0, 4], [1, 5]]
    with pytest.raises(ValueError, match="exactly one of them"):
        gate_block_map(probs)


def test_decode_rules():
    probs = torch.tensor([0.1, 0.5, 0.3, 0.1]).expand(1, 2, 4)
    assert decode_block_map(probs, threshold=0.2)[0, 0].tolist() == [False, True, True, True]
    assert decode_block_map(probs, topk=1)[0, 0].tolist() == [False, True, False, True]
    assert decode_block_map(probs, topk=9).all()
    hidden = decode_block_map(probs, topk=2, visible=torch.tensor([True, False, True, True]))
    assert hidden[0, 0].tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="exactly one of them"):
        decode_block_map(probs, topk=1, threshold=0.5)
