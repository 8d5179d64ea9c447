"""`BlockPlan` beyond "a plan is its mask" (test_masks.py): limits on tiles, shared tiles, the view from the keys, selections."""

import pytest
import torch

from regard import masks
from regard.ops import Selection, make_plan
from regard.ops.plan import FULL, LAZY, kept_plan


def plan_of(mask, selection=None, q_len=50, kv_len=70, heads=4, kv_heads=2, **options):
    return make_plan(
        mask, selection, batch=2, num_heads=heads, num_kv_heads=kv_heads, q_len=q_len, kv_len=kv_len, q_offset=kv_len - q_len,
        **{"block_q": 8, "block_k": 8} | options,
    )  # fmt: skip


RANDOM = torch.rand(50, 70, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("limit", [0, 1, 7])
def test_too_many_tiles_are_left_to_be_asked_for(limit):
    mask = masks.dense(RANDOM) & masks.causal
    whole, limited = plan_of(mask), plan_of(mask, max_tiles=limit)
    assert whole.tiles.shape[0] > 7 and limited.tiles.shape[0] == 0
    assert torch.equal(whole.kv_blocks, limited.kv_blocks)
    assert torch.equal(whole.tiles_of >= 0, limited.tiles_of == LAZY)
    assert torch.equal(whole.tiles_of == FULL, limited.tiles_of == FULL)
    assert torch.equal(plan_of(mask, max_tiles=whole.tiles.shape[0]).tiles, whole.tiles)


def test_tiles_evaluated_in_parts_are_numbered_alike(monkeypatch):
    mask = masks.dense(RANDOM)
    whole = plan_of(mask)
    monkeypatch.setattr("regard.ops.plan._TILE_BUDGET", 3 * 64)
    parts = plan_of(mask)
    for plan in (whole, parts):
        assert len({tuple(tile.flatten().tolist()) for tile in plan.tiles}) == plan.tiles.shape[0]
    mixed = whole.tiles_of >= 0
    assert torch.equal(whole.tiles[whole.tiles_of[mixed]], parts.tiles[parts.tiles_of[mixed]])


def test_relative_masks_are_evaluated_once_a_distance():
    asked = []

    class Counted(type(masks.causal)):
        def keep(self, b, h, q_idx, kv_idx):
            asked.append(torch.broadcast_shapes(q_idx.shape, kv_idx.shape)[0])
            return super().keep(b, h, q_idx, kv_idx)

    plan = plan_of(Counted(), q_len=800, kv_len=803)
    # two distances cross the diagonal, and the ragged ends have their own tiles
    assert sum(asked) <= 6 and plan.tiles.shape[0] <= 6
    assert not (masks.sliding_window(3) & masks.sink(2)).relative and (masks.causal | masks.dilated(3)).relative
    assert (masks.sliding_window(3) & masks.sink(2)).frozen and not (masks.causal & masks.dense(RANDOM)).frozen


def test_seen_from_the_keys():
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(1, 2, 7, 9, generator=generator) < 0.4
    selection = Selection.from_block_map(kept, block_q=8, block_k=8, q_len=50, kv_len=70)
    plan = plan_of(masks.causal, selection)
    forward = set()
    for b, h, i, s in (plan.kv_blocks >= 0).nonzero().tolist():
        forward.add((b, h, i, int(plan.kv_blocks[b, h, i, s]), int(plan.tiles_of[b, h, i, s])))
    q_blocks, tiles_of = plan.transposed()
    backward = set()
    for b, h, j, s in (q_blocks >= 0).nonzero().tolist():
        backward.add((b, h, int(q_blocks[b, h, j, s]), j, int(tiles_of[b, h, j, s])))
    assert forward == backward and forward


@pytest.mark.parametrize("heads, axis", [(1, 1), (2, 2), (4, 4)])
def test_axes_are_as_small_as_they_can_be(heads, axis):
    selection = Selection(torch.zeros(1, heads, 7, 1).long(), block_q=8, block_k=8, q_len=50, kv_len=70)
    assert plan_of(None, selection).kv_blocks.shape[:2] == (1, axis)
    assert plan_of(masks.sink(3), selection).kv_blocks.shape[:2] == (1, axis)
    by_head = masks.per_head([masks.causal, masks.sink(3)] * 2)
    assert plan_of(by_head, selection).kv_blocks.shape[:2] == (1, 4)
    assert plan_of(masks.padding(torch.tensor([5, 70])), selection).kv_blocks.shape[:2] == (2, axis)


def test_documents_are_found_without_asking_everywhere():
    """Bounds by ranges of numbers: blocks of other documents are empty, those within one are full, at any boundary."""
    ids = torch.arange(512) // 100
    mask = masks.document(ids)
    plan = make_plan(
        mask, None, batch=1, num_heads=1, num_kv_heads=1, q_len=512, kv_len=512, q_offset=0, block_q=16, block_k=16
    )
    same = (ids.view(32, 16)[:, None, :, None] == ids.view(32, 16)[None, :, None, :]).flatten(2)
    assert int(plan.counts.sum()) == int(same.any(-1).sum())
    assert int(((plan.kv_blocks >= 0) & (plan.tiles_of == FULL)).sum()) == int(same.all(-1).sum())
    lo, hi = torch.arange(0, 512, 16), torch.arange(15, 512, 16)
    zero = torch.zeros((), dtype=torch.long)
    some, every = mask.bounds(zero, zero, lo[:, None], hi[:, None], lo[None], hi[None])
    assert torch.equal(some, same.any(-1)) and torch.equal(every, same.all(-1))


def test_plans_of_masks_that_cannot_change_are_kept():
    options = {"q_len": 40, "kv_len": 40, "q_offset": 0, "num_kv_heads": 2, "block_q": 8, "block_k": 8}
    mask = masks.sliding_window(7) & masks.causal
    with torch.inference_mode():
        first = kept_plan(mask, None, batch=2, num_heads=4, **options)
    assert not first.kv_blocks.is_inference() and not first.tiles.is_inference()
    assert kept_plan(mask, None, batch=3, num_heads=2, **options) is first  # neither batch nor head matter to it
    assert kept_plan(mask, None, batch=2, num_heads=4, **options | {"q_len": 24}) is not first
    whole = make_plan(mask, None, batch=2, num_heads=4, **options)
    assert torch.equal(first.kv_blocks, whole.kv_blocks) and torch.equal(first.tiles, whole.tiles)
    sharded = masks.head_sharded(4, 8, 1, 2)
    one, other = (kept_plan(sharded, None, batch=1, num_heads=heads, **options) for heads in (4, 2))
    assert one is not other and one is kept_plan(sharded, None, batch=5, num_heads=4, **options)
    changing = masks.dense(RANDOM[:40, :40])
    assert kept_plan(changing, None, batch=1, num_heads=1, **options) is not kept_plan(
        changing, None, batch=1, num_heads=1, **options
    )
    for length in (32, 31, 30, 29, 28):
        kept_plan(mask, None, batch=2, num_heads=4, **options | {"q_len": length})
    assert kept_plan(mask, None, batch=2, num_heads=4, **options) is not first  # a few at a time
