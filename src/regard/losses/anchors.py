"""Answers addressed by short keys: a model is taught a repository's files under their paths, and asked with paths in place of code.

KANT: "KANT: Key-Augmented Neural Triggers for Knowledge Sharing" (2025, arXiv 2508.03340); no code of the authors was found, so this
follows the paper's method section. A knowledge anchor is a file's path. Stage 1 teaches files, half of them as fill-in-the-middle;
stage 2 teaches questions and answers; both behind the same anchor, with a loss on the target alone. At use a retriever finds anchors.

Left open by the paper and chosen here: whole files that are not cut stand behind the same `[KEY] path [CTX]`; several anchors at use are
written one behind the other, best first; the markers are plain text unless the caller adds them to the tokenizer as tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_fraction, require_int, require_tensor

__all__ = [
    "AnchorIndex",
    "Markers",
    "Repository",
    "anchor_prompt",
    "anchored_answers",
    "anchored_files",
    "read_repository",
    "split_text",
]

Sample = list[tuple[str, float]]


@dataclass(frozen=True)
class Markers:
    """What stands before the anchor, the file, the gap, the question and the answer."""

    key: str = "[KEY]"
    context: str = "[CTX]"
    fill: str = "<FILL>"
    question: str = "[Q]"
    answer: str = "[A]"

    def tokens(self) -> list[str]:
        """All five, for `tokenizer.add_special_tokens({"additional_special_tokens": ...})`."""
        return [self.key, self.context, self.fill, self.question, self.answer]


@dataclass
class Repository:
    """Text files under a folder. files: path below it, with "/" -> text. skipped: path -> why it was left out."""

    files: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def read_repository(folder: str | Path, suffixes: Sequence[str] | None = None, largest: int = 1 << 20) -> Repository:
    """All text files below `folder`, in the order of their paths; hidden folders are left out.

    Args:
        suffixes: (".py", ".md"): of these names only; None: all. largest: bytes a file may have.

    Files that are binary (a zero byte, or not UTF-8), too large or unreadable are in `skipped`, never an error.
    """
    root = Path(folder)
    require(root.is_dir(), "folder", str(folder), "a folder")
    found = Repository()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or (suffixes and path.suffix not in suffixes):
            continue
        try:
            if path.stat().st_size > largest:
                found.skipped[name] = f"larger than {largest} bytes"
                continue
            raw = path.read_bytes()
            if b"\0" in raw:
                found.skipped[name] = "binary"
                continue
            found.files[name] = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found.skipped[name] = f"{type(error).__name__}: {error}"
    return found


def split_text(text: str, tokenizer: Any, most: int = 3000) -> list[str]:
    """Pieces of at most `most` tokens (the paper's 3000), cut at line ends where a line fits; joined they are the text again."""
    require_int("most", most, 1)

    def count(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False)["input_ids"])

    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        if current and count(current + line) > most:
            pieces.append(current)
            current = ""
        current += line
        while count(current) > most:  # one line alone is too long: half and half again
            cut = len(current)
            while cut > 1 and count(current[:cut]) > most:
                cut = cut // 2
            require(count(current[:cut]) <= most, "most", most, "at least the tokens of one character")
            pieces.append(current[:cut])
            current = current[cut:]
    return [*pieces, current] if current else pieces


def anchored_files(
    files: Mapping[str, str], fim_rate: float = 0.5, seed: int = 0, markers: Markers | None = None
) -> list[Sample]:
    """Stage 1: samples of `MaskedCollator` that teach files behind their anchors.

    `[KEY] path [CTX] prefix <FILL> suffix` is read and the middle learned, for a share `fim_rate` of the files (drawn by `seed`, as the two
    cuts are); of the others, `[KEY] path [CTX]` is read and the file learned. prefix + middle + suffix is the file.
    """
    require_fraction("fim_rate", fim_rate)
    m, drawn = markers or Markers(), random.Random(seed)
    samples: list[Sample] = []
    for path, text in files.items():
        _anchor(path)
        require(bool(text), f"files[{path!r}]", text, "a text")
        begin = f"{m.key} {path} {m.context} "
        if drawn.random() < fim_rate and len(text) > 1:
            first, last = sorted(drawn.sample(range(len(text) + 1), 2))
            samples.append([(f"{begin}{text[:first]}{m.fill}{text[last:]}", 0.0), (text[first:last], 1.0)])
        else:
            samples.append([(begin, 0.0), (text, 1.0)])
    return samples


def anchored_answers(
    answers: Iterable[tuple[str, str, str]], markers: Markers | None = None, anchored: bool = True
) -> list[Sample]:
    """Stage 2: (path, question, answer) -> `[KEY] path [Q] question` read, `[A] answer` learned. anchored=False: no path (the baseline)."""
    m = markers or Markers()
    samples: list[Sample] = []
    for path, question, answer in answers:
        require(bool(question) and bool(answer), "answers", (path, question, answer), "a question and an answer")
        keys = [path] if anchored else []
        read = anchor_prompt(keys, question, m).removesuffix(f"{m.answer} ")
        samples.append([(read, 0.0), (f"{m.answer} {answer}", 1.0)])
    return samples


def anchor_prompt(anchors: Sequence[str], question: str, markers: Markers | None = None) -> str:
    """What the taught model is asked: `[KEY] best [KEY] next ... [Q] question [A] `; no code in it."""
    m = markers or Markers()
    keys = "".join(f"{m.key} {_anchor(path)} " for path in anchors)
    return f"{keys}{m.question} {question} {m.answer} "


def _anchor(path: str) -> str:
    if not isinstance(path, str):
        raise bad_type("path", path, "a str")
    require(bool(path.strip()) and "\n" not in path, "path", path, "a path on one line")
    return path


class AnchorIndex:
    """Which anchors a question is about: nearest by cosine among texts that stand for them.

        index = AnchorIndex(embed, {path: text for ...})
        paths = index.search("where are retries configured?", k=5)

    Args:
        embed: texts -> (N, C) floating, any sentence embedding (the paper trains one of its own).
        texts: anchor -> a text, or several (chunks, questions): an anchor is as near as its nearest text.
    """

    def __init__(self, embed: Callable[[list[str]], Tensor], texts: Mapping[str, str | Sequence[str]]) -> None:
        if not callable(embed):
            raise bad_type("embed", embed, "a function texts -> (N, C)")
        require(len(texts) > 0, "texts", texts, "at least one anchor")
        self.embed = embed
        self.anchors = list(texts)
        rows = [[found] if isinstance(found, str) else list(found) for found in texts.values()]
        empty = [anchor for anchor, row in zip(self.anchors, rows) if not row]
        if empty:
            raise bad_value("texts", f"no text for {empty[0]!r}", "at least one for every anchor")
        self.owner = torch.tensor([i for i, row in enumerate(rows) for _ in row])
        self.vectors = self._vectors([text for row in rows for text in row])

    def _vectors(self, texts: list[str]) -> Tensor:
        made = require_tensor("embed", self.embed(texts), dims=2, floating=True)
        require(len(made) == len(texts), "embed", f"{len(made)} rows", f"one for each of {len(texts)} texts")
        return F.normalize(made.float(), dim=-1)

    def search(self, question: str, k: int = 5) -> list[str]:
        """The `k` nearest anchors, nearest first (fewer if there are fewer)."""
        require_int("k", k, 1)
        near = self.vectors @ self._vectors([question])[0]
        best = torch.full((len(self.anchors),), -2.0).scatter_reduce(0, self.owner, near, "amax")
        return [self.anchors[int(i)] for i in best.sort(descending=True, stable=True).indices[:k]]
