"""What the tasks of `regard compare` ask, for a model that reads English and for the words of the recall testbed.

A prompt is read first, without knowing what will be asked; the questions come afterwards, decoded token by token. That is how a
KV cache meets them in use, and what methods that choose by the prompt's last query would otherwise be spared. (The needle task keeps
its question inside the prompt, as the test is usually given.)
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .._checks import bad_value, require
from ..integrations.spans import SpannedPrompt, chat_spans
from ..testbeds import recall
from .text import NEEDLES, needle_prompt, token_windows

ASKED = ("recall", "tracking", "aggregation")
"""Tasks whose questions follow the prompt."""


@dataclass(frozen=True)
class Asked:
    """A prompt, what is decoded after it, and which tokens of that are answers (bool, one a token)."""

    prompt: list[int]
    continuation: list[int]
    answers: list[bool]


@dataclass(frozen=True)
class Chatted:
    """A conversation under the chat template, the answer to be decoded after it, and whose tokens the prompt's are."""

    prompt: list[int]
    answer: list[int]
    spans: dict[str, torch.Tensor]


class English:
    """Prompts in English, for models of language."""

    tasks = ("ppl", "needle", "agreement", "positions", "chat", *ASKED)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def windows(self, length: int, count: int) -> list[list[int]]:
        return token_windows(self.tokenizer, length, count)

    def needle(self, context: int, depth: float, number: int) -> tuple[list[int], list[int]]:
        return needle_prompt(self.tokenizer, context, depth, number)

    def chat(self, context: int, depth: float, number: int) -> Chatted:
        """Prose with a needle in it and a question, as a user's message, of at most `context` tokens; the answer is begun already.

        Spans: "user", "question", "template" and what else `chat_spans` finds. `ValueError` without a chat template.
        """
        require(0.0 <= depth <= 1.0, "depth", depth, "a number in [0, 1]")
        sentence, answer, about = NEEDLES[number % len(NEEDLES)]
        question = f"What does the text say about the {about}?"

        def made(room: int) -> SpannedPrompt:
            hay, at = token_windows(self.tokenizer, room, len(NEEDLES))[number % len(NEEDLES)], round(depth * room)
            before, after = (self.tokenizer.decode(part).strip() for part in (hay[:at], hay[at:]))
            text = f"{before}\n{sentence}{answer}.\n{after}\n\n{question}"
            return chat_spans(self.tokenizer, [{"role": "user", "content": text}], {"question": question})

        lead = self._encode(sentence)
        taken = made(16).input_ids.shape[1] - 16 + len(lead)
        require(context >= taken + 32, "context", context, f"at least {taken + 32} tokens for this task")
        prompt = made(context - taken - 8)  # decoded and encoded again, prose may take a few tokens more
        spans = {name: torch.nn.functional.pad(span, (0, len(lead))) for name, span in prompt.spans.items()}
        return Chatted(prompt.input_ids[0].tolist() + lead, self._encode(answer), spans)

    def asked(self, task: str, context: int, number: int) -> Asked:
        """The prompt and questions of one of the tasks in `ASKED`; `number` makes it another one."""
        rng = random.Random(f"{task} {number}")
        facts, questions = {"recall": _recall, "tracking": _tracking, "aggregation": _aggregation}[task](rng)
        return self._compose(facts, questions, context, number, rng, noise=task != "aggregation")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _compose(
        self,
        facts: list[str],
        questions: list[tuple[str, str]],
        context: int,
        number: int,
        rng: random.Random,
        noise: bool,
    ) -> Asked:
        pieces = [self._encode(f"\n{fact}\n") for fact in facts]
        taken = sum(map(len, pieces))
        require(context >= taken + 16, "context", context, f"at least {taken + 16} tokens for the facts of this task")
        hay = self.windows(context - taken, 4)[number % 4] if noise else []
        if not noise:  # the list itself is as long as the context
            while sum(map(len, pieces)) < context - 16:
                pieces.append(pieces[len(pieces) % len(facts)])
        cuts = sorted(rng.randrange(len(hay) + 1) for _ in pieces)
        prompt: list[int] = []
        before = 0
        for cut, piece in zip(cuts, pieces):
            prompt += hay[before:cut] + piece
            before = cut
        prompt += hay[before:]
        continuation: list[int] = []
        answers: list[bool] = []
        for question, answer in questions:
            asked, told = self._encode(f"\n{question}"), self._encode(f" {answer}")
            continuation += asked + told
            answers += [False] * len(asked) + [True] * len(told)
        return Asked(prompt[:context], continuation, answers)


_COLOURS = ("red", "blue", "green", "black", "white", "golden", "silver", "purple")
_THINGS = ("fox", "castle", "bridge", "lamp", "boat", "garden", "clock", "tower")
_WORDS = (
    "river",
    "stone",
    "candle",
    "mirror",
    "forest",
    "engine",
    "basket",
    "window",
    "hammer",
    "violin",
    "pepper",
    "ladder",
)


def _recall(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Eight keys with a number each; three are asked for."""
    keys = rng.sample([f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS], 8)
    number = {key: str(rng.randrange(1000, 10000)) for key in keys}
    facts = [f"The secret number of the {key} is {number[key]}." for key in keys]
    return facts, [(f"The secret number of the {key} is", number[key]) for key in rng.sample(keys, 3)]


def _tracking(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Two chains of four assignments; the value at the end of each is asked for, as in RULER's variable tracking."""
    names = rng.sample([f"X{number}" for number in range(10, 100)], 8)
    facts, questions = [], []
    for chain in (names[:4], names[4:]):
        value = str(rng.randrange(10000, 100000))
        facts.append(f"VAR {chain[0]} = {value}")
        facts += [f"VAR {after} = VAR {before}" for before, after in pairwise(chain)]
        questions.append((f"The value of VAR {chain[-1]} is", value))
    order = sorted(range(8), key=lambda i: (i % 4, i // 4))  # links stay in order, chains take turns
    return [facts[i] for i in order], questions


def _aggregation(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """A list in which three words come four times as often as the others, as in RULER's common words."""
    common = rng.sample(_WORDS, 3)
    listed = [word for word in _WORDS for _ in range(4 if word in common else 1)]
    rng.shuffle(listed)
    return [f"{word}" for word in listed], [("The three most common words in the list are", ", ".join(common))]


class Words:
    """Prompts in the words of the recall testbed, which ends where text would begin: no tracking, no aggregation."""

    tasks = ("ppl", "needle", "agreement", "recall")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def windows(self, length: int, count: int) -> list[list[int]]:
        """Words and their copy: what is decoded at the end of a window stands in its prompt."""
        return [
            recall.copy_sample(length, generator=_generator("copy", number)).ids.tolist() for number in range(count)
        ]

    def needle(self, context: int, depth: float, number: int) -> tuple[list[int], list[int]]:
        require(0.0 <= depth <= 1.0, "depth", depth, "a number in [0, 1]")
        sample = recall.recall_sample(context + 1, 1, 1, _generator("needle", number)).ids.tolist()
        key, value = sample[-2], sample[-1]
        at = sample.index(key)
        rest = sample[1:at] + sample[at + 2 : -3]
        cut = round(depth * len(rest))
        return [sample[0], *rest[:cut], key, value, *rest[cut:], recall.ASK, key], [value]

    def chat(self, context: int, depth: float, number: int) -> Chatted:
        raise bad_value("task", "chat", f"one of {', '.join(self.tasks)} for this model")

    def asked(self, task: str, context: int, number: int) -> Asked:
        if task != "recall":
            raise bad_value("task", task, f"one of {', '.join(self.tasks)} for this model")
        queries = 16
        sample = recall.recall_sample(context + 1 + 2 * queries, 64, queries, _generator("recall", number))
        cut = context
        return Asked(sample.ids[:cut].tolist(), sample.ids[cut:].tolist(), sample.answers[cut:].tolist())


def _generator(*key: Any) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(str(key)).randrange(2**31))


def prompts_for(tokenizer: Any) -> English | Words:
    """The prompts that a model with this tokenizer can read."""
    ids: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return Words(tokenizer) if "<ask>" in ids and "<copy>" in ids else English(tokenizer)
