"""BlockTopK on models: limits, padding, decoding with summaries kept up to date, beams, errors."""

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt

import regard
from regard import BlockTopK, UnsupportedModelError
from regard.bench.roster import parse_method
from regard.ops.select import block_topk_attention
from regard.ops.select.running_summaries import BlockSummaries
from tiny import tiny_llama

SMALL = {"budget": 24, "block_size": 4, "block_q": 8, "sink": 2, "recent": 6}


@pytest.mark.parametrize("options", [{"budget": 200}, {"budget": 1.0}, {"prefill": False, "decode": False}])
def test_dense_limits(options):
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    with regard.attach(model, BlockTopK(**(SMALL | options))):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


def test_a_call_is_the_op():
    one = call(rows=60, scale=0.5)
    options = {"block_q": 8, "block_k": 4, "budget": 24, "sink": 2, "recent": 6, "summary": "minmax", "rows": "max"}
    wanted = block_topk_attention(one.q, one.k, one.v, scale=0.5, **options)
    torch.testing.assert_close(one.run([BlockTopK(**SMALL)]), wanted, rtol=1e-5, atol=1e-6)
    late = call(rows=1, keys=60)
    wanted = block_topk_attention(
        late.q, late.k, late.v, **(options | {"block_q": 1, "summary": "mean", "share": "none"})
    )
    found = late.run([BlockTopK(**SMALL, summary="mean", share="none")])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"summary": "mean", "rows": "mean", "share": "none"}, {"summary": "centroid", "share": "max"}]
)
def test_it_is_sparse_and_padding_changes_nothing(options):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    dense = logits(model, alone[0])
    with regard.attach(model, BlockTopK(**SMALL, **options)):
        # extremes, element by element, are those of keys rotated by their true positions
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows = logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(rows[0], dense[0], atol=1e-3)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])


def test_decoding_step_by_step_is_a_prefill_that_chooses_row_by_row():
    model, ids = tiny_llama(), prompt(60)
    with regard.attach(model, BlockTopK(**SMALL | {"block_q": 1})):
        whole = logits(model, ids)[0]
        cache, rows = None, []
        for t in [slice(0, 40), *(slice(i, i + 1) for i in range(40, 60))]:
            out = model(ids[:, t], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-5)


def test_summaries_are_kept_up_to_date_not_made_again(monkeypatch):
    model, ids = tiny_llama(), prompt()
    taken = []
    append = BlockSummaries.append
    monkeypatch.setattr(
        BlockSummaries, "append", lambda self, keys: (taken.append(keys.shape[2]), append(self, keys))[1]
    )
    with regard.attach(model, BlockTopK(**SMALL)):
        generated(model, ids, tokens=5)
    assert taken == [90] * 3 + [1] * 3 * 4


def test_beams_keep_their_own_summaries():
    model, ids = tiny_llama(), prompt()
    steps = []

    class Checked(BlockTopK):
        def choose(self, stretch):
            choice = super().choose(stretch)
            fresh = BlockSummaries(stretch.k, block=self.block_size, kind=self.summary).values
            torch.testing.assert_close(stretch.memory["summaries"].values, fresh)
            steps.append(stretch.q.shape[2])
            return choice

    with regard.attach(model, Checked(**SMALL)):
        generated(model, ids, tokens=9, num_beams=3)
    assert steps.count(1) == 8 * 3


def test_copies_of_a_cache_go_their_own_way():
    import copy

    model, ids = tiny_llama(), prompt()
    more = prompt(3, seed=9)
    with regard.attach(model, BlockTopK(**SMALL)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        wanted = []
        for _ in range(2):
            mine = copy.deepcopy(cache)
            mine.reorder_cache(torch.tensor([0]))
            rows = [model(more[:, i : i + 1], past_key_values=mine).logits for i in range(3)]
            wanted.append(torch.cat(rows))
        assert torch.equal(*wanted)
        assert cache.get_seq_length() == ids.shape[1]
        cache.crop(-34)  # a whole number of query blocks stays
        shorter = model(more[:, :1], past_key_values=cache).logits
        again = model(ids[:, :-34], use_cache=True).past_key_values
        torch.testing.assert_close(shorter, model(more[:, :1], past_key_values=again).logits)


def test_static_cache():
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, BlockTopK(**SMALL)):
        assert torch.equal(generated(model, ids, cache_implementation="static"), generated(model, ids))


def test_bfloat16():
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, BlockTopK(**SMALL | {"budget": 60})):
        wanted = logits(model, ids)
    with regard.attach(model.bfloat16(), BlockTopK(**SMALL | {"budget": 60})):
        found = logits(model, ids)
        assert generated(model, ids).shape == (1, 96)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).abs().mean()) < 0.02 * float(wanted.abs().mean()) + 0.01


def test_other_seams_compose():
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, BlockTopK(**SMALL), regard.MaskHeads({1: [0, 1]})):
        assert torch.isfinite(logits(model, ids)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"budget": 60}, "at least sink . recent = 68 keys"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"recent": 0}, "recent: got 0"),
        ({"summary": "avg"}, "summary: unknown name 'avg'"),
        ({"share": "all"}, "share: unknown name"),
        ({"rows": "all"}, "rows: unknown name"),
        ({"dense_layers": "two"}, "dense_layers: got str"),
    ],
)
def test_bad_fields(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        BlockTopK(**options)


def test_bidirectional_models_are_refused():
    from transformers import BertConfig, BertModel

    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    with pytest.raises(UnsupportedModelError, match="no causal self-attention"):
        regard.attach(BertModel(BertConfig(**sizes)), BlockTopK())


def test_roster():
    label, method = parse_method("block-topk", budget=0.125, context=4096)
    assert label == "block-topk" and method == BlockTopK(budget=512, block_size=64, block_q=64, sink=4, recent=64)
    assert parse_method("blocktopk", budget=8, context=4096)[1].budget == 8
