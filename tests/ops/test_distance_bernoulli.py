"""PrFlashAttention's pattern as a mask and as a selection; the harmonic bias."""

import pytest
import torch
from test_masks import rebuilt

from regard import masks, scores
from regard.ops import attention, make_plan
from regard.ops.mask_bernoulli import distance_probability, gamma_for, hashed_uniform
from regard.ops.select import distance_bernoulli


def causal_blocks(n):
    return torch.ones(n, n).tril().bool()


def block_map(n, **options):
    mask = masks.distance_bernoulli(1, **{"sink": 0} | options)
    return mask.materialize(n, n, batch=3, num_heads=4) & causal_blocks(n)


def test_limits():
    assert torch.equal(block_map(9, gamma=0).expand(1, 4, 9, 9), causal_blocks(9).expand(1, 4, 9, 9))
    assert torch.equal(block_map(9, gamma=1e9)[0, 2], torch.eye(9).bool())
    with_sink = block_map(9, gamma=1e9, sink=2)[0, 1]
    assert torch.equal(with_sink, torch.eye(9).bool() | (torch.arange(9) < 2) & causal_blocks(9))


def test_density_is_the_probability():
    n, gamma = 12, 1.0
    found = torch.stack([block_map(n, gamma=gamma, seed=seed).float() for seed in range(400)]).mean((0, 1, 2))
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    expected = distance_probability(distance, gamma) * causal_blocks(n)
    assert (found - expected).abs().max() < 0.05
    assert abs(float(found.sum() - expected.sum())) / float(expected.sum()) < 0.01
    assert abs(float(found.diagonal(-1).mean()) - 0.5) < 0.02


def test_draws_belong_to_seed_head_and_block_alone():
    one = block_map(20, seed=5)
    assert torch.equal(one, block_map(20, seed=5)) and not torch.equal(one, block_map(20, seed=6))
    assert torch.equal(one[..., :11, :11], block_map(11, seed=5))  # longer sequences do not change what is behind
    assert not torch.equal(one[0, 0], one[0, 1]) and one.shape[0] == 1
    grouped = block_map(20, seed=5, group=2)[0]
    assert torch.equal(grouped[0], grouped[1]) and not torch.equal(grouped[1], grouped[2])
    apart = block_map(20, seed=5, per_batch=True)
    assert apart.shape[0] == 3 and not torch.equal(apart[0], apart[1])


def test_the_hash_is_uniform_and_always_the_same():
    numbers = torch.arange(1000)
    drawn = hashed_uniform(3, numbers[:, None], numbers[None, :100])
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(float(drawn.mean()) - 0.5) < 0.005
    counts = torch.histc(drawn, 20, 0, 1) / drawn.numel()
    assert (counts - 0.05).abs().max() < 0.003
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1])) < 0.01
    torch.testing.assert_close(hashed_uniform(0, torch.tensor([0, 1])), torch.tensor([0.5665615, 0.8833108]))


@pytest.mark.parametrize("blocks", [(4, 4), (8, 8), (5, 7)])
def test_a_plan_is_its_mask(blocks):
    mask = masks.distance_bernoulli(8, gamma=0.8, per_batch=True) & masks.causal
    plan = make_plan(mask, None, batch=2, num_heads=4, num_kv_heads=2, q_len=30, kv_len=41, q_offset=11,
                     block_q=blocks[0], block_k=blocks[1])  # fmt: skip
    assert torch.equal(rebuilt(plan, 2, 4), mask.materialize(30, 41, batch=2, num_heads=4))


def test_mask_and_selection_are_the_same_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 48, 8, generator=generator) for _ in range(3))
    mask = masks.distance_bernoulli(8, seed=7) & masks.causal
    selection = distance_bernoulli(48, 48, block_size=8, seed=7, num_heads=4)
    by_mask = attention(q, k, v, mask=mask)
    torch.testing.assert_close(by_mask, attention(q, k, v, selection=selection, mask=masks.causal))
    last = attention(q[:, :, -1:], k, v, mask=mask)  # as decoding sees it
    torch.testing.assert_close(last, by_mask[:, :, -1:])
    everything = distance_bernoulli(48, 48, block_size=8, gamma=0)
    torch.testing.assert_close(
        attention(q, k, v, selection=everything, mask=masks.causal), attention(q, k, v, mask=masks.causal)
    )


def test_selections_of_other_shapes():
    kept = distance_bernoulli(20, 50, block_size=8, gamma=1e9, sink=0).block_map()[0, 0]
    # positions 30..49 in blocks of 8 rows: 30-37, 38-45, 46-49
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[3, 4], [4, 5], [5, 6]]
    drawn = [
        distance_bernoulli(64, 64, block_size=4, generator=torch.Generator().manual_seed(s)).block_map()
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert distance_bernoulli(64, 64, block_size=4, num_heads=3, batch=2).indices.shape[:2] == (2, 3)
    assert distance_bernoulli(0, 5).indices.shape[2] == 0


def test_gamma_for_a_number_of_blocks():
    for kept, n in ((2.0, 50), (7.5, 64), (30, 30)):
        gamma = gamma_for(kept, n)
        assert float(distance_probability(torch.arange(n), gamma).sum()) == pytest.approx(kept, rel=1e-3)
    with pytest.raises(ValueError, match="kept: got 70, need a number > 1 and <= 64"):
        gamma_for(70, 64)


def test_the_harmonic_bias():
    zero, one = torch.zeros(1, 2, 6, 6), torch.tensor([1.0, 0.5])
    index = torch.arange(6)
    places = (torch.arange(2).view(1, 2, 1, 1), index.view(1, 1, 6, 1), index.view(1, 1, 1, 6))
    bent = scores.harmonic_alibi(one)(zero, torch.zeros(1, 1, 1, 1).long(), *places)
    harmonic = torch.tensor([0.0, 1.0, 1.5, 1.5 + 1 / 3, 1.5 + 1 / 3 + 0.25, 1.5 + 1 / 3 + 0.45])
    torch.testing.assert_close(-bent[0, 0, 5].flip(0), harmonic)
    torch.testing.assert_close(bent[0, 1] * 2, bent[0, 0])
    for offset in range(6):  # it depends on the distance alone
        assert bent[0, 0].diagonal(offset).std(correction=0) == 0
    q, k, v = torch.randn(3, 1, 4, 9, 8)
    plain = attention(q, k, v, mask=masks.causal)
    torch.testing.assert_close(
        attention(q, k, v, mask=masks.causal, score_mod=scores.harmonic_alibi(torch.zeros(4))), plain
    )
    assert scores.harmonic_alibi(8).name == "harmonic_alibi(8 heads)"
    assert not torch.allclose(attention(q, k, v, mask=masks.causal, score_mod=scores.harmonic_alibi(4)), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"sink": -1}, "sink: got -1"),
        ({"group": 0}, "group: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        masks.distance_bernoulli(**options)
