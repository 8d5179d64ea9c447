"""Labelled texts to classify: planted ones whose deciding words are known, real ones that come with Python, and one's own.

`planted_sentiment` says which words decide, so that attention can be held to the truth; `python_docs` sorts docstrings
of the standard library by the corner they come from; `load_texts` reads files, folders and Hugging Face data sets.
"""

from __future__ import annotations

import ast
import csv
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_fraction, require_int
from .texts import hub_rows

__all__ = [
    "LabelledTexts",
    "TextBatch",
    "Vocabulary",
    "load_texts",
    "planted_sentiment",
    "python_docs",
    "text_batch",
    "text_batches",
    "words_of",
]

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|[0-9]+|[^\sA-Za-z0-9]")


def words_of(text: str) -> list[str]:
    """Lower-case words, numbers and single marks."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one class each.

    Attributes:
        texts: lists of words. labels: class numbers, one a text. names: of the classes, in order.
        rationales: for each text, which words decide its class (booleans); None where nobody knows. skipped: rows of the source that
            could not be read.

    Raises:
        ValueError: no text; texts of one class only; a text without words; labels or rationales that do not fit.
    """

    texts: Sequence[Sequence[str]]
    labels: Sequence[int]
    names: tuple[str, ...]
    rationales: Sequence[Sequence[bool]] | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        require(len(self.texts) > 0, "texts", "none", "at least one text of each of two classes")
        require(
            len(self.labels) == len(self.texts),
            "labels",
            f"{len(self.labels)} labels",
            f"{len(self.texts)}, one a text",
        )
        known = range(len(self.names))
        require(
            all(label in known for label in self.labels),
            "labels",
            sorted(set(self.labels)),
            f"class numbers below {len(known)}",
        )
        if len(set(self.labels)) < 2:
            only = self.names[self.labels[0]]
            raise bad_value(
                "labels", f"one class only ({only!r}, {len(self.labels)} texts)", "texts of at least two classes"
            )
        empty = [i for i, text in enumerate(self.texts) if not text]
        require(not empty, "texts", f"text {empty[:1]} without a word", "words in each")
        if self.rationales is not None:
            fits = [len(r) for r in self.rationales] == [len(text) for text in self.texts]
            require(fits, "rationales", "other lengths than the texts", "one boolean a word")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Iterable[int]) -> LabelledTexts:
        """The texts at these places, in that order."""
        places = list(places)
        rationales = None if self.rationales is None else [self.rationales[i] for i in places]
        return replace(
            self, texts=[self.texts[i] for i in places], labels=[self.labels[i] for i in places], rationales=rationales
        )

    def split(self, share: float = 0.2, seed: int = 0) -> tuple[LabelledTexts, LabelledTexts]:
        """(rest, held out): `share` of each class is held out, at least one text; which ones follows from the seed."""
        require_fraction("share", share)
        shuffled = list(range(len(self)))
        random.Random(seed).shuffle(shuffled)
        by_class: dict[int, list[int]] = {}
        for place in shuffled:
            by_class.setdefault(self.labels[place], []).append(place)
        held = {place for places in by_class.values() for place in places[: max(1, round(share * len(places)))]}
        return self.take(i for i in shuffled if i not in held), self.take(i for i in shuffled if i in held)


class Vocabulary:
    """Words to numbers: 0 is padding, 1 any unknown word, then the known ones by their frequency.

    min_count: fewer occurrences than that are unknown. max_size: numbers at most, those two included.
    """

    PAD, UNKNOWN = 0, 1

    def __init__(self, texts: Iterable[Sequence[str]], min_count: int = 1, max_size: int = 20_000) -> None:
        require_int("min_count", min_count, 1)
        require_int("max_size", max_size, 3)
        counts = Counter(word for text in texts for word in text)
        kept = [word for word, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if count >= min_count]
        self.words = ["<pad>", "<unk>", *kept[: max_size - 2]]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: Sequence[str]) -> list[int]:
        return [self.numbers.get(word, self.UNKNOWN) for word in text]


@dataclass(frozen=True)
class TextBatch:
    """A padded batch: `model(**batch.inputs)` and `batch.labels`.

    Attributes:
        input_ids, attention_mask: (B, T), int64. labels: (B,). rationales: (B, T) bool, or None. places: (B,), which texts these are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rationales: Tensor | None
    places: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def text_batch(
    data: LabelledTexts, vocabulary: Vocabulary, places: Sequence[int] | None = None, max_len: int = 256
) -> TextBatch:
    """Texts at `places` (default all), cut to `max_len` words and padded behind."""
    places = range(len(data)) if places is None else places
    rows = [vocabulary.encode(data.texts[i][:max_len]) for i in places]
    require(bool(rows), "places", "none", "at least one text")
    length = max(len(row) for row in rows)

    def padded(lists: Iterable[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (length - len(row))] for row in lists], dtype=torch.int64)

    why = data.rationales
    marks = None if why is None else padded([[int(mark) for mark in why[i][:max_len]] for i in places]).bool()
    labels = torch.tensor([data.labels[i] for i in places])
    return TextBatch(padded(rows), padded([[1] * len(row) for row in rows]), labels, marks, torch.tensor(list(places)))


def text_batches(
    data: LabelledTexts, vocabulary: Vocabulary, batch: int = 32, max_len: int = 256, seed: int = 0
) -> Callable[[int], TextBatch]:
    """number -> batch: epoch after epoch, each in an order of its own; the same batch for the same number."""
    require_int("batch", batch, 1)
    per_epoch = -(-len(data) // batch)

    @cache
    def order(epoch: int) -> list[int]:
        places = list(range(len(data)))
        random.Random(seed * 1_000_003 + epoch).shuffle(places)
        return places

    def make(number: int) -> TextBatch:
        epoch, place = divmod(number, per_epoch)
        return text_batch(data, vocabulary, order(epoch)[place * batch : (place + 1) * batch], max_len)

    return make


def planted_sentiment(
    count: int = 1000,
    classes: int = 2,
    length: tuple[int, int] = (8, 24),
    cues: int = 8,
    fill: int = 200,
    *,
    planted: int = 1,
    decoy: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> LabelledTexts:
    """Filler words with `planted` cue words of the text's class among them; the rationale marks those.

    Args:
        count: texts, classes evenly. length: fewest and most words. cues: different cue words a class. fill: different filler words.
        decoy: share of texts that also hold the word "decoy<class>", which goes with their class but is not marked: what a lazy model
            learns, and what PSSAttention (166) is against. noise: share of texts with a random label.
    """
    for name, value, least in (("count", count, 2), ("classes", classes, 2), ("cues", cues, 1), ("fill", fill, 1)):
        require_int(name, value, least)
    low, high = length
    require(2 <= planted + 1 <= low <= high, "length", length, f"fewest > planted ({planted}), and at most the most")
    require_fraction("decoy", decoy)
    require_fraction("noise", noise)
    draw = random.Random(seed)
    texts, labels, rationales = [], [], []
    for number in range(count):
        label = number % classes
        words = [f"word{draw.randrange(fill)}" for _ in range(draw.randint(low, high))]
        places = draw.sample(range(len(words)), planted + 1)
        if draw.random() < decoy:
            words[places[-1]] = f"decoy{label}"
        for place in places[:planted]:
            words[place] = f"cue{label}x{draw.randrange(cues)}"
        marks = [place in places[:planted] for place in range(len(words))]
        texts.append(words)
        labels.append(draw.randrange(classes) if draw.random() < noise else label)
        rationales.append(marks)
    return LabelledTexts(texts, labels, tuple(f"class{c}" for c in range(classes)), rationales)


CORNERS: dict[str, tuple[str, ...]] = {
    "concurrency": (
        "asyncio",
        "concurrent",
        "multiprocessing",
        "threading.py",
        "queue.py",
        "sched.py",
        "subprocess.py",
    ),
    "network": ("http", "urllib", "email", "smtplib.py", "ftplib.py", "imaplib.py", "socket.py", "ssl.py", "xmlrpc"),
    "numbers": (
        "statistics.py",
        "fractions.py",
        "_pydecimal.py",
        "random.py",
        "numbers.py",
        "colorsys.py",
        "calendar.py",
        "_pydatetime.py",
        "datetime.py",
    ),
    "testing": ("unittest", "doctest.py", "pdb.py", "bdb.py", "traceback.py", "trace.py", "inspect.py"),
    "files": (
        "os.py",
        "shutil.py",
        "pathlib",
        "pathlib.py",
        "tarfile.py",
        "zipfile",
        "zipfile.py",
        "tempfile.py",
        "glob.py",
        "posixpath.py",
    ),
}
"""Corners of the standard library: class name -> its files and folders."""


def python_docs(
    names: Sequence[str] = ("concurrency", "network"), length: tuple[int, int] = (8, 60), *, drop: Iterable[str] = ()
) -> LabelledTexts:
    """Docstrings of the running Python's standard library, classified by their corner of it (`CORNERS`): real text on every machine.

    Args:
        names: classes. length: shorter docstrings are left out, longer ones cut. drop: words to leave out (the names of modules, say).

    Nothing is imported; the sources are read. How many there are depends on Python's version (a few hundred a class).
    """
    unknown = [name for name in names if name not in CORNERS]
    require(not unknown, "names", unknown, f"some of {sorted(CORNERS)}")
    low, high = length
    require(1 <= low <= high, "length", length, "1 <= fewest <= most")
    gone, home = set(drop), Path(sysconfig.get_paths()["stdlib"])
    texts, labels, seen = [], [], set()
    for label, name in enumerate(names):
        for part in CORNERS[name]:
            for doc in _docstrings(home / part):
                words = [word for word in words_of(doc) if word not in gone][:high]
                key = tuple(words)
                if len(words) >= low and key not in seen:
                    seen.add(key)
                    texts.append(words)
                    labels.append(label)
    return LabelledTexts(texts, labels, tuple(names))


def _docstrings(path: Path) -> Iterator[str]:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        if "test" in file.parts or "tests" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                if doc:
                    yield "\n".join(line for line in doc.splitlines() if not line.lstrip().startswith((">>>", "...")))


def load_texts(source: str | Path, text: str = "text", label: str = "label", limit: int = 100_000) -> LabelledTexts:
    """Labelled texts of one's own.

    Args:
        source: a .csv, .tsv, .jsonl or .json file (a list of objects) with a column or key for each; a folder that holds one folder
            of .txt files a class; or "hf:NAME", "hf:NAME//CONFIG", "hf:NAME//CONFIG:SPLIT" (the package `datasets` is needed).
        text, label: names of the two columns. limit: rows at most.

    Rows that lack one of the two, have no word, or cannot be parsed are left out and counted in `skipped`. Classes are numbered by the
    order of their names (numbers by their size).

    Raises:
        ValueError: no such source, another kind of file, nothing readable, or one class only. ImportError: `datasets` is not installed.
    """
    require_int("limit", limit, 1)
    rows = islice(_rows(source, text, label), limit)
    texts, found, skipped = [], [], 0
    for row in rows:
        body, name = (row.get(text), row.get(label)) if isinstance(row, Mapping) else (None, None)
        words = words_of(body) if isinstance(body, str) else []
        if not words or name is None or name == "":
            skipped += 1
            continue
        texts.append(words)
        found.append(name)
    if not texts:
        raise bad_value("source", str(source), f"rows with {text!r} and {label!r} ({skipped} rows had not both)")
    try:
        kinds = sorted(set(found), key=float)
    except (TypeError, ValueError):
        kinds = sorted(set(found), key=str)
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return LabelledTexts(texts, [numbers[name] for name in found], tuple(str(kind) for kind in kinds), skipped=skipped)


def _rows(source: str | Path, text: str, label: str) -> Iterator[Any]:
    if isinstance(source, str) and source.startswith("hf:"):
        yield from hub_rows(source.removeprefix("hf:"))
        return
    if not isinstance(source, (str, Path)):
        raise bad_type("source", source, "a path or 'hf:NAME'")
    path = Path(source)
    if path.is_dir():
        for folder in sorted(p for p in path.iterdir() if p.is_dir()):
            for file in sorted(folder.rglob("*.txt")):
                yield {text: file.read_text(encoding="utf-8", errors="replace"), label: folder.name}
    elif path.is_file() and path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            yield from csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
    elif path.is_file() and path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as stream:
            yield from (_parsed(line) for line in stream if line.strip())
    elif path.is_file() and path.suffix == ".json":
        listed = _parsed(path.read_text(encoding="utf-8", errors="replace"))
        require(isinstance(listed, list), "source", str(path), "a JSON list of objects")
        yield from listed
    else:
        need = "a .csv, .tsv, .jsonl or .json file, a folder of folders, or 'hf:NAME' of a Hugging Face data set"
        raise bad_value("source", str(source), need)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
