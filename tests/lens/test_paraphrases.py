"""SCA's parts: text measures by hand, IG along words, the choice of a paraphrase, thirds, topics."""

from __future__ import annotations

import math

import pytest
import torch

from regard.lens import (
    best_paraphrase,
    concreteness,
    discretized_gradients,
    flesch,
    formality,
    saliency,
    share_of_thirds,
    topic_vectors,
)
from regard.lens.discretized import word_path
from regard.lens.text_measures import rough_tags, syllables
from tiny import CharTokenizer, tiny_llama


def test_flesch_of_sentences_counted_by_hand():
    assert [syllables(w) for w in ("cat", "table", "reading", "made", "idea", "walked", "rhythm")] == [
        1,
        2,
        2,
        1,
        2,
        1,
        1,
    ]
    text = "The cat sat. The reading table was made."  # 8 words, 2 sentences, 10 syllables
    assert flesch(text) == pytest.approx(206.835 - 1.015 * 4 - 84.6 * 10 / 8)
    assert flesch("Cats sleep.") > flesch("Institutional considerations necessitate multidimensional evaluation.")
    with pytest.raises(ValueError, match="text"):
        flesch("123 !")


def test_formality_balances_at_50():
    assert formality({"noun": 3, "verb": 3, "other": 4}) == 50.0
    assert formality({"noun": 1, "article": 1}) == 100.0 and formality({"pronoun": 2}) == 0.0
    assert formality({"adjective": 2, "preposition": 1, "adverb": 1, "interjection": 1, "other": 5}) == pytest.approx(
        55.0
    )
    assert formality([("Cats", "noun"), ("sleep", "verb")]) == 50.0
    assert formality("The evaluation of the famous structure") > formality("oh I think you just really know it")
    assert rough_tags("The quickly famous dog")[0] == ("The", "article")
    assert [tag for _, tag in rough_tags("The quickly famous dog")] == ["article", "adverb", "adjective", "noun"]
    with pytest.raises(ValueError, match="tags"):
        formality({"NN": 2})
    with pytest.raises(ValueError, match="tags"):
        formality([])


def test_concreteness_is_the_mean_of_what_is_rated():
    ratings = {"dog": 4.8, "idea": 1.6}
    assert concreteness("A Dog has an idea", ratings) == pytest.approx(3.2)
    assert concreteness(["dog", "dog", "of"], ratings) == pytest.approx(4.8)
    assert math.isnan(concreteness("of the", ratings))


def test_word_path_is_monotonic_and_its_gradients_are_complete():
    torch.manual_seed(0)
    table, x = torch.randn(50, 4).double(), torch.randn(2, 3, 4).double()
    path = word_path(x, 0.0, table, steps=8, neighbours=5)
    assert path.shape == (9, 2, 3, 4) and torch.equal(path[0], x) and (path[-1] == 0).all()
    assert ((path.abs().diff(dim=0) <= 1e-12) & (path * x >= 0)[1:]).all()  # towards 0, never past it
    w = torch.randn(3, 4).double()
    found = discretized_gradients(lambda p: (p * w).sum((1, 2)), x, 0.0, table, steps=5)
    torch.testing.assert_close(found, w * x)

    def score(p):
        return torch.tanh((p * w).sum((1, 2))) + p.square().sum((1, 2))

    total = discretized_gradients(score, x, 0.0, table, steps=60).sum((1, 2))
    torch.testing.assert_close(total, score(x) - score(x * 0), rtol=0.05, atol=0.05)
    straight = word_path(x, 0.0, x.flatten(0, 1)[:1] * 0 + 100, steps=4, neighbours=1)
    torch.testing.assert_close(straight[1], 0.75 * x)  # no word helps: the straight line
    model = tiny_llama()
    assert saliency(model, {"input_ids": torch.tensor([[4, 5, 6]])}, "discretized", steps=4, baseline=7).shape == (1, 3)


def test_choice_of_a_paraphrase():
    model, tokenizer = tiny_llama(), CharTokenizer()
    one = best_paraphrase(model, tokenizer, ["what is it?"], steps=4)
    assert one.best == 0 and one.gradient[0] == pytest.approx(1.0) and one.scores[0] == pytest.approx(1.0)
    prompts = ["what is it?", "what is it?", "name that thing now"]
    made = best_paraphrase(model, tokenizer, prompts, steps=4, weight=1.0)
    assert made.gradient[0] == pytest.approx(made.gradient[1]) and made.gradient[2] < made.gradient[0]
    assert made.best == 0 and made.scores == made.gradient
    for row, entropy, unread in zip(made.attributions, made.entropy, made.unread):
        assert sum(abs(value) for _, value in row) == pytest.approx(1.0, abs=1e-5)
        assert 0 <= entropy <= math.log2(len(row)) + 1e-9 and 0 <= unread < 1
    topics = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    by_topic = best_paraphrase(model, tokenizer, prompts, steps=2, weight=0.0, topics=lambda _: topics, original=2)
    assert by_topic.best == 2 and by_topic.topic == pytest.approx([0.0, 0.0, 1.0])
    for bad in ({"prompts": "text"}, {"prompts": []}, {"original": 3}, {"weight": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            best_paraphrase(model, tokenizer, **({"prompts": prompts} | bad))


def test_tokens_are_joined_to_words():
    from regard.lens.paraphrases import _by_word

    class Pieces:
        def decode(self, ids):
            return [" un", "read", "able", ",", " Text"][ids[0]]

    made = _by_word(Pieces(), [0, 1, 2, 3, 4], [1.0, 2.0, -1.0, 0.0, 6.0])
    assert [word for word, _ in made] == ["unreadable", ",", "text"]
    assert [value for _, value in made] == pytest.approx([0.25, 0.0, 0.75])


def test_thirds_and_topics():
    values = torch.tensor([[1.0, 1.0, -2.0, 2.0, 0.0, 0.0], [3.0, 1.0, 0.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(share_of_thirds(values, mask), torch.tensor([[1 / 3, 2 / 3, 0.0], [0.75, 0.25, 0.0]]))
    texts = ["cat dog cat dog pet", "dog pet cat cat", "tax bank tax money", "money bank bank tax"]
    found = topic_vectors(texts, 2, sweeps=60)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))
    alike = torch.nn.functional.cosine_similarity(found[:, None], found[None], dim=-1)
    assert alike[0, 1] > alike[0, 2] and alike[2, 3] > alike[1, 3]
    assert torch.equal(found, topic_vectors(texts, 2, sweeps=60))
    assert topic_vectors(["", "a b"], 3).isfinite().all()
