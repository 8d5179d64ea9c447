"""A two-class set in words that every small model knows, for claims about edits that are searched on labelled prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# fmt: off
GOOD = ["wonderful", "brilliant", "delightful", "superb", "charming", "excellent", "moving", "gripping", "lovely", "splendid",
        "enjoyable", "clever"]
BAD = ["terrible", "boring", "awful", "dreadful", "clumsy", "horrible", "tedious", "lifeless", "dull", "disappointing",
       "annoying", "stupid"]
# fmt: on
THINGS = ["film", "book", "concert", "meal", "hotel", "play", "course", "game", "museum", "speech"]
TEMPLATE = "Review: The {thing} was {word}, and we talked about it all evening.\nSentiment (positive or negative):"
ANSWERS = (" positive", " negative")


def reviews(
    tokenizer: Any, count: int, part: int, batch: int = 16
) -> tuple[list[dict[str, Tensor]], list[Tensor], Tensor]:
    """`count` balanced prompts in batches, padded on the left; the right next token of each; the two answers.

    Args:
        part: 0 or 1: words and things of one half, so that what is found on one part is tried on words that it never saw.
    """
    half = [words[part::2] for words in (GOOD, BAD)]
    things = THINGS[part::2]
    answers = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ANSWERS])
    texts, labels = [], []
    for number in range(count):
        kind, place = number % 2, number // 2
        word = half[kind][(place + 3 * kind) % len(half[kind])]
        thing = things[(place + place // len(half[kind])) % len(things)]
        texts.append(TEMPLATE.format(thing=thing, word=word))
        labels.append(int(answers[kind]))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    batches, wanted = [], []
    for start in range(0, count, batch):
        some = rows[start : start + batch]
        width = max(map(len, some))
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        batches.append({"input_ids": ids, "attention_mask": mask})
        wanted.append(torch.tensor(labels[start : start + batch]))
    return batches, wanted, answers
