"""Needle in a haystack: the prompts, and where the needle is found in them."""

import pytest
import torch

from regard.lens import Needle, NeedleHaystack, find_span
from regard.lens.needle import NEEDLES, haystack_text
from tiny import CharTokenizer

SMALL = {"lengths": (700,), "depths": (0, 40, 100)}


class OffsetTokenizer(CharTokenizer):
    """Characters again, with offsets and a chat template, as fast tokenizers have them."""

    is_fast = True
    chat_template = "<user>{}<model>"

    def __call__(self, text, return_offsets_mapping=False, **options):
        out = super().__call__(text, **options)
        if return_offsets_mapping:
            out["offset_mapping"] = [(i, i + 1) for i in range(len(text))]
        return out

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        return self.chat_template.format(messages[0]["content"])


@pytest.mark.parametrize("tokenizer", [CharTokenizer(), OffsetTokenizer()], ids=["slow", "fast"])
@pytest.mark.parametrize("find", ["offsets", "exact"])
def test_the_span_is_the_answer(tokenizer, find):
    haystack = NeedleHaystack(**SMALL, find=find)
    samples = list(haystack.samples(tokenizer))
    assert len(samples) == len(haystack) == 9
    for sample in samples:
        start, end = sample.span
        if find == "offsets" and not getattr(tokenizer, "is_fast", False):
            continue  # the released rule, below: it may be early
        assert tokenizer.decode(sample.input_ids[0, start:end]) == sample.needle.answer
        assert torch.equal(sample.answer_ids, sample.input_ids[0, start:end])


def test_lengths_depths_and_questions():
    tokenizer = CharTokenizer()
    whole = haystack_text()
    places = []
    for sample in NeedleHaystack(**SMALL, needles=NEEDLES[:1], reserve=60, find="exact").samples(tokenizer):
        context, question = sample.text.split("Based on the content of the book")
        assert sample.needle.question in question and sample.text.endswith("Answer:")
        assert len(context) == 700 - 60 + 1
        before, after = context.split(f"\n{sample.needle.text}\n")
        assert whole.startswith(before + after.rstrip("\n"))
        assert before == "" or before.endswith(".") or sample.depth == 100
        places.append(len(before) / (len(before) + len(after)))
    assert places[0] == 0 and 0.1 < places[1] <= 0.4 and places[2] > 0.99


def test_a_text_of_ones_own_is_repeated_as_needed():
    haystack = NeedleHaystack(text="It rains. ", lengths=(400,), depths=(50,), find="exact")
    sample = next(haystack.samples(CharTokenizer()))
    assert sample.text.count("It rains.") > 15


def test_chat_template_where_there_is_one():
    tokenizer = OffsetTokenizer()
    for chat, wanted in ((None, True), (True, True), (False, False)):
        sample = next(NeedleHaystack(**SMALL, chat=chat).samples(tokenizer))
        assert sample.text.startswith("<user>") == wanted == sample.text.endswith("<model>")
        assert tokenizer.decode(sample.answer_ids) == sample.needle.answer


def test_the_authors_grid():
    grid = NeedleHaystack.paper()
    assert len(grid) == 600 and grid.lengths[0] == 1000 and grid.lengths[-1] == 50000 and grid.reserve == 200
    assert list(grid.depths) == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert NeedleHaystack.paper(longest=5000, needles=NEEDLES[:1]).lengths[-1] == 5000


def test_released_and_exact_spans():
    needle = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    prompt = [1, 2, 99, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 3, *needle, 4]
    assert find_span(prompt, needle) == (2, 13)  # ten of eleven tokens are enough, 10 / 11 > 0.9
    assert find_span(torch.tensor(prompt), needle, "exact") == (14, 25)
    assert find_span(prompt, needle[::-1]) == (2, 13)  # in any order
    assert find_span(prompt, needle[::-1], "exact") == (-1, -1)
    assert find_span([1, 2, 3], needle) == (-1, -1)
    assert find_span([1, 5, 6], [5, 6], "exact") == (1, 3)
    assert find_span([9, 9, 3], [3, 3, 3]) == (0, 3)  # one distinct token, found at once


def test_prose_is_prose():
    text = haystack_text()
    paragraphs = text.split("\n")
    assert len(text) > 100_000 and len(set(paragraphs)) == len(paragraphs)
    assert all(part.endswith(".") and part[0].isupper() for part in paragraphs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Needle("The cat sleeps.", "Who sleeps?", "dog"), "answer"),
        (lambda: NeedleHaystack(depths=(120,)), "depths"),
        (lambda: NeedleHaystack(question="What is it?"), "question"),
        (lambda: NeedleHaystack(find="fuzzy"), "find"),
        (lambda: next(NeedleHaystack(lengths=(40,)).samples(CharTokenizer())), "lengths"),
        (lambda: next(NeedleHaystack(text="  ").samples(CharTokenizer())), "text"),
        (lambda: find_span([1, 2], []), "needle_ids"),
        (lambda: find_span([1, 2], [1], "close"), "variant"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
