"""Masks, score mods, selections and plans: what they say, and that block bounds never say too much."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import MASKS, a_mask

from regard import masks, scores
from regard.ops import Selection, make_plan
from regard.ops.mask_base import Mask

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def rebuilt(plan, batch, num_heads):
    """The dense mask that a plan stands for."""
    shape = (batch, num_heads, plan.num_q_blocks * plan.block_q, plan.num_k_blocks * plan.block_k)
    out = torch.zeros(shape, dtype=torch.bool)
    blocks = plan.kv_blocks.expand(batch, num_heads, -1, -1)
    numbers = plan.tiles_of.expand_as(blocks)
    for b, h, i, s in (blocks >= 0).nonzero().tolist():
        j, tile = int(blocks[b, h, i, s]), int(numbers[b, h, i, s])
        rows, columns = slice(i * plan.block_q, (i + 1) * plan.block_q), slice(j * plan.block_k, (j + 1) * plan.block_k)
        assert not out[b, h, rows, columns].any(), "a block twice"
        out[b, h, rows, columns] = True if tile < 0 else plan.tiles[tile]
    return out[:, :, : plan.q_len, : plan.kv_len]


@QUICK
@given(
    st.sampled_from([m for m in MASKS if m != "none"]),
    st.sampled_from([(1, 1), (8, 8), (16, 4), (5, 7)]),
    st.sampled_from([1, 13, 37]),
    st.sampled_from([1, 29, 50]),
)
def test_a_plan_is_its_mask(kind, blocks, q_len, kv_len):
    mask = masks.as_mask(a_mask(kind, 2, 4, q_len, kv_len))
    plan = make_plan(mask, None, batch=2, num_heads=4, num_kv_heads=2, q_len=q_len, kv_len=kv_len, q_offset=kv_len - q_len,
                     block_q=blocks[0], block_k=blocks[1])  # fmt: skip
    assert torch.equal(rebuilt(plan, 2, 4), mask.materialize(q_len, kv_len, batch=2, num_heads=4).expand(2, 4, -1, -1))
    back, numbers = plan.transposed()
    assert (back >= 0).sum() == (plan.kv_blocks >= 0).sum() and numbers.shape == back.shape


@QUICK
@given(st.sampled_from([m for m in MASKS if m not in ("none", "function")]), st.integers(0, 10**6))
def test_bounds_never_say_too_much(kind, seed):
    mask: Mask = masks.as_mask(a_mask(kind, 2, 4, 60, 60))
    generator = torch.Generator().manual_seed(seed)
    lows = torch.randint(0, 50, (2,), generator=generator)
    highs = lows + torch.randint(0, 10, (2,), generator=generator)
    b, h = torch.arange(2).view(2, 1), torch.arange(4).view(1, 4)
    some, every = (
        x.expand(2, 4) for x in mask.bounds(b, h, lows[:1, None], highs[:1, None], lows[1:, None], highs[1:, None])
    )
    full = mask.materialize(60, 60, batch=2, num_heads=4).expand(2, 4, 60, 60)
    part = full[:, :, lows[0] : highs[0] + 1, lows[1] : highs[1] + 1].flatten(2)
    assert not (part.any(-1) & ~some).any(), "says nothing is there, but something is"
    assert not (~part.all(-1) & every).any(), "says all is there, but something is missing"


def rows(mask, n=6):
    return ["".join(".x"[int(x)] for x in row) for row in mask.materialize(n, n)[0, 0]]


def test_what_masks_say():
    assert rows(masks.causal, 3) == ["x..", "xx.", "xxx"]
    assert rows(masks.sliding_window(2) & masks.causal, 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(masks.sliding_window(2), 3) == ["xx.", "xxx", ".xx"]
    assert rows((masks.sink(1) | masks.sliding_window(1)) & masks.causal, 3) == ["x..", "xx.", "x.x"]
    assert rows(masks.dilated(2) & masks.causal, 4) == ["x...", ".x..", "x.x.", ".x.x"]
    assert rows(masks.block(2), 4) == ["xx..", "xx..", "..xx", "..xx"]
    assert rows(masks.prefix(2) | masks.causal, 3) == ["xx.", "xx.", "xxx"]
    assert rows(masks.document(torch.tensor([0, 0, 1])) & masks.causal, 3) == ["x..", "xx.", "..x"]
    assert rows(~masks.causal, 3) == [".xx", "..x", "..."]


def test_queries_are_the_last_positions():
    assert masks.causal.materialize(2, 4)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert masks.causal.materialize(2, 4, q_offset=0)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_masks_share_tiles():
    plan = make_plan(masks.causal, None, batch=1, num_heads=1, num_kv_heads=1, q_len=4096, kv_len=4096, q_offset=0)
    assert plan.tiles.shape[0] == 1 and plan.density() == pytest.approx(65 / 128)


def test_selection_is_put_in_order():
    indices = torch.tensor([[[[3, 1, 3, -1], [0, -1, -1, 0]]]])
    selection = Selection(indices, block_q=4, block_k=2, q_len=7, kv_len=8)
    assert selection.indices.tolist() == [[[[1, 3], [0, -1]]]]
    assert selection.counts.tolist() == [[[2, 1]]] and selection.density() == 3 / 8
    again = Selection.from_block_map(selection.block_map(), block_q=4, block_k=2, q_len=7, kv_len=8)
    assert torch.equal(again.indices, selection.indices)
    other = Selection(torch.tensor([[[[0], [1]]]]), block_q=4, block_k=2, q_len=7, kv_len=8)
    assert torch.equal((selection | other).materialize(), selection.materialize() | other.materialize())
    assert selection.materialize()[0, 0].int().tolist()[0] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: masks.sliding_window(-1), "window: got -1"),
        (lambda: masks.sliding_window(2.5), "window: got float"),
        (lambda: masks.sink(-2), "sink: got -2"),
        (lambda: masks.dilated(0), "dilation: got 0"),
        (lambda: masks.block(0), "size: got 0"),
        (lambda: masks.padding(), "lengths: got None"),
        (lambda: masks.padding(torch.tensor([-1])), "lengths: got"),
        (lambda: masks.padding(torch.tensor([1.5])), "lengths: got torch.float32"),
        (lambda: masks.document(torch.rand(3)), "ids: got torch.float32"),
        (lambda: masks.dense(torch.ones(3, 3)), "mask: got torch.float32"),
        (lambda: masks.per_head([]), "masks: got []"),
        (lambda: masks.head_sharded(4, dense_heads=5), "dense_heads: got 5"),
        (lambda: masks.causal & 3, "mask: got int"),
        (lambda: scores.soft_cap(0), "cap: got 0"),
        (lambda: scores.temperature(-1.0), "value: got -1.0"),
        (lambda: scores.relative_bias(torch.zeros(2, 4)), "table: got 'shape (2, 4)'"),
        (lambda: Selection(torch.tensor([[[[9]]]]), block_q=4, block_k=4, q_len=4, kv_len=8), "indices: got 9"),
        (
            lambda: Selection(torch.tensor([[[[0]]]]), block_q=4, block_k=4, q_len=9, kv_len=8),
            "indices: got '1 query blocks'",
        ),
        (
            lambda: Selection(torch.tensor([[[[0.5]]]]), block_q=4, block_k=4, q_len=4, kv_len=8),
            "indices: got torch.float32",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert message in str(caught.value)


def test_alibi_slopes():
    assert scores.alibi_slopes(4).tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    six = scores.alibi_slopes(6).tolist()
    assert six[:4] == scores.alibi_slopes(4).tolist() and six[4:] == [2**-1, 2**-3]
