"""The passkey test: a five-digit number said once in a sea of repeated sentences, and asked for at the end.

Mohtashami and Jaggi 2023 (Landmark Attention, arXiv 2305.16300), and most papers since (LongHeads: LuLuLuyi/LongHeads,
`passkey_retrieval.py`). The sentences are the papers'; here the length is met in tokens, not in characters.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from .._checks import require, require_fraction, require_int

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One prompt.

    Attributes:
        prompt: token ids, `length` of them. answer: those of the key. key: the number. span: [start, end) of the sentence that says it.
    """

    prompt: list[int]
    answer: list[int]
    key: int
    span: tuple[int, int]


def passkey(tokenizer: Any, length: int, *, depth: float | None = None, number: int = 0) -> Passkey:
    """A passkey prompt of exactly `length` tokens.

    Args:
        tokenizer: called with text, gives `input_ids`. length: tokens of the prompt, its question included.
        depth: where the key stands, 0 = start, 1 = end; None: drawn. number: makes it another key (and depth).

    Raises `ValueError` where the length leaves no room for the sentences around the key.
    """
    require_int("length", length, 1)
    if depth is not None:
        require_fraction("depth", depth)
    rng = random.Random(f"passkey {number}")
    key = rng.randint(1, 50000)
    depth = rng.random() if depth is None else depth

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head, tail = encode(_TASK + "\n"), encode(_QUESTION)
    said = encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    room = length - len(head) - len(said) - len(tail)
    require(room >= 0, "length", length, f"at least {length - room} tokens")
    filler = encode(_FILLER)
    filler = filler * (room // len(filler) + 1)
    at = round(depth * room)
    prompt = head + filler[:at] + said + filler[: room - at] + tail
    begin = len(head) + at
    return Passkey(prompt, encode(f" {key}"), key, (begin, begin + len(said)))
