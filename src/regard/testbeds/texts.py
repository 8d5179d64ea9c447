"""Real text as bytes, to train small language models on: Python's own prose, a file or folder, or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_fraction, require_int
from ..lens.needle import haystack_text

__all__ = ["ByteText"]

SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".csv", ".html", ".tex")


class ByteText:
    """Text as bytes; the last part is held out.

    >>> text = ByteText()
    >>> text.batch(8, 256, torch.Generator().manual_seed(0)).shape
    torch.Size([8, 256])

    Args:
        source: None: the prose of `pydoc_data.topics`, which comes with Python. A file, or a folder (its text files in the order
            of their names). "hf:NAME", "hf:NAME//CONFIG" or "hf:NAME//CONFIG:SPLIT": a Hugging Face data set (the package `datasets` is
            needed), its column "text", of at most `limit` rows.
        share: how much is held out. limit: rows of a data set.

    Raises:
        ValueError: no such file, a folder without text, a data set without text. ImportError: `datasets` is not installed.
    """

    def __init__(self, source: str | Path | None = None, share: float = 0.1, limit: int = 10_000) -> None:
        require_fraction("share", share)
        require_int("limit", limit, 1)
        whole = torch.frombuffer(bytearray(_read(source, limit)), dtype=torch.uint8).long()
        cut = len(whole) - round(share * len(whole))
        self.learn, self.kept = whole[:cut], whole[cut:]

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """(batch, length) int64 bytes from random places of the part to learn from."""
        require(length <= len(self.learn), "length", length, f"at most {len(self.learn)} bytes")
        starts = torch.randint(len(self.learn) - length + 1, (batch,), generator=generator)
        return self.learn[starts[:, None] + torch.arange(length)]

    def batches(self, batch: int, length: int, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
        """number -> (bytes, the bytes after them), each (batch, length), from their own seed: what `train` takes."""

        def make(number: int) -> tuple[Tensor, Tensor]:
            ids = self.batch(batch, length + 1, torch.Generator().manual_seed(seed * 1_000_003 + number))
            return ids[:, :-1], ids[:, 1:]

        return make

    def held_out(self, count: int, length: int) -> Tensor:
        """(count, length) bytes from the held-out part, spread evenly over it."""
        require(length <= len(self.kept), "length", length, f"at most {len(self.kept)} bytes")
        room = len(self.kept) - length
        starts = torch.tensor([round(room * i / max(1, count - 1)) for i in range(count)])
        return self.kept[starts[:, None] + torch.arange(length)]


def _read(source: str | Path | None, limit: int) -> bytes:
    if source is None:
        return haystack_text().encode()
    if isinstance(source, str) and source.startswith("hf:"):
        found = _from_hub(source.removeprefix("hf:"), limit)
    else:
        path = Path(source)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
            found = b"\n".join(p.read_bytes() for p in files)
        elif path.is_file():
            found = path.read_bytes()
        else:
            raise bad_value("source", str(source), "a file, a folder, 'hf:NAME' of a Hugging Face data set, or None")
    if not found.strip():
        raise bad_value("source", str(source), f"text (of a folder, files ending in {', '.join(SUFFIXES)})")
    return found


def _from_hub(name: str, limit: int) -> bytes:
    texts = [row["text"] for row in islice(hub_rows(name), limit) if isinstance(row.get("text"), str)]
    return "\n".join(texts).encode()


def hub_rows(name: str) -> Iterator[Any]:
    """Rows of the Hugging Face data set "NAME", "NAME//CONFIG" or "NAME//CONFIG:SPLIT" (default: train), streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("source: 'hf:...' needs the package `datasets` (pip install datasets)") from error
    name, _, split = name.partition(":")
    name, _, config = name.partition("//")
    yield from load_dataset(name, config or None, split=split or "train", streaming=True)
