"""Prompt pairs as files: the layout in which Merullo et al. 2023 (arXiv 2310.08744) publish their coloured objects.

Two JSON files of the same length (`datasets/cobjs_data_42.json` and `cobjs_mindiff_data_42.json` in jmerullo/circuit_reuse, MIT):
each a list of [prompt, answer], the answer with its leading space; entry n of the second is the corrupted partner of entry n of
the first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._checks import bad_value, require
from .pairs import PairBatch, encode_pairs

__all__ = ["read_pairs"]


def read_pairs(tokenizer: Any, clean: str | Path, corrupted: str | Path, limit: int | None = None) -> PairBatch:
    """Read pairs of prompts and encode those that line up.

    Args:
        tokenizer: a fast tokenizer. clean, corrupted: the two files. limit: read so many pairs at most.

    Returns:
        a `PairBatch` without spans or choices. Pairs of different length in tokens, answers that are not one token, and pairs
        with the same answer are left out; how many is `len(pairs read) - len(batch)`.

    Raises `ValueError` for files of another layout or of different length, and where nothing is left.
    """
    first, second = _read("clean", clean), _read("corrupted", corrupted)
    require(
        len(first) == len(second), "corrupted", f"{len(second)} prompts", f"{len(first)}, as many as in the other file"
    )
    pairs = []
    for (prompt, answer), (other, wrong) in list(zip(first, second))[:limit]:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, wrong)]
        if len(ids[0]) == len(ids[1]) == 1 and ids[0] != ids[1]:
            pairs.append((prompt, other, ids[0][0], ids[1][0]))
    return encode_pairs(tokenizer, pairs)


def _read(name: str, path: str | Path) -> list[tuple[str, str]]:
    need = "a JSON list of [prompt, answer]"
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_value(name, str(path), f"{need} ({error})") from None
    fits = isinstance(listed, list) and all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(text, str) for text in row) for row in listed
    )
    if not fits:
        raise bad_value(name, str(path), need)
    return [(prompt, answer) for prompt, answer in listed]
