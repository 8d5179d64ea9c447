"""Texts with an aspect whose sentiment is asked for: planted ones, and files in the form that PSSAttention (166) publishes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._checks import bad_value, require, require_fraction, require_int
from .text_classification import LabelledTexts, TextBatch, Vocabulary, text_batch

__all__ = ["AspectTexts", "aspect_batch", "load_aspects", "planted_aspects"]

MARKS = {"/n": 0, "/p": 1, "/0": 2}
NAMES = ("negative", "positive", "neutral")


@dataclass(frozen=True)
class AspectTexts:
    """`data`: texts, labels (and rationales); `aspects`: for each text, which words are the aspect (booleans, at least one true)."""

    data: LabelledTexts
    aspects: Sequence[Sequence[bool]]

    def __post_init__(self) -> None:
        fits = [len(a) for a in self.aspects] == [len(text) for text in self.data.texts]
        require(fits, "aspects", "other lengths than the texts", "one boolean a word")
        none = [i for i, marks in enumerate(self.aspects) if not any(marks)]
        require(not none, "aspects", f"text {none[:1]} without an aspect", "a word of it in each text")

    def __len__(self) -> int:
        return len(self.data)

    def distances(self) -> list[list[int]]:
        """Of each word to the aspect, as the authors count: from its last word before it, from its first word else."""
        made = []
        for marks in self.aspects:
            first = list(marks).index(True)
            last = first + sum(marks) - 1
            made.append([last - place if place < first else place - first for place in range(len(marks))])
        return made


def aspect_batch(
    texts: AspectTexts, vocabulary: Vocabulary, places: Sequence[int] | None = None, max_len: int = 96
) -> tuple[TextBatch, Tensor]:
    """(batch, aspect_mask (B, T) bool): `model(**batch.inputs, aspect_mask=aspect_mask)`."""
    batch = text_batch(texts.data, vocabulary, places, max_len)
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, place in enumerate(batch.places.tolist()):
        marks = torch.tensor(texts.aspects[place][:max_len])
        mask[row, : len(marks)] = marks
    return batch, mask


def load_aspects(path: str | Path, limit: int = 100_000) -> AspectTexts:
    """A file with a text a line, words separated by spaces, the aspect's words ending in /n, /p or /0 (negative, positive, neutral).

    Lines without such a word are left out and counted in `data.skipped`.

    Raises:
        ValueError: no such file, no line with an aspect, one class only.
    """
    path = Path(path)
    require(path.is_file(), "path", str(path), "a file")
    require_int("limit", limit, 1)
    texts, labels, aspects, skipped = [], [], [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[:limit]:
        words = line.split()
        marks = [word[-2:] in MARKS and len(word) > 2 for word in words]
        if not any(marks):
            skipped += bool(words)
            continue
        labels.append(MARKS[words[marks.index(True)][-2:]])
        texts.append([word[:-2] if mark else word for word, mark in zip(words, marks)])
        aspects.append(marks)
    if not texts:
        raise bad_value("path", str(path), "lines with an aspect (words ending in /n, /p or /0)")
    return AspectTexts(LabelledTexts(texts, labels, NAMES, skipped=skipped), aspects)


def planted_aspects(
    count: int = 900,
    length: tuple[int, int] = (8, 16),
    *,
    common: float = 0.7,
    rare: int = 40,
    fill: int = 100,
    seed: int = 0,
) -> AspectTexts:
    """Texts with an aspect word, a sentiment word that decides, and filler.

    Of each class, the deciding word is a common one ("common<c>") in a `common` share of the texts, and one of `rare` rare ones
    ("rare<c>x<i>") in the others, in whose company a "decoy<d>" of a random class stands: what a model learns too much from is the
    common word, what it should also learn the rare ones. The rationale marks the deciding word.
    """
    require_int("count", count, 3)
    require_fraction("common", common)
    low, high = length
    require(4 <= low <= high, "length", length, "at least 4 words")
    draw = random.Random(seed)
    texts, labels, marks, why = [], [], [], []
    for number in range(count):
        label = number % 3
        words = [f"word{draw.randrange(fill)}" for _ in range(draw.randint(low, high))]
        aspect, cue, decoy = draw.sample(range(len(words)), 3)
        words[aspect] = f"aspect{draw.randrange(10)}"
        if draw.random() < common:
            words[cue] = f"common{label}"
        else:
            words[cue] = f"rare{label}x{draw.randrange(rare)}"
            words[decoy] = f"decoy{draw.randrange(3)}"
        texts.append(words)
        labels.append(label)
        marks.append([place == aspect for place in range(len(words))])
        why.append([place == cue for place in range(len(words))])
    return AspectTexts(LabelledTexts(texts, labels, NAMES, why), marks)
