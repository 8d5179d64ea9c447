"""Needle in a haystack: prompts that hide a sentence in long text and ask for it, with the token span where it hides.

The protocol is that of Wu et al. 2024 (016, arXiv 2404.15574), after Kamradt's test: haystack text is cut to the context length
less a reserve, the needle goes in at a depth, moved back to the end of a sentence, and a question follows. What differs from the
authors' script: needles and text are ours; special tokens appear once, at the start of the prompt, where theirs end up inside the
text too; the needle is found by character offsets where the tokenizer has them (`find_span` is their way).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name
from .._prose import haystack_text

__all__ = ["NEEDLES", "Needle", "NeedleHaystack", "NeedleSample", "find_span", "haystack_text"]

QUESTION = "Based on the content of the book, Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the question that asks for it, and the part of the sentence that answers it, word for word."""

    text: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        require(
            bool(self.answer) and self.answer in self.text, "answer", self.answer, f"a part of the needle {self.text!r}"
        )


NEEDLES = (
    Needle(
        "The best thing to do in Lisbon is to ride the yellow tram uphill and eat a warm custard tart by the river.",
        "What is the best thing to do in Lisbon?",
        "ride the yellow tram uphill and eat a warm custard tart by the river",
    ),
    Needle(
        "The secret ingredient of the pastry chef's famous cake is a spoonful of roasted cardamom with a pinch of grey sea salt.",
        "What is the secret ingredient of the pastry chef's famous cake?",
        "a spoonful of roasted cardamom with a pinch of grey sea salt",
    ),
    Needle(
        "The favourite hobby of the retired astronaut is painting small wooden boats and flying paper kites near the harbour.",
        "What is the favourite hobby of the retired astronaut?",
        "painting small wooden boats and flying paper kites near the harbour",
    ),
)
"""The default needles."""


def find_span(
    prompt_ids: Tensor | Sequence[int], needle_ids: Sequence[int], variant: str = "released"
) -> tuple[int, int]:
    """Where the needle's tokens stand in the prompt, [start, end); (-1, -1) if nowhere.

    Args:
        variant: "released": the authors' rule, the first window of the needle's length that holds more than 0.9 of its distinct
            tokens, in any order (which forgives a first token that merged with a space; it can begin early, and at the end of the
            prompt the window may stick out). "exact": the first place where the tokens stand as they are.
    """
    require_name("variant", variant, ("released", "exact"))
    prompt, needle = [int(i) for i in prompt_ids], [int(i) for i in needle_ids]
    require(bool(needle), "needle_ids", needle, "at least one token")
    length, wanted = len(needle), set(needle)
    for start in range(len(prompt)):
        window = prompt[start : start + length]
        found = window == needle if variant == "exact" else len(wanted.intersection(window)) / len(wanted) > 0.9
        if found:
            return start, start + length
    return -1, -1


@dataclass(frozen=True)
class NeedleSample:
    """One prompt.

    Attributes:
        input_ids: (1, T). span: [start, end) of the answer's tokens in it. needle: what was hidden. length: context tokens asked
            for. depth: in percent. text: the prompt as text.
    """

    input_ids: Tensor
    span: tuple[int, int]
    needle: Needle
    length: int
    depth: float
    text: str

    @property
    def answer_ids(self) -> Tensor:
        """The answer's tokens as they stand in the prompt, (n,)."""
        return self.input_ids[0, self.span[0] : self.span[1]]


@dataclass
class NeedleHaystack:
    """A grid of needle-in-a-haystack prompts: every needle at every context length and depth.

        for sample in NeedleHaystack(lengths=(512, 1024)).samples(tokenizer): ...

    Args:
        needles: what to hide.
        text: the haystack, repeated as needed; None = `haystack_text()`.
        lengths: context lengths in tokens (haystack with needle, and `reserve` besides). depths: in percent, 0 = start, 100 = end.
        reserve: tokens kept free for question and answer.
        question: template of what follows the text; `{question}` is filled in.
        chat: put the whole into the tokenizer's chat template, as a user's message, as the authors do for chat models. None: where
            the tokenizer has one.
        find: how the answer's tokens are found: "offsets" (by character, exact; needs a fast tokenizer), or a variant of `find_span`.
    """

    needles: Sequence[Needle] = NEEDLES
    text: str | None = None
    lengths: Sequence[int] = (256, 512)
    depths: Sequence[float] = (20, 80)
    reserve: int = 50
    question: str = QUESTION
    chat: bool | None = None
    find: str = "offsets"

    def __post_init__(self) -> None:
        require_int("reserve", self.reserve)
        require_name("find", self.find, ("offsets", "released", "exact"))
        for depth in self.depths:
            require(0 <= depth <= 100, "depths", depth, "percentages in [0, 100]")
        require("{question}" in self.question, "question", self.question, "a template with {question}")

    @classmethod
    def paper(cls, shortest: int = 1000, longest: int = 50000, **options: Any) -> NeedleHaystack:
        """The authors' grid: 20 lengths x 10 depths, evenly spread, 200 tokens in reserve (with 3 needles: 600 runs)."""
        lengths = [round(shortest + (longest - shortest) * i / 19) for i in range(20)]
        return cls(lengths=lengths, depths=[round(100 * i / 9) for i in range(10)], **{"reserve": 200, **options})

    def __len__(self) -> int:
        return len(self.needles) * len(self.lengths) * len(self.depths)

    def samples(self, tokenizer: Any) -> Iterator[NeedleSample]:
        """The prompts, needle by needle, length by length."""
        for needle in self.needles:
            for length in self.lengths:
                for depth in self.depths:
                    yield self.sample(tokenizer, needle, length, depth)

    def sample(self, tokenizer: Any, needle: Needle, length: int, depth: float) -> NeedleSample:
        """One prompt. Raises `ValueError` if the length leaves no room for text, or the answer's tokens cannot be found."""
        context = self._context(tokenizer, needle, length, depth)
        text = context + self.question.format(question=needle.question)
        chat = getattr(tokenizer, "chat_template", None) is not None if self.chat is None else self.chat
        if chat:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        fast = getattr(tokenizer, "is_fast", False)
        encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=fast)
        ids = encoded["input_ids"]
        if self.find == "offsets" and fast:
            span = _span_by_offsets(text, needle, encoded["offset_mapping"])
        else:
            wanted = tokenizer(needle.answer, add_special_tokens=False)["input_ids"]
            span = find_span(ids, wanted, "released" if self.find == "offsets" else self.find)
        if span[0] < 0:
            raise bad_value("needle", needle.answer, f"an answer whose tokens stand in the prompt (find={self.find!r})")
        return NeedleSample(torch.tensor([ids]), span, needle, length, depth, text)

    def _context(self, tokenizer: Any, needle: Needle, length: int, depth: float) -> str:
        """The haystack with the needle in it."""

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        inserted = encode(f"\n{needle.text}\n")
        room = length - self.reserve - len(inserted)
        require(room > 0, "lengths", length, f"more than {self.reserve + len(inserted)} tokens (reserve and needle)")
        hay = _haystack_ids(tokenizer, haystack_text() if self.text is None else self.text, room)
        if depth == 100:
            ids = hay + inserted
        else:
            at = int(len(hay) * depth / 100)
            while at > 0 and not tokenizer.decode(hay[at - 1 : at]).rstrip().endswith("."):
                at -= 1
            ids = hay[:at] + inserted + hay[at:]
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False) + "\n"


def _haystack_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` tokens of the text, repeated as often as it takes."""
    require(bool(text.strip()), "text", text, "some text")
    part = text[: count * 12]
    ids: list[int] = []
    while len(ids) < count:
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        part = part + "\n" + (text if len(part) >= len(text) else text[: 2 * len(part)])
    return ids[:count]


def _span_by_offsets(text: str, needle: Needle, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Tokens that hold characters of the answer."""
    sentence = text.find(needle.text)
    begin = -1 if sentence < 0 else sentence + needle.text.index(needle.answer)
    if begin < 0:
        begin = text.find(needle.answer)
    if begin < 0:
        return -1, -1
    end = begin + len(needle.answer)
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
    return (inside[0], inside[-1] + 1) if inside else (-1, -1)
