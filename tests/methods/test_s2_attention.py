"""S2-Attention: the pattern's limits and coverage, and the method on models."""

import warnings

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt

import regard
from regard import S2Attention, UnsupportedModelError, masks
from regard.ops import attention
from tiny import tiny_llama

SMALL = {"block_size": 8, "local_blocks": 2, "stride": 2}


def block_map(heads=4, blocks=12, **options):
    """Which blocks head h keeps, bool (H, blocks, blocks)."""
    return masks.head_sharded(heads, 1, **options).materialize(blocks, blocks, num_heads=heads)[0]


def causal(length):
    return masks.causal.materialize(length, length)[0, 0]


def test_limits_are_dense():
    for options in (
        {"local_blocks": 12, "stride": 5},
        {"local_blocks": 1, "stride": 1},
        {"local_blocks": 1, "stride": 5, "dense_heads": 4},
        {"local_blocks": 1, "stride": 1, "position": "relative"},
    ):
        assert (block_map(**options) == causal(12)).all(), options


@pytest.mark.parametrize(("heads", "stride"), [(4, 4), (6, 4), (5, 3)])
def test_heads_cover_everything_together(heads, stride):
    kept = block_map(heads, 20, local_blocks=1, stride=stride)
    assert (kept.any(0) == causal(20)).all()
    assert not (kept.all(0) == causal(20)).all()
    alone = block_map(heads, 20, local_blocks=1, stride=stride, homogeneous=True)
    assert (alone.any(0) == alone.all(0)).all() and not (alone.any(0) == causal(20)).all()


def test_fewer_heads_than_stride_step_further():
    kept = block_map(2, 20, local_blocks=1, stride=8)
    assert kept[:, 19].nonzero().tolist() == [[0, 0], [0, 8], [0, 16], [0, 19], [1, 4], [1, 12], [1, 19]]
    close = block_map(2, 20, local_blocks=1, stride=8, step=1)
    assert close[1, 19].nonzero().flatten().tolist() == [7, 15, 19]


def test_a_column_is_dropped_for_good():
    """Cache-efficient: what a head no longer reads beyond its local band it never reads again."""
    kept = block_map(4, 24, local_blocks=3, stride=4)
    for i in range(23):
        out_of_band = torch.arange(24) <= i - 3
        assert not (kept[:, i + 1] & ~kept[:, i] & out_of_band).any()
    assert int(kept[:, 23].sum(-1).max()) <= 3 + 24 // 4 + 1


def test_the_bidirectional_form_is_symmetric_and_shared_by_heads():
    mask = masks.head_sharded(3, 4, 2, 3, causal=False)
    kept = mask.materialize(40, 40, num_heads=3)
    assert kept.shape[1] == 1 and torch.equal(kept, kept.transpose(-1, -2))
    row = (
        kept[0, 0, 0, ::4].nonzero().flatten().tolist()
    )  # the band is two blocks wide, then every third one from its edge
    assert row == [0, 1, 4, 7]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rows", [50, 7, 1])
def test_attention_is_the_masked_softmax(group, rows):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, rows, 8, generator=generator)
    k, v = (torch.randn(1, 4 // group, 50, 8, generator=generator) for _ in range(2))
    mask = masks.head_sharded(4 // group, 4, 2, 3, dense_heads=1, group=group)
    t, j = torch.arange(rows)[:, None] + 50 - rows, torch.arange(50)
    keep = torch.zeros(4, rows, 50, dtype=torch.bool)
    for h in range(4):
        kv = h // group
        dense = kv >= 4 // group - 1
        strided = (j // 4 + kv * max(1, 3 // 4)) % 3 == 0
        keep[h] = (j <= t) & ((t // 4 - j // 4 < 2) | strided | dense)
    wanted = attention(q, k, v, mask=keep, backend="eager")
    for backend in ("eager", "sdpa", "cpu"):
        torch.testing.assert_close(attention(q, k, v, mask=mask, backend=backend), wanted, rtol=1e-5, atol=1e-6)


def test_shifted_counts_from_the_start_of_each_row():
    mask = masks.head_sharded(2, 4, 1, 2)
    plain = mask.materialize(20, 20, num_heads=2)
    shifted = masks.shifted(mask, torch.tensor([0, 5])).materialize(25, 25, batch=2, num_heads=2)
    assert torch.equal(shifted[0, :, :20, :20], plain[0]) and torch.equal(shifted[1, :, 5:, 5:], plain[0])


def test_reaching_over_the_context_changes_nothing():
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    for options in ({"local_blocks": 12}, {"local_blocks": 1, "stride": 1}, {"local_blocks": 1, "dense_heads": 2}):
        with regard.attach(model, S2Attention(**SMALL | options)):
            torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
            assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


def test_a_call_is_the_masked_op():
    one = call(rows=60)
    mask = masks.head_sharded(2, 8, 2, 2, group=2)
    wanted = attention(one.q, one.k, one.v, mask=mask)
    torch.testing.assert_close(one.run([S2Attention(**SMALL)]), wanted, rtol=1e-5, atol=1e-6)


def test_sinks_are_seen_by_every_head_and_counted_after_the_padding():
    for padding, start in ((None, 0), ([9], 9)):
        one = call(padding=padding)
        one.run([S2Attention(8, 1, 5, sink=3)])
        weights = one.weights()[0]
        assert (weights[:, 50:, start : start + 3] > 0).all()
        assert (weights[:, 50:, start + 3] > 0).all(-1).tolist() == [
            True,
            True,
            False,
            False,
        ]  # block 0 is kv head 0's own


def test_decoding_sees_what_prefill_sees_and_padding_changes_nothing():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    dense = logits(model, alone[0])
    with regard.attach(model, S2Attention(**SMALL)):
        rows = logits(model, ids, attention_mask=mask)
        assert not torch.allclose(rows[0], dense[0], atol=1e-3)
        for row, text in zip(rows, alone):
            whole = logits(model, text)
            torch.testing.assert_close(row[-text.shape[1] :], whole[0], rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                past = model(text[:, :-5], use_cache=True).past_key_values
                steps = [
                    model(text[:, i : i + 1], past_key_values=past).logits
                    for i in range(text.shape[1] - 5, text.shape[1])
                ]
            torch.testing.assert_close(torch.cat(steps, 1), whole[:, -5:], rtol=1e-5, atol=1e-5)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])
            assert torch.equal(row[-6:], generated(model, text, cache_implementation="static")[0, -6:])


def test_hybrid_layers():
    model, ids = tiny_llama(), prompt()
    dense = logits(model, ids)
    with regard.attach(model, S2Attention(**SMALL, dense_layers=range(3))):
        assert torch.equal(logits(model, ids), dense)
    with regard.attach(model, S2Attention(**SMALL, dense_layers=range(1, 3, 2))):
        half = logits(model, ids)
    with regard.attach(model, S2Attention(**SMALL)):
        full = logits(model, ids)
    assert not torch.allclose(half, full, atol=1e-4) and not torch.allclose(half, dense, atol=1e-4)


def test_it_says_when_blocks_stay_unseen():
    model = tiny_llama()
    with (
        pytest.warns(UserWarning, match="2 different patterns with stride 4"),
        regard.attach(model, S2Attention(8, 2, 4)),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (
            S2Attention(**SMALL),
            S2Attention(8, 2, 1, homogeneous=True),
            S2Attention(8, 2, 4, dense_heads=1),
        ):
            regard.attach(model, method).detach()


def test_models_that_it_cannot_serve():
    from transformers import BertConfig, BertModel

    with pytest.raises(UnsupportedModelError, match="2 kv heads, and S2Attention is to leave 3 of them dense"):
        regard.attach(tiny_llama(), S2Attention(dense_heads=3))
    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(UnsupportedModelError, match="BertModel has no causal self-attention"):
        regard.attach(bert, S2Attention())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S2Attention(block_size=0), "block_size: got 0"),
        (lambda: S2Attention(local_blocks=0), "local_blocks: got 0"),
        (lambda: S2Attention(stride=0), "stride: got 0"),
        (lambda: S2Attention(dense_layers=1.5), "dense_layers: got float"),
        (lambda: masks.head_sharded(2, dense_heads=3), "dense_heads: got 3, need at most num_heads = 2"),
        (lambda: masks.head_sharded(2, local_blocks=(1, 2, 3)), "local_blocks: got"),
        (lambda: masks.head_sharded(2, position="vertical"), "position: unknown name 'vertical'"),
        (lambda: masks.shifted(masks.causal, torch.zeros(2)), "start: got torch.float32"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
