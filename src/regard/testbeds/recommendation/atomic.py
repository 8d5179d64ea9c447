"""Atomic files, the tables that RecBole reads: `.inter` (who, what, when), `.user`, `.item` and any other of the same form.

A text file in UTF-8. The first line names the columns with their types, `user_id:token`, parted by tabs; every further line holds a value a
column. Types: `token` (a name), `float`, and `token_seq` and `float_seq`, values parted by spaces. Nothing between two tabs: missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._checks import bad_value, require, require_name
from ..._files import write_whole

__all__ = ["AtomicTable", "read_atomic", "write_atomic"]

TYPES = ("token", "float", "token_seq", "float_seq")


@dataclass(frozen=True)
class AtomicTable:
    """What an atomic file holds.

    Attributes:
        types: column -> type. columns: column -> values, one a line: str ("" where missing), float (NaN), tuples of them (empty).
        malformed: what was wrong -> how many lines were left out for it. path: of the file.
    """

    types: dict[str, str]
    columns: dict[str, list[Any]]
    malformed: dict[str, int] = field(default_factory=dict)
    path: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[require_name("column", column, self.columns)]


def read_atomic(
    path: str | Path, columns: Sequence[str] | None = None, *, required: Sequence[str] = (), malformed: str = "raise"
) -> AtomicTable:
    """Read an atomic file.

    Args:
        path: of the file. columns: those to keep; default all. required: columns in which no value may be missing.
        malformed: what to do about lines with too few or too many values, numbers that are none, missing required values, bytes that are
            no UTF-8: "raise", an error that counts them and shows the first; "skip", leave them out and count them in the table.

    Raises:
        ValueError: the header is none (the file is empty, a column has no type or an unknown one, a name comes twice), a wanted column is
            not there, or lines are malformed. FileNotFoundError: no such file.
    """
    path = Path(path)
    require_name("malformed", malformed, ("raise", "skip"))
    if not path.is_file():
        raise FileNotFoundError(f"path: got {str(path)!r}, need an atomic file (.inter, .user, .item, ...)")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [line.removesuffix(b"\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    types = _header(path, lines[0] if lines else b"")
    names = list(types)
    wanted = names if columns is None else [require_name("columns", name, names) for name in columns]
    needed = {names.index(require_name("required", name, names)) for name in required}
    kept: list[list[Any]] = [[] for _ in names]
    wrong: Counter[str] = Counter()
    first = ""
    for number, line in enumerate(lines[1:], start=2):
        values, problem = _row(line, types, needed)
        if problem:
            first = first or f"line {number}, {line[:80].decode('utf-8', 'replace')!r}"
            wrong[problem] += 1
            continue
        for column, value in zip(kept, values):
            column.append(value)
    if wrong and malformed == "raise":
        reasons = "; ".join(f"{count}: {reason}" for reason, count in wrong.most_common())
        raise ValueError(
            f"{path}: {wrong.total()} of {len(lines) - 1} lines are malformed ({reasons}), the first is {first}; "
            f"need values of {', '.join(f'{name}:{kind}' for name, kind in types.items())} parted by tabs, or malformed='skip'"
        )
    table = dict(zip(names, kept))
    return AtomicTable(
        {name: types[name] for name in wanted}, {name: table[name] for name in wanted}, dict(wrong), str(path)
    )


def _header(path: Path, line: bytes) -> dict[str, str]:
    need = "a first line like 'user_id:token<tab>item_id:token<tab>timestamp:float'"
    types: dict[str, str] = {}
    for part in line.decode("utf-8", "replace").split("\t"):
        name, colon, kind = part.rpartition(":")
        if not (colon and name):
            raise ValueError(f"{path}: got the column {part[:80]!r} in the first line, need {need}")
        if kind not in TYPES:
            raise ValueError(f"{path}: column {name!r} has the type {kind!r}, need one of {', '.join(TYPES)}")
        if name in types:
            raise ValueError(f"{path}: column {name!r} comes twice in the first line, need different names")
        types[name] = kind
    return types


def _row(line: bytes, types: Mapping[str, str], needed: set[int]) -> tuple[list[Any], str]:
    """(values, "") or ([], what is wrong)."""
    try:
        parts = line.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        return [], "no UTF-8"
    if len(parts) != len(types):
        return [], f"{len(parts)} values for {len(types)} columns"
    values: list[Any] = []
    for place, ((name, kind), part) in enumerate(zip(types.items(), parts)):
        if not part and place in needed:
            return [], f"no {name}"
        try:
            values.append(_value(part, kind))
        except ValueError:
            return [], f"no number in {name}"
    return values, ""


def _value(part: str, kind: str) -> Any:
    if kind == "token":
        return part
    if kind == "float":
        return _number(part) if part else math.nan
    return tuple(part.split()) if kind == "token_seq" else tuple(_number(one) for one in part.split())


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def write_atomic(path: str | Path, columns: Mapping[str, Sequence[Any]], types: Mapping[str, str]) -> Path:
    """Write columns of equal length as an atomic file, whole or not at all; `read_atomic` gives them back.

    Args:
        columns: column -> values: str, numbers, or sequences of them for the types that end in `_seq`; None or NaN: missing.
        types: column -> type, the order in the file.
    """
    require(bool(types), "types", types, "at least one column")
    require(set(types) == set(columns), "types", sorted(types), f"one for each of {sorted(columns)}")
    for name, kind in types.items():
        require_name(f"types[{name!r}]", kind, TYPES)
    lengths = {name: len(values) for name, values in columns.items()}
    require(len(set(lengths.values())) == 1, "columns", lengths, "equal lengths")
    rows = ["\t".join(f"{name}:{kind}" for name, kind in types.items())]
    for line in range(next(iter(lengths.values()))):
        rows.append("\t".join(_text(name, columns[name][line], kind) for name, kind in types.items()))
    return write_whole(path, "\n".join(rows) + "\n")


def _text(name: str, value: Any, kind: str) -> str:
    if kind.endswith("_seq"):
        parts = [_text(name, one, kind.removesuffix("_seq")) for one in value]
        if any(not part or " " in part for part in parts):
            raise bad_value(f"columns[{name!r}]", value, "parts that are neither empty nor hold spaces")
        return " ".join(parts)
    if value is None:
        return ""
    if kind == "float":
        number = float(value)
        return (
            ""
            if math.isnan(number)
            else repr(int(number))
            if number.is_integer() and abs(number) < 2**53
            else repr(number)
        )
    text = str(value)
    require(not set(text) & set("\t\n\r"), f"columns[{name!r}]", text, "names without tabs and line breaks")
    return text
