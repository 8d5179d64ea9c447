"""Stretching bins over keys, competing for them, and lists of kept keys."""

import sys

import pytest
import torch

from regard.ops.stretch import compete_for_bins, key_bins, stretch, stretch_mask, stretched_selection


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_bins_by_hand():
    visible = torch.tensor([True, True, False, True, True])
    assert key_bins(visible, 2).tolist() == [0, 0, 2, 1, 1]
    assert key_bins(visible, 4).tolist() == [0, 1, 4, 2, 3]
    assert key_bins(visible, 8).tolist() == [
        0,
        2,
        8,
        4,
        6,
    ]  # 0.9999, 2.9999, ...: bins of two keys' width are read in their middle
    assert key_bins(torch.zeros(3, dtype=torch.bool), 4).tolist() == [4, 4, 4]
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert stretch(x, visible.view(1, 1, 1, -1), -9.0)[0, 0, 0].tolist() == [0.0, 1.0, -9.0, 2.0, 3.0]


def test_jitter_stays_within_what_is_visible():
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    for sign in (-0.75, 0.75):
        found = key_bins(causal, 8, torch.tensor(sign))
        assert bool((found[causal] < 8).all()) and bool((found[~causal] == 8).all())


@pytest.mark.parametrize("competition", ["causal_batch", "query", "head", "batch"])
def test_budgets(competition):
    probs, lengths = rand(2, 3, 10, 8), torch.tensor([[10], [7]])
    kept = compete_for_bins(probs, lengths, 2, competition)
    per_query = [2 * 8 / 10, 2 * 8 / 7]
    sums = {"causal_batch": (1, 3), "query": (3,), "head": (2, 3), "batch": (1, 2, 3)}[competition]
    pool = {"causal_batch": 3, "query": 1, "head": None, "batch": None}[competition]
    for b in range(2):
        many = kept[b : b + 1].sum(sums).flatten()
        wanted = (
            pool * per_query[b] if pool else per_query[b] * lengths[b, 0].item() * (3 if competition == "batch" else 1)
        )
        assert many.tolist() == [round(wanted)] * len(many)
        if competition == "query":
            best = probs[b].topk(round(wanted), dim=-1).indices
            assert torch.equal(kept[b], torch.zeros_like(kept[b]).scatter(-1, best, True))


def test_a_causal_row_may_keep_everything_and_later_rows_less():
    probs = rand(1, 2, 40, 16)
    kept = compete_for_bins(probs, torch.arange(1, 41)[None], 3)
    counts = kept.sum((1, 3))[0]
    assert counts[0] == 32 and counts[39] == round(2 * 3 * 16 / 40)
    keys = stretch_mask(kept, torch.ones(40, 40, dtype=torch.bool).tril()[None, None])
    assert bool(keys[0, :, 0, 0].all()) and not keys[0, 0].triu(1).any()
    assert abs(float(keys[0].sum((0, 2))[10:].float().mean()) - 6) < 1.5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("oversample", [1.0, 2.0])
def test_lists_are_the_mask(causal, oversample, monkeypatch):
    kept = rand(2, 3, 21, 8) < 0.3
    keys = None if causal else torch.arange(21) < torch.tensor([[21], [15]])
    visible = torch.ones(21, 21, dtype=torch.bool).tril()[None, None] if causal else keys[:, None, None]
    wanted = stretch_mask(kept, visible, oversample, 3)
    for at_once in (1, 1 << 20):
        monkeypatch.setattr(sys.modules["regard.ops.stretch"], "_AT_ONCE", at_once)
        found = stretched_selection(kept, causal=causal, keys=keys, oversample=oversample, k=3)
        assert torch.equal(found.materialize(), wanted)
    assert stretched_selection(kept[:, :, :0], causal=True).indices.shape[2] == 0


def test_bad_input():
    with pytest.raises(ValueError, match="competition: unknown name 'all'"):
        compete_for_bins(rand(1, 1, 2, 4), torch.tensor([[2]]), 1, "all")
    with pytest.raises(ValueError, match="visible: got torch.float32, need 'bool'|visible: got"):
        key_bins(torch.ones(3), 4)
    with pytest.raises(ValueError, match=r"\(B, 1\) with 'head'"):
        compete_for_bins(rand(1, 1, 2, 4), torch.tensor([[1, 2]]), 1, "head")
