"""Key-value recall prompts: a JSON object of random keys and sentences, solved examples, and one more key to answer for.

The probe set of AttentionInfluence (Hua et al. 2025, arXiv 2505.07293), from which its retrieval heads are read. The paper takes 800
prompts of close to 4096 tokens with sentences from web text; the sentences here are of Python's own prose unless others are given.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import require, require_int
from .._prose import haystack_text
from ..integrations.spans import find_text, token_offsets
from .needle import Needle, NeedleSample

__all__ = ["KeyValueProbes"]

_SIGNS = string.ascii_letters + string.digits
INSTRUCTION = "Below is a JSON object. Extract the value of the key that is asked for, and write the value alone.\n\n"


@dataclass
class KeyValueProbes:
    """Prompts to find retrieval heads with: iterate `samples(tokenizer)`, or hand `list(...)` of them to `retrieval_heads`.

        probes = KeyValueProbes(count=20, max_tokens=1024)
        scores = regard.lens.retrieval_heads(model, tokenizer, probes.samples(tokenizer), count="set", decode="forced")

    Args:
        count: how many prompts (the paper: 800). max_tokens: longest prompt with its answer; as many pairs as fit (the paper: 4096).
        shots: solved examples before the question. key_len: characters of a key.
        sentences: what values are drawn from; None = sentences of `haystack_text()`. value_tokens: longest value.
        seed: of everything drawn.
    """

    count: int = 20
    max_tokens: int = 1024
    shots: int = 3
    key_len: int = 32
    sentences: Sequence[str] | None = None
    value_tokens: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("max_tokens", 64), ("shots", 0), ("key_len", 1), ("value_tokens", 1)):
            require_int(name, getattr(self, name), least)

    def __len__(self) -> int:
        return self.count

    def samples(self, tokenizer: Any) -> Iterator[NeedleSample]:
        """The prompts. `ValueError` where `max_tokens` has no room for the examples and the question, or no sentence is short enough."""
        given = _sentences() if self.sentences is None else list(self.sentences)
        values = [text for text in dict.fromkeys(given) if len(_ids(tokenizer, text)) <= self.value_tokens]
        need = f"more than {self.shots + 1} sentences of at most {self.value_tokens} tokens"
        require(len(values) > self.shots + 1, "sentences", f"{len(values)} that fit", need)
        for number in range(self.count):
            yield self._sample(tokenizer, values, random.Random(f"{self.seed} {number}"), number)

    def _sample(self, tokenizer: Any, values: list[str], rng: random.Random, number: int) -> NeedleSample:
        order = rng.sample(values, len(values))
        keys = ["".join(rng.choices(_SIGNS, k=self.key_len)) for _ in order]
        pairs = list(zip(keys, order))
        asked = pairs[: self.shots + 1]  # these have to be there; the others fill up
        least = self._text(asked, asked)
        room = self.max_tokens - len(_ids(tokenizer, least + " " + asked[-1][1]))
        require(room >= 0, "max_tokens", self.max_tokens, f"at least {self.max_tokens - room} for this many examples")
        kept = list(asked)
        for pair in pairs[len(asked) :]:
            size = len(_ids(tokenizer, json.dumps({pair[0]: pair[1]}))) + 1
            if size > room:
                break
            room -= size
            kept.append(pair)
        rng.shuffle(kept)
        text = self._text(kept, asked)
        key, value = asked[-1]
        ids, offsets = token_offsets(tokenizer, text)
        begin = find_text(text, f"{json.dumps(key)}: ")[1] + 1  # behind the value's opening quote
        end = begin + len(json.dumps(value)) - 2
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
        needle = Needle(f"{key}: {value}", key, value)
        span = (inside[0], inside[-1] + 1)
        return NeedleSample(torch.tensor([ids]), span, needle, self.max_tokens, 100.0 * inside[0] / len(ids), text)

    def _text(self, kept: list[tuple[str, str]], asked: list[tuple[str, str]]) -> str:
        shown = [f"key: {key}\nanswer: {value}\n\n" for key, value in asked[:-1]]
        return f"{INSTRUCTION}{json.dumps(dict(kept))}\n\n{''.join(shown)}key: {asked[-1][0]}\nanswer:"


def _sentences() -> list[str]:
    found = re.split(r"(?<=[a-z]\.)\s+", haystack_text())
    return [text for text in found if 20 <= len(text) <= 160 and text[0].isupper() and text.isascii()]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
