"""Landmark attention in a transformers model: everything fetched is the op, landmarks come by themselves, batches, beams, crops."""

import pytest
import torch
from sparse_models import prompt

import regard
from regard.ops import insert_landmarks, landmark_attention
from tiny import tiny_llama

MARK = 127


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def text(length, seed=0):
    return insert_landmarks(prompt(length, seed).clamp(max=126), MARK, 5)


class Everything(regard.Method):
    """The op on the model's own keys: nothing fetched, nothing moved."""

    def __init__(self, ids):
        self.marks = ids == MARK

    def attend(self, call):
        return landmark_attention(call.q, call.k, call.v, self.marks[:, : call.kv_len])


@torch.no_grad()
def read(model, method, pieces):
    with regard.attach(model, method) as session:
        cache = session.new_cache()
        return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], 1)


@pytest.mark.parametrize("sizes", [[48], [20, 1, 1, 15, 11], [1] * 48])
def test_with_every_block_fetched_it_is_landmark_attention(model, sizes):
    ids = text(40)
    with torch.no_grad(), regard.attach(model, Everything(ids)):
        want = model(ids, use_cache=False).logits
    method = regard.Landmark(MARK, block=5, topk=20, piece=2)
    torch.testing.assert_close(read(model, method, ids.split(sizes, 1)), want, rtol=1e-3, atol=1e-4)
    with torch.no_grad(), regard.attach(model, method):  # without a cache
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("select", ["token_head", "heads"])
def test_pieces_of_whole_blocks_do_not_matter(model, select):
    ids = text(60)
    method = regard.Landmark(MARK, block=5, topk=2, choose_by=select, piece=1, offload="cpu")
    want = read(model, method, [ids])
    torch.testing.assert_close(read(model, method, ids.split([36, 6, 30], 1)), want, rtol=1e-4, atol=1e-5)


def test_generated_text_has_its_landmarks(model):
    ids = text(23)
    with regard.attach(model, regard.Landmark(MARK, block=5, topk=2)):
        out = model.generate(ids, max_new_tokens=15, do_sample=False)
        beams = model.generate(ids, max_new_tokens=9, do_sample=False, num_beams=3)
    for told in (out, beams):
        plain = told[told != MARK][None]
        assert torch.equal(insert_landmarks(plain, MARK, 5), told)


def test_rows_of_different_length_do_not_meet(model):
    long, short = text(43), text(18, seed=1)
    gap = long.shape[1] - short.shape[1]
    both = torch.cat([long, torch.nn.functional.pad(short, (gap, 0))])
    mask = torch.ones_like(both)
    mask[1, :gap] = 0
    method = regard.Landmark(MARK, block=5, topk=2)
    with regard.attach(model, method):
        together = model.generate(both, attention_mask=mask, max_new_tokens=8, do_sample=False)
        alone = [model.generate(ids, max_new_tokens=8, do_sample=False) for ids in (long, short)]
    assert torch.equal(together[:1], alone[0]) and torch.equal(together[1:, gap:], alone[1])


@torch.no_grad()
def test_rows_change_places_and_tokens_are_taken_back(model):
    ids = torch.cat([text(30), text(30, seed=1)])
    method = regard.Landmark(MARK, block=5, topk=2)
    more = text(40, seed=2)[:, 36:41].expand(2, -1)
    want = read(model, method, [ids, more])[:, 36:]
    with regard.attach(model, method) as session:
        cache = session.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
        model(more, past_key_values=cache, use_cache=True)
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(more, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got.flip(0), want, rtol=1e-4, atol=1e-5)
        cache.crop(-17)  # through two blocks
        assert all(
            book.seen == 24 and memory.blocks == 4
            for layer in cache.layers
            for _, book, memory in layer.groups.values()
        )


def test_detach_and_errors(model):
    ids = text(20)
    before = model(ids).logits
    with regard.attach(model, regard.Landmark(MARK, block=5)):
        model(ids)
        with pytest.raises(ValueError, match="input_ids: got 'landmarks at"):
            model(ids[:, 1:])
        with pytest.raises(ValueError, match="input_ids: got None"):
            model(inputs_embeds=torch.randn(1, 4, 32))
    assert torch.equal(before, model(ids).logits)
    with pytest.raises(ValueError, match="landmark_id: got 128, need less than"):
        regard.attach(model, regard.Landmark(128))
    with pytest.raises(ValueError, match="select: unknown name"):
        regard.Landmark(1, choose_by="head")
    with pytest.raises(ValueError, match="piece: got 0"):
        regard.Landmark(1, piece=0)
