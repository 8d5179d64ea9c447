"""Retrieval heads: scores by their definition, and the run over a model."""

import warnings

import pytest
import torch

import regard
from regard.lens import HeadScores, NeedleHaystack, retrieval_heads
from regard.lens.needle import NEEDLES
from regard.lens.retrieval_heads import CopyCounter, copies
from regard.lens.rouge import porter_stem, rouge1_recall
from tiny import CharTokenizer, tiny_llama

SAMPLES = {"needles": NEEDLES[:2], "lengths": (240,), "depths": (0, 60), "reserve": 20, "find": "exact"}


def looking_at(*positions):
    """One layer of heads, each looking at one key."""
    return torch.tensor(positions)[None, :, None]


def test_a_head_that_copies_the_whole_needle_scores_exactly_one():
    prompt = torch.arange(100, 130)
    counter = CopyCounter(prompt, (7, 17))
    for place in range(7, 17):
        counter.add(looking_at(place, 7, 2), int(prompt[place]))
    assert counter.score().tolist() == [[1.0, 0.1, 0.0]]


def test_what_counts_as_copying():
    prompt = torch.tensor([5, 6, 7, 6, 9])
    assert copies(torch.tensor([[1], [3], [2], [4]]), prompt, (1, 4), 6).tolist() == [True, True, False, False]
    assert not copies(torch.tensor([[4]]), prompt, (1, 4), 9).any()  # the right token outside the needle
    assert copies(torch.tensor([[4, 0, 3]]), prompt, (1, 4), 6).all()  # any of the top keys
    assert not copies(torch.tensor([[-1]]), prompt, (1, 4), 6).any()  # no attention in that layer
    assert not copies(torch.tensor([[7]]), prompt, (1, 9), 9).any()  # a key made after the prompt


def test_steps_count_repeats_and_sets_do_not():
    prompt = torch.tensor([3, 8, 8, 4])
    counts = {}
    for count in ("steps", "set"):
        counter = CopyCounter(prompt, (1, 4), count)
        for place in (1, 2, 1, 1):
            counter.add(looking_at(place), 8)
        counts[count] = float(counter.score())
    assert counts == {"steps": pytest.approx(4 / 3), "set": pytest.approx(1 / 2)}


def manual_scores(model, tokenizer, sample, limit, topk):
    """The definition, with transformers' own eager attention and whole forwards instead of a cache."""
    ids, (start, end) = sample.input_ids, sample.span
    model.set_attn_implementation("eager")
    score = torch.zeros(3, 4, dtype=torch.float64)
    prompt = ids[0].tolist()
    for _ in range(limit):
        with torch.no_grad():
            out = model(ids, output_attentions=True)
        token = int(out.logits[0, -1].argmax())
        for layer, weights in enumerate(out.attentions):
            for head in range(4):
                best = weights[0, head, -1].topk(topk).indices.tolist()
                score[layer, head] += any(start <= place < end and prompt[place] == token for place in best) / (
                    end - start
                )
        if "\n" in tokenizer.decode([token]) or token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    model.set_attn_implementation("sdpa")
    return score


@pytest.mark.parametrize("topk", [20, 50])
def test_a_run_over_a_model_is_the_definition(topk):
    tokenizer, model = CharTokenizer(), tiny_llama(1)
    common = torch.zeros(128, 1)
    common[tokenizer(" aeinot")["input_ids"]] = 1.0
    with torch.no_grad():  # a model that says common letters alone, and looks around sharply
        model.lm_head.weight.mul_(common)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
            layer.self_attn.o_proj.weight.mul_(8)
    haystack = NeedleHaystack(**SAMPLES)
    scores = retrieval_heads(model, tokenizer, haystack, max_new_tokens=10, min_recall=-1.0, topk=topk)
    manual = torch.stack([manual_scores(model, tokenizer, sample, 10, topk) for sample in haystack.samples(tokenizer)])
    torch.testing.assert_close(scores.runs, manual)
    torch.testing.assert_close(scores.scores, manual.mean(0))
    assert scores.runs.unique().numel() > 2
    assert scores.info["runs"] == scores.info["counted"] == 4 and scores.name == "retrieval"
    assert not model.training


def test_forced_runs_all_count_and_feed_the_answer():
    tokenizer, model = CharTokenizer(), tiny_llama(1)
    samples = list(NeedleHaystack(**SAMPLES).samples(tokenizer))
    scores = retrieval_heads(model, tokenizer, samples, decode="forced", topk=400)
    # with every key counted as looked at, each step copies, for every head
    torch.testing.assert_close(scores.runs, torch.ones(4, 3, 4, dtype=torch.float64))
    assert scores.info["counted"] == 4 and scores.info["recall"] == 1.0


def test_runs_that_miss_the_needle_do_not_count():
    tokenizer, model = CharTokenizer(), tiny_llama(1)
    with pytest.warns(UserWarning, match="none of 4 runs"):
        scores = retrieval_heads(model, tokenizer, NeedleHaystack(**SAMPLES), max_new_tokens=2)
    assert scores.scores.isnan().all() and scores.top(3) == [] and scores.info["counted"] == 0


def test_methods_act_meanwhile_and_nothing_stays_attached():
    tokenizer, model = CharTokenizer(), tiny_llama(1)
    options = {"samples": NeedleHaystack(**SAMPLES), "decode": "forced"}
    plain = retrieval_heads(model, tokenizer, **options)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    masked = retrieval_heads(model, tokenizer, **options, methods=[regard.MaskHeads(every)])
    assert (plain.scores - masked.scores).abs().max() > 0
    assert (masked.scores == masked.scores[0, 0]).all()  # uniform heads all look at the same first of equals
    with regard.attach(model):
        pass
    assert torch.equal(retrieval_heads(model, tokenizer, **options).scores, plain.scores)


def test_training_mode_comes_back():
    model = tiny_llama(1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        retrieval_heads(model, CharTokenizer(), NeedleHaystack(**SAMPLES), max_new_tokens=1)
    assert model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": "often"}, "count"),
        ({"decode": "beam"}, "decode"),
        ({"topk": 0}, "topk"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"samples": []}, "samples"),
    ],
)
def test_bad_settings(options, words):
    options = {"samples": NeedleHaystack(**SAMPLES), **options}
    with pytest.raises(ValueError, match=words):
        retrieval_heads(tiny_llama(1), CharTokenizer(), **options)


def test_needles_of_no_token():
    with pytest.raises(ValueError, match="span"):
        CopyCounter(torch.arange(5), (3, 3))
    with pytest.raises(ValueError, match="span"):
        CopyCounter(torch.arange(5), (-1, -1))
    with pytest.raises(ValueError, match="step"):
        CopyCounter(torch.arange(5), (1, 3)).score()


def test_scores_feed_the_ablation():
    """The loop of the paper: score, rank, switch off."""
    scores = HeadScores(torch.rand(3, 4))
    model, ids = tiny_llama(2), torch.randint(1, 128, (1, 9))
    for heads in (scores.top(3), scores.random(3, exclude=3)):
        with regard.attach(model, regard.MaskHeads(heads)):
            assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 12)


# ROUGE


@pytest.mark.parametrize(
    ("word", "stem"),
    [  # from Porter's paper and NLTK's list of exceptions
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "tie"), ("cats", "cat"), ("feed", "feed"), ("agreed", "agre"),
        ("plastered", "plaster"), ("motoring", "motor"), ("sing", "sing"), ("conflated", "conflat"), ("hopping", "hop"),
        ("falling", "fall"), ("filing", "file"), ("happy", "happi"), ("relational", "relat"), ("conditional", "condit"),
        ("digitizer", "digit"), ("radically", "radic"), ("operator", "oper"), ("feudalism", "feudal"), ("hopefulness", "hope"),
        ("triplicate", "triplic"), ("electrical", "electr"), ("adjustment", "adjust"), ("adoption", "adopt"), ("controlling", "control"),
        ("skies", "sky"), ("dying", "die"), ("enjoy", "enjoy"), ("spied", "spi"), ("died", "die"), ("geologi", "geolog"), ("is", "is"),
    ],
)  # fmt: skip
def test_porter_stems(word, stem):
    assert porter_stem(word) == stem


def test_rouge_recall():
    assert rouge1_recall(
        "Eat a sandwich, and sit in the park!", "sandwiches are eaten; sitting in parks"
    ) == pytest.approx(4 / 8)
    assert rouge1_recall("the the the cat", "the cat") == pytest.approx(0.5)
    assert rouge1_recall("", "anything") == 0.0 == rouge1_recall("word", "")


def test_a_published_file_of_unequal_runs_loads(tmp_path):
    """The authors' layout: one line, "layer-head" in any order, a score for every run that counted."""
    path = tmp_path / "some-model.json"
    path.write_text('{"1-0": [0.5, 0.0, 1.25], "0-1": [0.1], "0-0": [0, 0, 0], "1-1": [0.3, 0.2, 0.1]}')
    scores = HeadScores.load(path)
    assert scores.top(2) == [(1, 0), (1, 1)] and scores.num_runs == 3 and scores.name == "some-model"
    assert scores[0, 1] == 0.1 and scores[1, 0] == pytest.approx(0.58333333)
    assert scores.active()[1].tolist() == pytest.approx([2 / 3, 1.0])
