"""Placement, planner, baselines and plans: every row once, work kept, balance, odd lengths; run in one process = dense, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.ops import attention, masks
from regard.scale import (
    AttentionTask,
    Plan,
    balance,
    pack_by_workload,
    place_documents,
    place_whole,
    plan_tasks,
    run_plan,
    water_filling,
)
from regard.scale.baselines import pieces_of, total_pairs
from regard.scale.tasks import tasks_of

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def covered(pieces, doc_lens):
    """Every row of every document exactly once."""
    at = dict.fromkeys(range(len(doc_lens)), 0)
    for task in tasks_of(pieces):
        assert task.q_start == at[task.doc]
        at[task.doc] = task.kv_len
    return list(at.values()) == list(doc_lens)


documents = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(documents, st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.6]))
def test_a_plan_covers_every_row_once_and_keeps_the_work(doc_lens, ranks, tolerance):
    plan = plan_tasks(doc_lens, ranks, tolerance=tolerance, **SIZES)
    plan.check()
    assert sum(plan.loads) == total_pairs(doc_lens)
    assert sorted(torch.cat(plan.tokens).tolist()) == list(range(sum(doc_lens)))
    before = Plan.of(*(2 * [place_documents(doc_lens, ranks, -(-sum(doc_lens) // ranks))]), ranks, **SIZES)
    assert max(plan.loads) <= max(before.loads)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(8, 300).map(lambda n: 2 * n), min_size=4, max_size=10), st.sampled_from([0.0, 0.1, 0.3]))
def test_whole_even_documents_are_balanced_to_the_tolerance(doc_lens, tolerance):
    """Released: no rank lacks more than the tolerance. Paper: nor has more. Both up to one pair of rows of the longest document a cut."""
    ranks = 4
    placed = place_whole([doc_lens[rank::ranks] for rank in range(ranks)])
    for variant in ("released", "paper"):
        planned = balance(placed, ranks, tolerance=tolerance, variant=variant, **SIZES)
        assert covered(planned, [n for rank in range(ranks) for n in doc_lens[rank::ranks]])
        load = [sum(p.pairs for p in planned if p.server == rank) for rank in range(ranks)]
        mean, slack = sum(load) / ranks, (max(doc_lens) + 1) * ranks
        assert min(load) >= (1 - tolerance) * mean - slack
        most = tolerance * (ranks - 1) if variant == "released" else tolerance
        assert max(load) <= (1 + most) * mean + slack


def test_the_zig_zag_cut_of_the_release():
    pieces = place_documents([32, 8, 8, 4, 4, 4, 4], 4, 16)
    assert [(p.doc, p.home, p.spans, p.original) for p in pieces[:3]] == [
        (0, 0, ((8, 8), (8, 32)), True),
        (0, 1, ((8, 16), (8, 24)), False),
        (1, 2, ((8, 8),), True),
    ]
    assert pieces[0].pairs == pieces[1].pairs


def test_moving_parts_of_a_piece():
    (piece,) = place_documents([100], 1, 100)
    cut, moved = piece.move(1000.0, 3)
    assert moved == 9 * 101 == cut.pairs and cut.spans == ((9, 50), (9, 59)) and piece.spans == ((41, 41), (41, 100))
    assert cut.server == 3 and cut.home == 0 and not cut.original
    assert piece.move(100.0, 2) == (None, 0)
    assert piece.move(1e9, 2) == (None, 41 * 101) and piece.server == 2


def test_odd_lengths_are_cut_exactly():
    (piece,) = place_documents([101], 1, 101)
    whole = piece.pairs
    cut, moved = piece.move(2000.0, 1)
    assert cut.pairs == moved and piece.pairs + moved == whole and covered([piece, cut], [101])


def test_water_filling_covers_and_levels():
    batches = [[4000], [1000, 1200], [2000], [300]]
    pieces = water_filling(batches)
    assert covered(pieces, [4000, 1000, 1200, 2000, 300])
    load = [sum(p.pairs for p in pieces if p.server == rank) for rank in range(4)]
    assert max(load) < 1.01 * min(load)
    for same in ([[1000]], [[10], [10]], [[3], []], [[2], [2], [2]]):
        flat = [n for batch in same for n in batch]
        assert covered(water_filling(same), flat)


def test_packing_by_workload():
    lengths = [512, 500, 300, 100, 100, 90, 2000]
    placed = pack_by_workload(lengths, 3, 2000, breakpoint=256)
    assert sorted(doc for docs in placed for doc in docs) == list(range(7))
    assert covered(pieces_of(placed, lengths), lengths)
    work = [sum((lengths[d] / 256) ** 2 + lengths[d] / 256 for d in docs) for docs in placed]
    assert max(work) == pytest.approx((2000 / 256) ** 2 + 2000 / 256)  # nothing joins the longest


def dense(doc_lens, q, k, v):
    parts, start = [], 0
    for length in doc_lens:
        rows = slice(start, start + length)
        parts.append(attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], mask=masks.causal, backend="eager"))
        start += length
    return torch.cat(parts, dim=2)


def tensors(total, batch=1, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = torch.randn(batch, 4, total, 8), torch.randn(batch, 2, total, 8), torch.randn(batch, 2, total, 8)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize(("doc_lens", "ranks"), [([64, 7, 30, 1, 12], 3), ([50], 4), ([5, 6, 7], 1)])
def test_tasks_together_are_dense_attention_forward_and_backward(doc_lens, ranks):
    plan = plan_tasks(doc_lens, ranks, tolerance=0.0, **SIZES)
    q, k, v = tensors(sum(doc_lens), batch=2)
    out, wanted = run_plan(plan, q, k, v), dense(doc_lens, q, k, v)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-12)
    grad = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_traffic_is_what_does_not_stay():
    alone = plan_tasks([40, 40], 2, 40, **SIZES)
    assert int(alone.traffic.sum()) == 0 and alone.imbalance == 1.0
    homes = ((0, 0, 10, 0), (1, 0, 4, 1))
    tasks = (AttentionTask(0, 0, 6, 0, 1), AttentionTask(0, 6, 4, 0, 0), AttentionTask(1, 0, 4, 1, 1))
    plan = Plan((10, 4), 2, tasks, homes, **SIZES)
    plan.check()
    assert plan.traffic.tolist() == [[0, 6 * 32 + 6 * 2 * 16], [6 * 32, 0]]
    assert plan.loads == (9 + 10 + 8 + 7, 21 + 10)
    report = plan.report()
    assert "14 tokens, 3 tasks" in report.title and report.row_count == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: place_documents([5, 5], 2, 4), "ranks . token_budget: got 8, need at least the 10 tokens"),
        (lambda: place_documents([], 2, 4), "doc_lens: got"),
        (lambda: place_documents([3, 0], 2, 4), "doc_lens: got 0"),
        (lambda: place_whole([[], []]), "batches: got"),
        (lambda: plan_tasks([4], 0), "ranks: got 0"),
        (lambda: plan_tasks([4], 1, tolerance=-1.0), "tolerance: got -1.0"),
        (lambda: plan_tasks([4], 1, head_dim=0), "head_dim: got 0"),
        (lambda: plan_tasks([4], 1, variant="both"), "variant: unknown name 'both'"),
        (lambda: balance(place_whole([[4], [4]]), 1), "pieces: got 'server 1'"),
        (lambda: pack_by_workload([4], 2, 0), "token_limit: got 0"),
        (lambda: Plan((4,), 1, (), ((0, 0, 4, 0),)).check(), "tasks: got '0 rows of document 0'"),
        (lambda: Plan((4,), 1, (AttentionTask(0, 0, 4, 0, 1),), ((0, 0, 4, 0),)).check(), "tasks: got"),
        (lambda: Plan((4,), 2, (AttentionTask(0, 0, 4, 1, 1),), ((0, 0, 4, 0),)).check(), "rows that rank 1 holds"),
        (lambda: run_plan(plan_tasks([4], 1), *tensors(5)), "q: got '5 tokens', need the plan's 4"),
        (lambda: run_plan(plan_tasks([4], 1), *tensors(4), group=True), "group: got 'no process group'"),
        (lambda: run_plan(plan_tasks([4], 1), *tensors(4), group=True, servers=1), "group, servers: got 'both'"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
