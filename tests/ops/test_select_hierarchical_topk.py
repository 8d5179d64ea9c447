"""HiP's search: what it must find, what it may not look at, and the attention over what it found."""

import pytest
import torch

from regard import masks
from regard.ops import attention
from regard.ops.select import block_summary, hierarchical_topk, hierarchical_topk_attention


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(found, head=0, row=0, batch=0):
    return [j for j in found.indices[batch, head, row].tolist() if j >= 0]


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_finds_the_peak_of_monotone_scores(variant):
    """Scores rise towards one key and fall behind it: the tree search ends at that key, wherever it is."""
    length = 300
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
    for peak in (0, 3, 77, 150, 222, 299):
        k = torch.stack((-(torch.arange(length) - peak).abs().float(), torch.zeros(length)), dim=-1)[None, None]
        found = hierarchical_topk(q, k, 8, block_q=1, block_k=1, window=0, variant=variant)
        # a group is known by its first key: what the search holds on to are neighbours of the peak
        assert peak in chosen(found), peak


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("block_k", [1, 2, 3])
def test_chooses_the_budget_before_the_window(variant, block_k):
    q, k = rand(1, 2, 96, 8, seed=1), rand(1, 2, 96, 8, seed=2)
    found = hierarchical_topk(q, k, 12, block_q=8, block_k=block_k, window=5, variant=variant)
    for i in range(12):
        searched = max(0, (i + 1) * 8 - 5)
        blocks = -(-searched // block_k)
        most = min(-(-12 // block_k), blocks)
        if variant == "released":
            assert found.counts[0, :, i].tolist() == [most] * 2
        else:  # rounding at coarse resolutions can leave fewer than the budget in the end
            assert all(most // 2 <= count <= most for count in found.counts[0, :, i].tolist())
        assert int(found.indices[0, :, i].max()) < max(1, blocks)


def test_scores_every_second_row():
    """As released rows 1, 3, 5 ... of a block speak for it; the others can be anything."""
    q, k = rand(1, 1, 64, 8, seed=3), rand(1, 1, 64, 8, seed=4)
    other = q.clone()
    other[:, :, ::2] = 100 * rand(1, 1, 32, 8, seed=5)
    args = (8, 8, 2, 4)
    assert torch.equal(hierarchical_topk(q, k, *args).indices, hierarchical_topk(other, k, *args).indices)
    other = q.clone()
    other[:, :, 1::2] = 100 * rand(1, 1, 32, 8, seed=5)
    args = {"budget": 8, "block_q": 8, "block_k": 2, "window": 4, "variant": "paper"}
    assert torch.equal(hierarchical_topk(q, k, **args).indices, hierarchical_topk(other, k, **args).indices)


def test_heads_batches_and_groups_are_independent_problems():
    q, k = rand(2, 6, 70, 8, seed=6), rand(2, 3, 70, 8, seed=7)
    found = hierarchical_topk(q, k, 8, 4, 2, 3).indices
    for b in range(2):
        for h in range(6):
            alone = hierarchical_topk(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], 8, 4, 2, 3).indices
            assert torch.equal(alone[0, 0], found[b, h, :, : alone.shape[-1]])


def test_late_queries_are_the_last_rows_of_the_whole_search():
    q, k = rand(1, 1, 96, 8, seed=8), rand(1, 1, 96, 8, seed=9)
    whole = hierarchical_topk(q, k, 12, 16, 1, 8).indices
    late = hierarchical_topk(q[:, :, 64:], k, 12, 16, 1, 8).indices
    assert torch.equal(whole[:, :, 4:], late)
    unfilled = torch.cat((k, torch.full((1, 1, 40, 8), 1e4)), dim=2)  # a static cache: keys that do not exist yet
    assert torch.equal(hierarchical_topk(q[:, :, 64:], unfilled, 12, 16, 1, 8, q_offset=64).indices, late)


def test_the_best_representative_beats_the_first():
    """The oracle scores whole groups, so it never finds less of the true best keys (positive scores)."""
    q, k = rand(1, 1, 1, 8, seed=10).abs(), rand(1, 1, 512, 8, seed=11).abs()
    best = (q @ k.transpose(-1, -2))[0, 0, 0].topk(16).indices.tolist()
    recall = {}
    for how in ("first", "best"):
        found = hierarchical_topk(q, k, 16, 1, 1, 0, representative=how)
        recall[how] = len(set(best) & set(chosen(found)))
    assert recall["best"] == 16 > recall["first"]


def test_grouped_keys_are_scored_by_their_extremes():
    k = rand(1, 1, 37, 4, seed=12)
    assert torch.equal(block_summary(k, 4, "max")[0, 0, -1], k[0, 0, 36])
    assert torch.equal(block_summary(k, 4, "min")[0, 0, 2], k[0, 0, 8:12].amin(0))
    assert torch.allclose(block_summary(k, 4)[0, 0, 9], k[0, 0, 36])
    # a group with one very large entry is found although its first key is dull
    k = torch.zeros(1, 1, 256, 4)
    k[0, 0, 131, 2] = 50.0
    q = torch.ones(1, 1, 1, 4)
    assert 32 in chosen(hierarchical_topk(q, k + 1e-3 * rand(1, 1, 256, 4), 32, 1, 1, 0, group=4))


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize(("group", "block_k", "sink"), [(1, 1, 0), (1, 2, 3), (1, 3, 0), (4, 1, 0), (2, 2, 5)])
@pytest.mark.parametrize("rows", [61, 20, 1])
def test_attention_sees_what_was_found_the_window_and_the_sinks(variant, group, block_k, sink, rows):
    q, k, v = rand(2, 4, rows, 8, seed=13), rand(2, 2, 61, 8, seed=14), rand(2, 2, 61, 5, seed=15)
    window, block_q = 9, 8
    searched = window if group == 1 else (window - group + 1) // group
    found = hierarchical_topk(q, k, 12, block_q, block_k, searched, group, variant=variant)
    t, j = torch.arange(rows)[:, None] + 61 - rows, torch.arange(61)
    sinks = -(-sink // (block_k * group)) * block_k * group
    keep = (found.materialize() | (t - j < window) | (j < sinks)) & (j <= t)
    wanted = attention(q, k, v, mask=keep, backend="eager")
    for backend in ("eager", "sdpa", "cpu"):
        out = hierarchical_topk_attention(
            q, k, v, 12, block_q, block_k, window, sink, group, variant=variant, backend=backend
        )
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("group", [1, 4])
def test_a_budget_of_the_whole_context_is_dense(variant, group):
    q, k, v = rand(1, 2, 75, 8, seed=16), rand(1, 2, 75, 8, seed=17), rand(1, 2, 75, 8, seed=18)
    dense = attention(q, k, v, mask=masks.causal)
    for budget in (76, 1.0):
        out = hierarchical_topk_attention(q, k, v, budget, 8, 2, 6, group=group, variant=variant)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)


def test_finds_more_of_the_attention_than_a_window_or_chance():
    """Keys that lie on a few smooth paths, as neighbouring tokens do: share of the true attention that equal budgets keep."""
    length, dim = 1024, 16
    drift = rand(1, 1, length, dim, seed=19).cumsum(2)
    k = torch.nn.functional.layer_norm(drift, (dim,)) + 0.1 * rand(1, 1, length, dim, seed=20)
    visits = torch.randint(0, length, (length // 32,), generator=torch.Generator().manual_seed(21)).repeat_interleave(
        32
    )
    visits = torch.minimum(visits, torch.arange(length))  # each block of queries goes back to one earlier place
    q = 3 * k[:, :, visits]
    window, budget = 32, 96
    weights = (q @ k.transpose(-1, -2) * dim**-0.5).masked_fill(~masks.causal.materialize(length, length), -torch.inf)
    weights = weights.softmax(-1)[0, 0]
    t, j = torch.arange(length)[:, None], torch.arange(length)
    late = slice(256, None)

    def kept(keep):
        return float((weights * (keep & (j <= t)))[late].sum() / weights[late].sum())

    hip = hierarchical_topk(q, k, budget, 32, 2, window).materialize()[0, 0] | (t - j < window)
    scattered = torch.rand(length, length, generator=torch.Generator().manual_seed(22)) * t < budget
    local = (t - j < window + budget - 4) | (j < 4)
    lost = {"hip": 1 - kept(hip), "local": 1 - kept(local), "scattered": 1 - kept(scattered | (t - j < window))}
    assert lost["hip"] < 0.5 * lost["local"], lost
    assert lost["hip"] < 0.4 * lost["scattered"], lost


def test_half_types_empty_inputs_and_gradients():
    q, k, v = (rand(1, 2, 40, 8, seed=s) for s in (23, 24, 25))
    half = hierarchical_topk(q.bfloat16(), k.bfloat16(), 8, 8, 2, 4)
    assert torch.equal(half.indices, hierarchical_topk(q.bfloat16().float(), k.bfloat16().float(), 8, 8, 2, 4).indices)
    assert hierarchical_topk(q[:, :, :0], k, 8).indices.shape[2] == 0
    assert hierarchical_topk(q[:, :, :0], k[:, :, :0], 8).kv_len == 0
    assert chosen(hierarchical_topk(q[:, :, :1], k[:, :, :1], 8, window=0)) == [0]
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = hierarchical_topk_attention(q, k, v, 8, 8, 2, 4)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    found = hierarchical_topk(q, k, 8, 8, 2, 4)
    t, j = torch.arange(40)[:, None], torch.arange(40)
    keep = (found.materialize() | (t - j < 4)) & (j <= t)
    wanted = torch.autograd.grad(attention(q, k, v, mask=keep, backend="eager").square().sum(), (q, k, v))
    for got, want in zip(grads, wanted):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"budget": 2, "group": 4}, "budget: got 2, need at least group = 4"),
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"block_q": 0}, "block_q: got 0"),
        ({"window": -1}, "window: got -1"),
        ({"variant": "papers"}, "did you mean paper"),
        ({"representative": "best", "group": 2}, "representative: got 'best'"),
        ({"q_offset": 10}, "need at least q_offset"),
        ({"k": torch.zeros(1, 2, 16, 8)}, "a divisor of q's 3 heads"),
        ({"k": torch.zeros(2, 1, 16, 8)}, "k: got"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"q": torch.zeros(1, 3, 16, 8), "k": torch.zeros(1, 1, 16, 8)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        hierarchical_topk(**given)


def test_the_window_must_hold_a_group():
    x = torch.zeros(1, 1, 16, 8)
    with pytest.raises(ValueError, match="window: got 2, need at least group = 4"):
        hierarchical_topk_attention(x, x, x, 8, window=2, group=4)
