"""The block version of DHSA: the rules' shapes, limits, ragged ends, models with padding, errors."""

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt

import regard
from regard import BlockDHSA, UnsupportedModelError
from regard.ops.select import a_shape_blocks
from regard.ops.select.a_shape import PATTERNS
from tiny import tiny_llama

SMALL = {"budget": 24, "block_q": 16, "block_k": 8}


def tensors(length=100, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, heads, length, 8, generator=generator), torch.randn(
        1, kv_heads, length, 8, generator=generator
    )


@pytest.mark.parametrize("pattern", ["a-shape", "vertical-slash", "vertical-slash-blocks"])
@pytest.mark.parametrize("length", [1, 7, 64, 100, 129])
def test_forced_blocks_causality_and_counts(pattern, length):
    q, k = tensors(length)
    kept = a_shape_blocks(q, k, 4, block_q=16, block_k=8, pattern=pattern).block_map()
    n_q, n_k = kept.shape[2:]
    recent = torch.tensor([min((i + 1) * 16 - 1, length - 1) // 8 for i in range(n_q)])
    block = torch.arange(n_k)
    assert not kept[:, :, block > recent[:, None]].any()  # nothing of the future
    assert kept[..., 0].all() and kept[:, :, torch.arange(n_q), recent].all()
    dense = recent + 1 <= 4
    if pattern != "a-shape":
        dense = dense | (torch.arange(n_q) < 2) | (torch.arange(n_q) == n_q - 1)
    counts = kept.sum(-1)
    assert (counts[:, :, dense] == (recent + 1)[dense]).all()
    assert (counts[:, :, ~dense] <= 4).all() and (pattern != "a-shape" or (counts[:, :, ~dense] == 4).all())


def test_heads_of_a_group_choose_with_their_own_queries():
    q, k = tensors()
    for pattern in PATTERNS:
        options = {"block_q": 16, "block_k": 8, "pattern": pattern}
        grouped = a_shape_blocks(q, k, 4, **options).block_map()
        repeated = a_shape_blocks(q, k.repeat_interleave(2, 1), 4, **options).block_map()
        assert grouped.shape[1] == 4 and torch.equal(grouped, repeated)


@pytest.mark.parametrize("pattern", ["a-shape", "vertical-slash", "vertical-slash-blocks"])
def test_with_the_band_every_row_sees_its_neighbourhood(pattern):
    q, k = tensors(length=160)
    kept = a_shape_blocks(q, k, 5, block_q=32, block_k=8, pattern=pattern, band=True).block_map()
    for i in range(5):
        assert kept[:, :, i, 4 * i : 4 * i + 4].all()
    few = a_shape_blocks(q, k, 2, block_q=32, block_k=8, band=True)
    assert few.counts[0, 0].tolist() == [4, 5, 5, 5, 5]  # what is forced, also beyond the budget


def test_the_best_blocks_between_are_found():
    """One block of keys is what every query wants: it is read wherever it is between the first and the most recent."""
    q, k = torch.zeros(1, 1, 128, 4), torch.zeros(1, 1, 128, 4)
    q[..., 0], k[..., 40:48, 0] = 1.0, 3.0
    for pattern in ("a-shape", "vertical-slash", "vertical-slash-blocks"):
        share = {"vertical_share": 1.0} if pattern != "a-shape" else {}
        kept = a_shape_blocks(q, k, 4, block_q=16, block_k=8, pattern=pattern, **share).block_map()[0, 0]
        assert kept[4:, 5].all() and not kept[:2, 5].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_budget_of_the_whole_context_is_dense_and_less_is_not(pattern):
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    with regard.attach(model, BlockDHSA(**SMALL | {"budget": 1.0}, pattern=pattern)):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids), told)
    with regard.attach(model, BlockDHSA(**SMALL, pattern=pattern)):
        assert not torch.allclose(logits(model, ids), dense, atol=1e-3)
    assert torch.equal(logits(model, ids), dense)


def test_padding_changes_nothing_and_decoding_is_dense():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    with regard.attach(model, BlockDHSA(**SMALL)):
        rows = logits(model, ids, attention_mask=mask)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-5, atol=1e-5)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])
    late = call(rows=20, keys=60)
    wanted = call(rows=20, keys=60).run([])
    torch.testing.assert_close(late.run([BlockDHSA(budget=8, block_q=8, block_k=8)]), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"block_q": 0}, "block_q: got 0"),
        ({"block_k": 0}, "block_k: got 0"),
        ({"pattern": "b-shape"}, "pattern: unknown name 'b-shape'; did you mean a-shape"),
        ({"vertical_share": 1.5}, "vertical_share: got 1.5"),
        ({"dense_layers": -1}, "dense_layers: got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        BlockDHSA(**options)


def test_bad_tensors_are_named():
    q, k = tensors()
    with pytest.raises(ValueError, match="k: got '60 keys', need the 100 tokens of q"):
        a_shape_blocks(q, k[:, :, :60], 4)
    with pytest.raises(ValueError, match="topk: got 0"):
        a_shape_blocks(q, k, 0)
    assert a_shape_blocks(q[:, :, :0], k[:, :, :0], 4).indices.shape == (1, 4, 0, 0)


def test_models_that_it_cannot_serve():
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(UnsupportedModelError, match="BertModel has no causal self-attention, and BlockDHSA"):
        regard.attach(bert, BlockDHSA())
