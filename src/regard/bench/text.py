"""Prompts made of real text that every machine has: the English prose of `pydoc_data.topics`, shipped with CPython."""

from __future__ import annotations

from typing import Any

from .._checks import require
from ..lens.needle import haystack_text

NEEDLES = (
    ("The secret ingredient of the pastry chef's famous cake is", " cardamom", "pastry chef's famous cake"),
    ("The password that opens the old lighthouse door is", " marigold", "old lighthouse door"),
    ("The favourite animal of the retired astronaut is the", " otter", "retired astronaut"),
)
"""Needles: a sentence, its answer, what it is about."""


def token_windows(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """`count` different pieces of the prose, `length` tokens each, spread over the whole."""
    ids = _prose_ids(tokenizer)
    need = f"at most {len(ids)} tokens, which is all the prose there is"
    require(0 < length <= len(ids), "context", length, need)
    room = len(ids) - length
    return [ids[start : start + length] for start in (round(room * i / max(1, count)) for i in range(count))]


_IDS: dict[int, list[int]] = {}


def _prose_ids(tokenizer: Any) -> list[int]:
    if id(tokenizer) not in _IDS:
        _IDS.clear()
        _IDS[id(tokenizer)] = tokenizer(haystack_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return _IDS[id(tokenizer)]


def needle_prompt(tokenizer: Any, context: int, depth: float, number: int = 0) -> tuple[list[int], list[int]]:
    """A prompt of `context` tokens that hides a needle at `depth` (0 = start, 1 = end) and then asks for it; and its answer.

    The prompt is prose, the needle sentence with its answer, more prose, and the needle sentence again without the answer: a
    model completes it, so base models can be asked too.
    """
    require(0.0 <= depth <= 1.0, "depth", depth, "a number in [0, 1]")
    sentence, answer, _ = NEEDLES[number % len(NEEDLES)]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needle, question, target = encode(f"\n{sentence}{answer}.\n"), encode(f"\n{sentence}"), encode(answer)
    room = context - len(needle) - len(question)
    require(room >= 16, "context", context, f"at least {len(needle) + len(question) + 16} tokens to hide a needle in")
    hay = token_windows(tokenizer, room, len(NEEDLES))[number % len(NEEDLES)]
    at = round(depth * room)
    return hay[:at] + needle + hay[at:] + question, target
