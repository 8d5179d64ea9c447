"""DHSA's selection and attention: limits, what the released code counts twice, chunk scores."""

import pytest
import torch

from regard import masks
from regard.ops import attention
from regard.ops.select import (
    chunk_scores,
    chunk_topk,
    chunk_topk_attention,
    chunk_topk_keys,
    even_boundaries,
    key_counts,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch=1, heads=2, kv_heads=2, length=90, dim=8, seed=0):
    return (
        rand(batch, heads, length, dim, seed=seed),
        rand(batch, kv_heads, length, dim, seed=seed + 1),
        rand(batch, kv_heads, length, 5, seed=seed + 2),
    )


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("instruction", [0, 7, 32, 90])
@pytest.mark.parametrize("budget", [90, 1.0, 500])
def test_a_budget_of_the_whole_context_is_dense(variant, instruction, budget):
    q, k, v = qkv(batch=2, heads=4, kv_heads=2)
    cuts = torch.tensor([0, 3, 40, 41, 90])
    dense = attention(q, k, v, mask=masks.causal)
    for backend in ("eager", "cpu"):
        out = chunk_topk_attention(
            q, k, v, cuts, budget, 16, 4, 16, instruction=instruction, variant=variant, backend=backend
        )
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)


def test_a_chunk_a_token_is_selection_by_the_mean_query():
    q, k, _ = qkv(length=64)
    found = chunk_topk(q, k, even_boundaries(64, 1), 12, 16, local=0, sink=0)
    for i in range(4):
        scores = (q[0, :, i * 16 : i * 16 + 16].mean((0, 1)) @ k[0].mean(0).T)[: (i + 1) * 16]
        wanted = sorted(scores.topk(12).indices.tolist())
        assert found.indices[0, 0, i].tolist() == wanted


def test_even_chunks_are_mean_pooled_blocks_times_a_constant():
    q, k, _ = qkv(length=64)
    scores = chunk_scores(q, k, even_boundaries(64, 8), 16)
    pooled = q.mean(1).unflatten(1, (4, 16)).mean(2) @ k.mean(1).unflatten(1, (8, 8)).mean(2).transpose(1, 2)
    torch.testing.assert_close(scores, pooled * (16 * 8) ** 0.5)
    torch.testing.assert_close(chunk_scores(q, k, even_boundaries(64, 8), 16, "mean"), pooled)
    peaks = q.mean(1).unflatten(1, (4, 16)).amax(2) @ k.mean(1).unflatten(1, (8, 8)).mean(2).transpose(1, 2)
    torch.testing.assert_close(chunk_scores(q, k, even_boundaries(64, 8), 16, "max"), peaks)


def test_scores_do_not_depend_on_the_order_of_heads_and_share_kv_heads():
    q, k, _ = qkv(heads=6, kv_heads=3)
    cuts = torch.tensor([0, 5, 30, 90])
    scores = chunk_scores(q, k, cuts, 16)
    torch.testing.assert_close(chunk_scores(q[:, [3, 1, 5, 0, 2, 4]], k[:, [2, 0, 1]], cuts, 16), scores)
    torch.testing.assert_close(chunk_scores(q, k.repeat_interleave(2, 1), cuts, 16), scores)


def test_length_normalisation_evens_out_noise():
    """For pure noise the plain mean scores long chunks near 0 and short ones wildly; with the root of the length all alike."""
    length = 4096
    q, k = rand(1, 1, 64, 16, seed=5), rand(1, 1, length, 16, seed=6)
    cuts = torch.cat((torch.arange(0, length // 2, 4), torch.arange(length // 2, length + 1, 64)))
    short = torch.diff(cuts) == 4
    spread = {}
    for pooling in ("sqrt", "mean"):
        scores = chunk_scores(q, k, cuts, 64, pooling)[0, 0]
        spread[pooling] = float(scores[short].std() / scores[~short].std())
    assert 0.6 < spread["sqrt"] < 1.6 < 3.0 < spread["mean"]


def test_the_best_chunk_is_read_whole_and_the_local_keys_always():
    q, k, _ = qkv(length=128)
    k = 0.01 * k
    k[:, :, 37:45] += q[:, :, 96:112].mean((1, 2), keepdim=True)  # what block 6 of 16 rows looks for
    cuts = torch.tensor([0, 10, 37, 45, 80, 128])
    row = chunk_topk(q, k, cuts, 14, 16, local=4, sink=2, variant="paper").indices[0, 0, 6].tolist()
    assert set(range(37, 45)) <= set(row) and {108, 109, 110, 111} <= set(row) and {0, 1} <= set(row)
    row = chunk_topk(q, k, cuts, 14, 16, local=4, sink=2).indices[0, 0, 6].tolist()
    assert {108, 109, 110, 111} <= set(row) and {0, 1} <= set(row) and len(row) == 14


def test_released_lists_write_the_sinks_over_the_smallest_keys():
    q, k, _ = qkv(length=128)
    cuts = torch.tensor([0, 10, 37, 45, 80, 128])
    plain = chunk_topk_keys(q, k, cuts, 20, 16, 4, 0)
    written = chunk_topk_keys(q, k, cuts, 20, 16, 4, 6)
    assert torch.equal(written[..., 6:], plain[..., 6:])
    assert (written[0, :, :6] == torch.arange(6)).all()
    paper = chunk_topk(q, k, cuts, 20, 16, 4, 6, variant="paper")
    assert paper.counts[0, 0].tolist() == [16, *[26] * 7]  # the sinks on top of the budget, as far as there are keys


def test_released_repeats_are_counted_in_the_softmax():
    """block_q < sink: the last row of the first block reads its own key again and again, as the authors' gather does."""
    q, k, v = qkv(length=40)
    cuts = even_boundaries(40, 5)
    keys = chunk_topk_keys(q, k, cuts, 24, 8, 2, 12)
    assert keys[0, 0, :12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7]
    counts = key_counts(keys, block_q=8, q_len=40, kv_len=40, q_offset=0)
    assert counts[0, 0, 7] == 5 and counts[0, 1].max() == 1
    out = chunk_topk_attention(q, k, v, cuts, 24, 8, 2, 12, instruction=0)
    gathered = keys[0, 0][keys[0, 0] <= 7]
    weights = (q[0, :, 7:8] @ k[0, :, gathered].transpose(-1, -2) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(out[0, :, 7:8], weights @ v[0, :, gathered], rtol=1e-5, atol=1e-6)
    assert key_counts(chunk_topk_keys(q, k, cuts, 24, 16, 2, 12), block_q=16, q_len=40, kv_len=40, q_offset=0) is None
    # the paper's selection has no repeats, so the same row is plain causal attention
    paper = chunk_topk_attention(q, k, v, cuts, 24, 8, 2, 12, instruction=0, variant="paper")
    dense = attention(q, k, v, mask=masks.causal)
    torch.testing.assert_close(paper[0, :, 7], dense[0, :, 7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out[0, :, 7], dense[0, :, 7], atol=1e-3)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_window_bounds_what_competes(variant):
    q, k, v = qkv(length=96)
    found = chunk_topk(q, k, even_boundaries(96, 6), 16, 8, 4, 3, window=24, variant=variant)
    for i in range(12):
        row = [j for j in found.indices[0, 0, i].tolist() if j >= 0 and (j < 95 or i == 11)]
        assert min(row) >= max(0, i * 8 - 24) and max(row) < (i + 1) * 8
    out = chunk_topk_attention(q, k, v, even_boundaries(96, 6), 24, 8, 4, 3, window=24, instruction=0, variant=variant)
    reach = masks.sliding_window(25 if variant == "released" else 24) & masks.causal
    keep = chunk_topk(q, k, even_boundaries(96, 6), 24, 8, 4, 3, window=24, variant=variant).materialize()
    wanted = attention(q, k, v, mask=masks.dense(keep) & reach)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_continuing_a_prompt_aligns_by_position():
    q, k, _ = qkv(length=96)
    cuts = even_boundaries(96, 6)
    whole = chunk_topk_keys(q, k, cuts, 20, 16, 4, 4)
    later = chunk_topk_keys(q[:, :, 48:], k, cuts, 20, 16, 4, 4)
    assert torch.equal(whole[:, 3:], later)


def test_rows_with_their_own_boundaries():
    q, k, _ = qkv(batch=2)
    rows = torch.tensor([[0, 20, 50, 90], [0, 41, 90, 90]])
    both = chunk_topk(q, k, rows, 24, 16, 4, 4).indices
    for b in range(2):
        alone = chunk_topk(q[b : b + 1], k[b : b + 1], rows[b].unique(), 24, 16, 4, 4).indices
        assert torch.equal(both[b : b + 1], alone)


def test_empty_and_tiny():
    q, k, v = qkv(length=1)
    torch.testing.assert_close(chunk_topk_attention(q, k, v, even_boundaries(1, 4)), v)
    assert chunk_topk(q[:, :, :0], k, even_boundaries(1, 4)).indices.shape[2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundaries": torch.tensor([0, 5, 15])}, "boundaries: got .*need 0 first and the length, 16, last"),
        ({"boundaries": torch.tensor([0, 9, 5, 16])}, "need ascending positions"),
        ({"boundaries": torch.tensor([0.0, 16.0])}, "boundaries: got torch.float32"),
        ({"boundaries": torch.tensor([[0, 16]] * 3)}, "boundaries: got '3 rows'"),
        ({"budget": 0}, "budget: got 0"),
        ({"block_q": 0}, "block_q: got 0"),
        ({"pooling": "avgpool"}, "pooling: unknown name 'avgpool'"),
        ({"variant": "official"}, "variant: unknown name"),
        ({"window": 0}, "window: got 0"),
        ({"k": torch.zeros(1, 2, 16, 8)}, "a divisor of q's 3 heads"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"q": torch.zeros(1, 3, 16, 8), "k": torch.zeros(1, 1, 16, 8), "boundaries": torch.tensor([0, 16])} | change
    with pytest.raises((ValueError, TypeError), match=message):
        chunk_topk(**given)
