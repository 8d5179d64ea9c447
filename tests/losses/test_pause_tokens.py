"""Pauses: where they go, that nothing changes without them, that only their embedding learns; the proxy mixture."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.losses import PauseToken, fit_pause, insert_pause, pause_positions
from regard.losses.pause_tokens import PAUSE
from regard.methods.decoders import ProxyMixer
from tiny import CharTokenizer, tiny_llama


def test_insertion():
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    assert insert_pause(ids, [1, 3], 2).tolist() == [[5, -1, -1, 6, 7, -1, -1], [8, -1, -1, 9, 4, -1, -1]]
    assert insert_pause(ids[0], [0], 1, token=3).tolist() == [3, 5, 6, 7]
    assert torch.equal(insert_pause(ids, [1, 2], 0), ids) and torch.equal(insert_pause(ids, []), ids)
    for bad, name in (({"positions": [4]}, "positions"), ({"positions": [1], "k": -1}, "k")):
        with pytest.raises(ValueError, match=name):
            insert_pause(ids, **bad)


def test_places_are_clauses_of_the_first_third_and_its_end():
    class Words:
        words = ("one", ",", "two", "and", "three", ".", *["x"] * 24)

        def decode(self, ids):
            return self.words[ids[0]]

    ids = list(range(30))
    assert pause_positions(Words(), ids) == [2, 3, 6, 10]
    assert pause_positions(Words(), ids, most=2) == [6, 10] and pause_positions(Words(), ids, most=1) == [10]


def test_no_pause_is_the_model_itself_and_a_pause_is_its_vector():
    model = tiny_llama()
    pause, ids = PauseToken(model), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids).logits
        batch = {"input_ids": insert_pause(ids, [1], 0), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        assert torch.equal(pause.logits(model, batch), plain)
        embeds = pause.embed(model, insert_pause(ids, [1], 1))
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(embeds[0, 1], table.mean(0))
    torch.testing.assert_close(embeds[0, [0, 2, 3]], table[[5, 6, 7]])
    out = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, 4), max_new_tokens=2, do_sample=False)
    assert out.shape[1] == 2


def test_only_the_pause_learns(tmp_path):
    model, tokenizer = tiny_llama(initializer_range=0.4), CharTokenizer()  # attention that is not all but uniform
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = [("what is this, and that thing?", " ab"), ("where do we go, so late?", " ab")]
    pause, fitted = fit_pause(
        model, tokenizer, samples, k=2, steps=30, batch=2, lr=0.1, progress=False, out=tmp_path / "p.safetensors"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(fitted.losses[-5:]) < sum(fitted.losses[:5]) - 0.25
    assert not torch.allclose(pause.vector, model.get_input_embeddings().weight.mean(0))
    assert (tmp_path / "p.safetensors").is_file()
    with pytest.raises(ValueError, match="samples"):
        fit_pause(model, tokenizer, [])
    with pytest.raises(TypeError, match="samples"):
        fit_pause(model, tokenizer, [("a", 1)])
    assert PAUSE < 0


def test_proxy_mixture():
    model, tuned = tiny_llama(0), tiny_llama(1)
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "output_scores": True}
    options |= {"return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    with regard.attach(model, ProxyMixer(tuned, tuned)):
        same = model.generate(ids, **options)
    assert torch.equal(plain.sequences, same.sequences)
    torch.testing.assert_close(plain.scores[0], same.scores[0])
    with regard.attach(model, ProxyMixer(tuned, tiny_llama(0), alpha=0.5)):  # base is the model itself
        mixed = model.generate(ids, **options)
    with torch.no_grad():
        want = 0.5 * model(ids).logits[:, -1] + 0.5 * tuned(ids).logits[:, -1]
    torch.testing.assert_close(mixed.scores[0], want, rtol=1e-4, atol=1e-4)
    padded, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    mixer = ProxyMixer(tuned, model)
    torch.testing.assert_close(mixer.shift(padded, mask), mixer.shift(padded[:, 2:]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="vocabular"):
        regard.attach(model, ProxyMixer(tiny_llama(vocab_size=64), tiny_llama(vocab_size=64)))
    with pytest.raises(TypeError, match="tuned"):
        ProxyMixer("a", model)
