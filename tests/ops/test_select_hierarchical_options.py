"""HiP's search with fewer channels, lower resolution, random representatives, two sifters."""

import pytest
import torch

from regard.ops import attention, masks
from regard.ops.select import hierarchical_topk, hierarchical_topk_attention

SIZES = {"budget": 16, "block_q": 8, "block_k": 2, "window": 4}


def tensors(length=120, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, length, 8, generator=generator), torch.randn(1, 1, length, 8, generator=generator)


def sets(found):
    return [[set(row.tolist()) - {-1} for row in head] for head in found.indices[0]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_options_at_their_limits_change_nothing():
    q, k = tensors()
    plain = hierarchical_topk(q, k, **SIZES)
    for options in ({"query_dims": 8}, {"query_dims": 99}, {"resolution": 1}, {"sifters": 1}):
        assert torch.equal(hierarchical_topk(q, k, **SIZES, **options).indices, plain.indices)


def test_channels_that_count():
    """Two channels carry all of q: two are enough, whatever the keys hold elsewhere; with one, another choice comes out."""
    q, k = tensors()
    q[..., 2:] = 0.0
    q[..., 0] *= 2.0
    plain = hierarchical_topk(q, k, **SIZES)
    assert torch.equal(hierarchical_topk(q, k, **SIZES, query_dims=2).indices, plain.indices)
    assert not torch.equal(hierarchical_topk(q, k, **SIZES, query_dims=1).indices, plain.indices)


def test_lower_resolution_takes_neighbours():
    q, k = tensors()
    coarse = hierarchical_topk(q, k, **SIZES | {"budget": 8})
    found = hierarchical_topk(q, k, **SIZES, resolution=2)
    for head, coarse_head in zip(sets(found), sets(coarse)):
        for i, (row, few) in enumerate(zip(head, coarse_head)):
            searched = max(0, (i + 1) * 8 - 4)
            last = -(-searched // 2)
            if searched <= 16:
                assert row == set(range(last))
            else:
                assert row == {j + n for j in few for n in (0, 1) if j + n < last} and len(row) <= 8


def test_random_representatives_follow_their_generator():
    q, k = tensors(length=400)
    first = hierarchical_topk(q, k, **SIZES, representative="random", generator=seeded())
    again = hierarchical_topk(q, k, **SIZES, representative="random", generator=seeded())
    other = hierarchical_topk(q, k, **SIZES, representative="random", generator=seeded(1))
    assert torch.equal(first.indices, again.indices) and not torch.equal(first.indices, other.indices)
    assert (first.counts <= 8).all() and (first.counts[..., 4:] == 8).all()
    for i in range(50):
        assert int(first.indices[:, :, i].max()) < max(1, -(-max(0, (i + 1) * 8 - 4) // 2))


def test_the_second_sifter_keeps_what_the_first_dropped_in_its_first_step():
    q, k = tensors(length=400)
    first = hierarchical_topk(q, k, **SIZES | {"budget": 8})
    both = hierarchical_topk(q, k, **SIZES, sifters=2)
    for head, few in zip(sets(both), sets(first)):
        for row, half in zip(head[2:], few[2:]):
            assert half <= row and len(row) <= 8
    assert (both.counts[..., 4:] > 4).all()


@pytest.mark.parametrize(
    "options",
    [
        {"query_dims": 3},
        {"resolution": 3},
        {"sifters": 2},
        {"representative": "random"},
        {"resolution": 2, "sifters": 2},
    ],
)
def test_a_budget_of_the_whole_context_is_dense(options):
    q, k = tensors()
    v = torch.randn(1, 1, 120, 8)
    wanted = attention(q, k, v, mask=masks.causal)
    sifters = options.get("sifters", 1)
    for group in (1, 4):
        out = hierarchical_topk_attention(q, k, v, 120 * sifters, 8, 2, 8, group=group, **options)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_dims": 0}, "query_dims: got 0"),
        ({"resolution": 0}, "resolution: got 0"),
        ({"sifters": 3}, "sifters: got 3, need 1 or 2"),
        ({"sifters": 2, "variant": "paper"}, "sifters: got 2, need 1 with variant='paper'"),
        ({"representative": "random", "variant": "paper"}, "representative: got 'random'"),
        ({"representative": "last"}, "representative: unknown name 'last'"),
    ],
)
def test_bad_options_are_named(change, message):
    q, k = tensors(40)
    with pytest.raises((ValueError, TypeError), match=message):
        hierarchical_topk(q, k, **SIZES, **change)
