"""Where chunks end: even cuts, non-maximum suppression, attention mass; a selection as a mask."""

import pytest
import torch

from regard import masks
from regard.lens import attention_boundaries
from regard.ops import Selection
from regard.ops.select import attention_mass_ratio, even_boundaries, in_selection, pick_boundaries


def test_even_cuts():
    assert even_boundaries(10, 4).tolist() == [0, 4, 8, 10]
    assert even_boundaries(8, 4).tolist() == [0, 4, 8]
    assert even_boundaries(3, 9).tolist() == [0, 3]
    assert even_boundaries(0, 4).tolist() == [0, 0]


def test_the_best_gaps_are_taken_and_kept_apart():
    scores = torch.zeros(1, 30)
    scores[0, [4, 6, 12, 20]] = torch.tensor([3.0, 5.0, 2.0, 4.0])
    assert pick_boundaries(scores, 4, theta=1.0, nms=0).tolist() == [[0, 5, 7, 13, 21, 30]]
    assert pick_boundaries(scores, 4, theta=1.0, nms=2).tolist() == [[0, 7, 13, 21, 30]]  # 4 is two from 6
    assert pick_boundaries(scores, 4, theta=1.0, nms=6).tolist() == [[0, 7, 21, 30]]
    assert pick_boundaries(scores, 2, theta=1.0, nms=0).tolist() == [[0, 7, 21, 30]]
    assert pick_boundaries(scores, 4, theta=9.0).tolist() == [[0, 30]]
    # the gap before the instruction comes first, nothing behind it is taken
    assert pick_boundaries(scores, 3, theta=1.0, nms=0, instruction=14).tolist() == [[0, 5, 7, 17, 30]]
    assert pick_boundaries(scores, 3, theta=9.0, instruction=14).tolist() == [[0, 17, 30]]


def test_rows_with_fewer_cuts_repeat_the_length():
    scores = torch.zeros(2, 12)
    scores[0, [2, 8]] = 2.0
    scores[1, 5] = 2.0
    assert pick_boundaries(scores, 5, theta=1.0, nms=1).tolist() == [[0, 3, 9, 12], [0, 6, 12, 12]]
    assert pick_boundaries(torch.zeros(0, 5), 3).shape[0] == 0


def test_attention_that_changes_its_mind_marks_the_gap():
    """Later rows read tokens 20 .. 39 only: the ends of that stretch stand out, everywhere else both sides are alike."""
    length = 80
    wish = torch.full((length, length), 0.01)
    wish[:, 20:40] = 1.0
    weights = wish.tril() / wish.tril().sum(-1, keepdim=True)
    cuts, ratio = attention_boundaries(weights.expand(1, 3, -1, -1), 2, window=4, nms=8)
    assert cuts.tolist() == [[0, 20, 40, 80]]
    assert ratio[0, 19] > 50 and ratio[0, 39] > 50
    assert torch.allclose(ratio[0, 50:70], torch.ones(20, dtype=torch.float64))
    assert (ratio[0, :7] == 0).all() and (ratio[0, -8:] == 0).all()


def test_mass_ratio_by_its_definition():
    weights = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0)).tril()
    for sliding in (None, 6):
        ratio = attention_mass_ratio(weights, 3, sliding=sliding)
        for b, i in ((0, 5), (0, 20), (1, 33)):
            rows = slice(i + 3, None if sliding is None else i + 3 + sliding)
            past, future = weights[b, rows, i - 2 : i + 1].sum(), weights[b, rows, i + 1 : i + 4].sum()
            wanted = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
            assert ratio[b, i].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (attention_mass_ratio(weights[:, :10, :10], 4) == 0).all()  # nothing but margins


def test_a_selection_as_a_mask():
    indices = torch.tensor([[[[0, 2], [1, -1], [0, 1]]], [[[3, -1], [2, 3], [-1, -1]]]])
    found = Selection(indices, block_q=3, block_k=4, q_len=8, kv_len=15)
    mask = in_selection(found, num_heads=4, num_kv_heads=2)
    assert torch.equal(mask.materialize(8, 15, batch=2, num_heads=4), found.materialize())
    shifted = in_selection(found, num_heads=4, num_kv_heads=2, q_offset=2)
    assert torch.equal(shifted.materialize(8, 15, batch=2, num_heads=4, q_offset=2), found.materialize())
    assert not shifted.materialize(2, 15, batch=2, q_offset=0).any()  # before the first row
    # bounds: exact within a block, never wrong beyond
    whole = found.materialize()
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    for low, high, first, last in ((0, 2, 0, 3), (3, 5, 4, 7), (0, 7, 0, 14), (6, 7, 12, 14), (2, 3, 3, 4)):
        for b in range(2):
            some, every = mask.bounds(zero + b, zero, zero + low + 7, zero + high + 7, zero + first, zero + last)
            part = whole[b, 0, low : high + 1, first : last + 1]
            assert bool(some) or not part.any()
            assert not bool(every) or part.all()
            if low // 3 == high // 3 and first // 4 == last // 4:
                assert bool(some) == bool(part.any()) and bool(every) == bool(part.all())
    union = in_selection(found, num_heads=1) | masks.sliding_window(2)
    keep = whole[:, 0] | ((torch.arange(8)[:, None] + 7 - torch.arange(15)).abs() < 2)
    assert torch.equal(union.materialize(8, 15, batch=2)[:, 0], keep)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: even_boundaries(5, 0), "chunk_size: got 0"),
        (lambda: pick_boundaries(torch.zeros(5), 3), "scores: got"),
        (lambda: pick_boundaries(torch.zeros(1, 5), 3, nms=-1), "nms: got -1"),
        (lambda: attention_mass_ratio(torch.zeros(1, 5, 6)), "weights: got '5 rows, 6 columns'"),
        (lambda: attention_mass_ratio(torch.zeros(5, 5)), "weights: got"),
        (lambda: attention_mass_ratio(torch.zeros(1, 5, 5), 0), "window: got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
