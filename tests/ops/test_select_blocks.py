"""Block summaries, kept up to date, and the selectors over them."""

import sys

import pytest
import torch

from regard.ops import Selection, attention, masks
from regard.ops.select import (
    BlockGrid,
    BlockSummaries,
    block_scores,
    block_summaries,
    block_topk,
    block_topk_attention,
    select_blocks,
    share_scores,
)
from regard.ops.select.block_topk import tree_topk
from regard.ops.select.summaries import SUMMARIES


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_summaries_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, -4.0], [5.0, 1.0]])[None]
    mean = torch.tensor([[2.0, -2.0], [5.0, 1.0]])
    top, low = torch.tensor([[3.0, 0.0], [5.0, 1.0]]), torch.tensor([[1.0, -4.0], [5.0, 1.0]])
    assert torch.equal(block_summaries(x, 2, "mean")[0], mean)
    assert torch.equal(block_summaries(x, 2, "minmax")[0], torch.cat((top, low), 1))
    assert torch.equal(block_summaries(x, 2, "maxminmean")[0], torch.cat((top, low, mean), 1))
    found = block_summaries(x, 2, "centroid")[0]
    direction = torch.tensor([1.6, -0.8])  # (1, 0) + (0.6, -0.8)
    torch.testing.assert_close(found[0], direction / direction.norm() * 3.0)
    torch.testing.assert_close(found[1], x[0, 2])
    assert torch.isfinite(block_summaries(torch.zeros(1, 3, 2), 2, "centroid")).all()


@pytest.mark.parametrize("kind", SUMMARIES)
@pytest.mark.parametrize("steps", [[1] * 23, [5, 0, 8, 1, 30, 2], [64, 1, 1]])
def test_appending_is_the_same_as_beginning_again(kind, steps):
    keys = randn(2, 3, sum(steps), 5)
    running, seen = BlockSummaries(block=4, kind=kind, levels=3, fan=2), 0
    for n in steps:
        running.append(keys[:, :, seen : seen + n])
        seen += n
        at_once = BlockSummaries(keys[:, :, :seen], block=4, kind=kind, levels=3, fan=2)
        assert len(running) == -(-seen // 4)
        for level in range(3):
            torch.testing.assert_close(running.level(level), at_once.level(level))
    torch.testing.assert_close(running.values, block_summaries(keys, 4, kind))


def test_finished_blocks_are_not_touched():
    keys = randn(1, 1, 12, 3)
    running = BlockSummaries(keys[:, :, :10], block=4, kind="max")
    running.values[:, :, :2] = 7.0  # would be written over if a finished block were summarised again
    running.append(keys[:, :, 10:])
    assert bool((running.values[:, :, :2] == 7.0).all())
    torch.testing.assert_close(running.values[:, :, 2], keys[:, :, 8:].amax(2))


def test_crop_update_and_reorder():
    keys = randn(3, 2, 30, 4)
    running = BlockSummaries(keys, block=8, kind="minmax", levels=2, fan=2)
    shorter = keys[:, :, :19]
    again = BlockSummaries(shorter, block=8, kind="minmax", levels=2, fan=2)
    for level in range(2):
        torch.testing.assert_close(running.update(shorter).level(level), again.level(level))
    rows = torch.tensor([2, 0, 0])
    running.reorder(rows)
    running.update(keys[rows])
    torch.testing.assert_close(running.values, block_summaries(keys[rows], 8, "minmax"))
    assert running.update(keys[rows]) is running and len(running) == 4


def test_the_upper_bound_is_one():
    q, k = randn(2, 4, 7, 6), randn(2, 2, 40, 6, seed=1)
    scores = block_scores(q, block_summaries(k, 8, "minmax"), "minmax", block_q=1, share="none")
    best = (q.unflatten(1, (2, 2)) @ k.transpose(-1, -2)[:, :, None]).flatten(1, 2).unflatten(-1, (5, 8)).amax(-1)
    assert bool((scores >= best - 1e-12).all())
    constant = torch.ones(1, 1, 40, 6, dtype=torch.float64).expand(2, 2, -1, -1)
    tight = block_scores(q, block_summaries(constant, 8, "minmax"), "minmax", block_q=1, share="none")
    torch.testing.assert_close(tight, q.sum(-1, keepdim=True).expand(-1, -1, -1, 5))


@pytest.mark.parametrize("kind", ["mean", "minmax", "maxminmean"])
def test_sharing_and_rows(kind):
    q, k = randn(2, 6, 21, 4), randn(2, 2, 30, 4, seed=1)
    summaries = block_summaries(k, 8, kind)
    each = block_scores(q, summaries, kind, block_q=5, share="none")
    assert each.shape == (2, 6, 5, 4)
    for share in ("mean", "max"):
        together = block_scores(q, summaries, kind, block_q=5, share=share)
        torch.testing.assert_close(together, share_scores(each, 2, share))
    rows = block_scores(q, summaries, kind, block_q=1, share="none")
    best = torch.nn.functional.pad(rows, (0, 0, 0, 4), value=-torch.inf).unflatten(2, (5, 5)).amax(3)
    torch.testing.assert_close(block_scores(q, summaries, kind, block_q=5, share="none", rows="max"), best)


GRID = BlockGrid(q_len=20, kv_len=50, block_q=6, block_k=8, q_offset=30)


def test_geometry_by_counting():
    visible, forced = GRID.visible(), GRID.forced(sink=9, recent=5)
    for i in range(GRID.num_q_blocks):
        rows = range(30 + 6 * i, min(30 + 6 * i + 6, 50))
        for j in range(GRID.num_k_blocks):
            keys = range(8 * j, min(8 * j + 8, 50))
            assert visible[i, j] == (keys[0] <= rows[-1])
            near = any(row - 5 < key <= row for row in rows for key in keys)
            assert forced[i, j] == (keys[0] < 9 or near)


@pytest.mark.parametrize("rule", [{"topk": 3}, {"budget": 20}, {"budget": 0.4}, {"ratio": 0.5}, {"threshold": 0.3}])
def test_rules_by_hand(rule):
    scores = randn(2, 3, 4, 7)
    found = select_blocks(scores, GRID, sink=1, recent=1, **rule).block_map()
    visible, forced = GRID.visible(), GRID.forced(1, 1)
    assert not (found & ~visible).any() and bool((found | ~(forced & visible)).all())
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        seen = int(visible[i].sum())
        must = set((forced & visible)[i].nonzero()[:, 0].tolist())
        if "threshold" in rule:
            wanted = must | {j for j in range(seen) if scores[b, h, i, j] > 0.3}
        else:
            count = {"topk": 3, "budget": 3, "ratio": -(-seen // 2)}[next(iter(rule))]
            others = sorted(set(range(seen)) - must, key=lambda j: -scores[b, h, i, j])
            wanted = must | set(others[: max(0, count - len(must))])
        assert set(found[b, h, i].nonzero()[:, 0].tolist()) == wanted


def test_forced_blocks_win_over_a_small_budget():
    grid = BlockGrid(8, 64, 4, 8, 56)
    found = select_blocks(torch.zeros(1, 1, 2, 8), grid, topk=1, sink=9, recent=8)
    assert found.indices[0, 0].tolist() == [[0, 1, 6, 7], [0, 1, 6, 7]]


def test_everything_is_dense_and_nothing_gives_zeros():
    q, k, v = randn(2, 4, 37, 8), randn(2, 2, 37, 8, seed=1), randn(2, 2, 37, 8, seed=2)
    dense = attention(q, k, v, mask=masks.causal)
    for rule in ({"topk": 99}, {"ratio": 1.0}, {"budget": 1.0}, {"threshold": -torch.inf}):
        torch.testing.assert_close(block_topk_attention(q, k, v, block_q=8, block_k=4, **rule), dense)
    free = block_topk_attention(q, k, v, block_q=8, block_k=4, ratio=1.0, causal=False)
    torch.testing.assert_close(free, attention(q, k, v))
    grid = BlockGrid(37, 37, 8, 4, 0)
    none = select_blocks(torch.zeros(1, 1, 5, 10), grid, threshold=1.0, recent=0)
    assert not attention(q, k, v, mask=masks.causal, selection=none).any()


@pytest.mark.parametrize("share", ["mean", "none"])
def test_gradients_through_a_selection(share):
    q, k, v = (randn(1, h, 70, 8, seed=s).requires_grad_() for s, h in ((1, 4), (2, 2), (3, 2)))
    selection = block_topk(q, k, block_q=16, block_k=8, topk=3, share=share)
    given = {"mask": masks.causal, "selection": selection, "return_lse": True}

    def grads(backend):
        out, lse = attention(q, k, v, backend=backend, **given)
        return torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))

    for found, wanted in zip(grads("cpu"), grads("eager")):
        torch.testing.assert_close(found, wanted)


def test_many_query_blocks_are_done_in_parts(monkeypatch):
    q, k = randn(1, 4, 50, 8), randn(1, 2, 50, 8, seed=1)
    at_once = block_topk(q, k, block_q=4, block_k=8, ratio=0.5, rows="max")
    monkeypatch.setattr(sys.modules[tree_topk.__module__], "_SCORES_AT_ONCE", 4 * 7 * 3)
    assert torch.equal(block_topk(q, k, block_q=4, block_k=8, ratio=0.5, rows="max").indices, at_once.indices)


@pytest.mark.parametrize("kind", ["mean", "minmax"])
def test_tree_search_with_a_wide_beam_is_the_flat_search(kind):
    q, k = randn(2, 4, 12, 6), randn(2, 2, 100, 6, seed=1)
    summaries = BlockSummaries(k, block=4, kind=kind, levels=3, fan=3)
    for options in ({"topk": 6, "sink": 5, "recent": 9}, {"topk": 1, "recent": 0}):
        flat = block_topk(q, k, block_q=4, block_k=4, summary=kind, **options)
        assert torch.equal(tree_topk(q, summaries, block_q=4, beam=99, **options).indices, flat.indices)
    narrow = tree_topk(q, summaries, 6, block_q=4, sink=5, recent=9, beam=1)
    forced = BlockGrid(12, 100, 4, 4, 88)
    must = forced.forced(5, 9) & forced.visible()
    assert bool((narrow.block_map() | ~must).all()) and int(narrow.counts.max()) <= 6


def test_tree_search_finds_a_lone_peak():
    k = torch.zeros(1, 1, 512, 4)
    k[0, 0, 301] = 5.0
    q = torch.ones(1, 1, 1, 4)
    summaries = BlockSummaries(k, block=4, kind="minmax", levels=4, fan=4)
    assert 301 // 4 in tree_topk(q, summaries, 2, beam=1).indices.flatten().tolist()


def test_half_types_and_lengths_of_zero_and_one():
    q, k = randn(1, 2, 9, 4, dtype=torch.bfloat16), randn(1, 1, 9, 4, dtype=torch.bfloat16)
    assert block_summaries(k, 4, "centroid").dtype == torch.float32
    assert isinstance(block_topk(q, k, block_q=4, block_k=4, topk=1), Selection)
    assert block_topk(q[:, :, :1], k[:, :, :1], topk=1).indices.tolist() == [[[[0]]]]
    none = block_topk(q[:, :, :0], k[:, :, :0], topk=1)
    assert none.indices.shape[2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "topk, budget, ratio, threshold: got 'none of them'"),
        ({"topk": 1, "ratio": 0.5}, "need exactly one of them"),
        ({"ratio": 0.0}, "ratio: got 0.0"),
        ({"budget": 0}, "budget: got 0"),
        ({"topk": 1, "sink": -1}, "sink: got -1"),
        ({"topk": 1, "summary": "medium"}, "kind: unknown name 'medium'"),
        ({"topk": 1, "share": "some"}, "share: unknown name"),
        ({"topk": 1, "summaries": torch.zeros(1, 2, 4, 8)}, "summaries: got 'shape"),
    ],
)
def test_bad_input(change, message):
    q, k = torch.zeros(1, 4, 16, 8), torch.zeros(1, 2, 16, 8)
    with pytest.raises((ValueError, TypeError), match=message):
        block_topk(q, k, block_q=8, block_k=8, **change)


def test_bad_summaries():
    with pytest.raises(ValueError, match="some keys appended first"):
        BlockSummaries().values  # noqa: B018
    running = BlockSummaries(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="keys: got"):
        running.append(torch.zeros(1, 3, 1, 4))
    with pytest.raises(ValueError, match=r"a level in \[0, 1\)"):
        running.level(1)
