"""Rules on the scores of one decoded query: limits, counts, rows of different length, errors."""

import pytest
import torch

from regard.ops.select import (
    apply_rule,
    grouped_block_topk,
    grouped_topk,
    importance_shift,
    oracle_sample,
    random_sample,
    random_select,
    recent_only,
    strided_block_topk,
)

SHARED = {"num_kv_heads": 2, "recent": 6, "sink": 3}


def scores(batch=2, heads=4, keys=70, seed=0):
    return torch.randn(batch, heads, keys, generator=torch.Generator().manual_seed(seed))


def test_blocks_of_one_key_are_the_plain_rule():
    x = scores()
    for topk in (0, 1, 9):
        blocks = grouped_block_topk(x, topk, **SHARED, block_size=1)
        assert torch.equal(blocks, grouped_topk(x, topk, **SHARED))
    assert torch.equal(grouped_topk(x, 0, **SHARED), recent_only(x, **SHARED))


@pytest.mark.parametrize("topk", [1, 5, 61])
def test_counts_and_what_is_always_kept(topk):
    x = scores()
    kept = grouped_topk(x, topk, **SHARED)
    assert (kept.sum(-1) == min(70, topk + 9)).all() and kept[..., :3].all() and kept[..., -6:].all()
    mean = x.unflatten(1, (2, 2)).mean(2)
    worst_kept = mean[..., 3:-6].masked_fill(~kept[..., 3:-6], 9.0).amin(-1)
    best_left = mean[..., 3:-6].masked_fill(kept[..., 3:-6], -9.0).amax(-1)
    assert (worst_kept > best_left).all()


def test_strides_of_a_block_choose_whole_blocks():
    """Without overlap, and twice as many blocks chosen as fit: the earlier half of the best 2 k blocks."""
    x = scores(keys=3 + 64 + 6)
    strided = strided_block_topk(x, 2, **SHARED, block_size=8, stride=8)
    twice = grouped_block_topk(x, 4, **SHARED, block_size=8)
    inner = slice(3, -6)
    assert (strided & ~twice).sum() == 0 and (strided[..., inner].sum(-1) == 16).all()
    first = twice[..., inner] & (twice[..., inner].int().cumsum(-1) <= 16)
    assert torch.equal(strided[..., inner], first)


@pytest.mark.parametrize("rule", [grouped_topk, grouped_block_topk, strided_block_topk, random_select])
def test_a_row_of_a_batch_is_the_row_alone_and_short_rows_stay_whole(rule):
    x, lengths = scores(batch=3), torch.tensor([70, 33, 5])
    kept = rule(x, 2, **SHARED, lengths=lengths)
    assert not (kept & (torch.arange(70) >= lengths[:, None, None])).any()
    assert kept[2, :, :5].all()
    if rule is not random_select:
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(kept[row, :, :length], rule(x[row : row + 1, :, :length], 2, **SHARED)[0])
    sure = rule(x, 70, **SHARED, lengths=lengths)
    if rule in (grouped_topk, grouped_block_topk):
        assert torch.equal(sure, (torch.arange(70) < lengths[:, None, None]).expand(3, 2, 70))


def test_no_keys_at_all():
    empty = torch.randn(1, 4, 0)
    for rule in (grouped_topk, grouped_block_topk, strided_block_topk, random_select):
        assert rule(empty, 2, **SHARED).shape == (1, 2, 0)


def test_a_shifted_sample_estimates_the_whole_sum():
    """E[sum of e^score over the draws, shifted] is the sum over all keys: with equal scores exactly, draws without repeats."""
    x = torch.zeros(1, 2, 1009)
    generator = torch.Generator().manual_seed(0)
    bent = random_sample(x, 100, num_kv_heads=1, recent=6, sink=3, generator=generator)
    kept = random_select(x, 100, num_kv_heads=1, recent=6, sink=3, generator=torch.Generator().manual_seed(0))
    drawn = kept[0, 0, 3:-6].sum()
    assert 85 < drawn <= 100  # some are drawn twice and then count once, as released
    assert torch.isclose(bent.exp().sum() / 2, 9 + drawn * 1000 / 100)
    assert torch.equal(importance_shift(10, recent=6, sink=3, lengths=torch.tensor([19])), torch.zeros(1))


def test_oracle_weights_sum_to_one():
    weights = scores().softmax(-1)
    sampled = oracle_sample(weights, 10, recent=6, sink=3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled.sum(-1), torch.ones(2, 4))
    assert ((sampled > 0).sum(-1) == 19).all()
    assert torch.equal(oracle_sample(weights, 61, recent=6, sink=3), weights)


def test_apply_rule_serves_the_group():
    x = scores()
    kept = grouped_topk(x, 4, **SHARED)
    out = apply_rule(x, kept)
    assert torch.equal(out == -torch.inf, ~kept.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, need a divisor of the 4 heads"),
        ({"recent": -1}, "recent: got -1"),
        ({"sink": -2}, "sink: got -2"),
        ({"lengths": torch.tensor([71, 3])}, "lengths: got"),
        ({"lengths": torch.tensor([3])}, "lengths: got '1 rows'"),
        ({"topk": -1}, "topk: got -1"),
        ({"topk": 2.5}, "topk: got float"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {"topk": 2} | SHARED | change
    with pytest.raises((ValueError, TypeError), match=message):
        grouped_topk(scores(), **options)
    with pytest.raises(ValueError, match="scores: got"):
        grouped_topk(torch.randn(3, 4), 2, **SHARED)
