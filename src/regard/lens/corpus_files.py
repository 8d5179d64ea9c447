"""Scoring a corpus of files: streaming, resumable, sharded over processes; what cannot be read is counted and never fatal.

Every process writes one file of JSON lines: a header with the settings, and a line for each document it scored. A run that was
stopped goes on where it was; several shards are ranked together afterwards.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from .._checks import bad_value, require, require_int, require_name
from .._files import require_writable, write_whole
from .corpus_influence import corpus_influence, select_top

__all__ = ["CorpusReport", "Document", "corpus_documents", "rank_corpus", "score_files"]

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_EXAMPLES = 5  # of each trouble, to show


@dataclass(frozen=True)
class Document:
    """One document of a corpus: its file, its line there (0-based; 0 for a file that is one document), its text and domain."""

    file: str
    line: int
    text: str
    domain: str = ""


@dataclass
class CorpusReport:
    """What became of a corpus: documents scored, resumed (scored by an earlier run), of other shards, and not readable, by reason.

    `examples` holds places, "file:line", of the first few of each reason.
    """

    scored: int = 0
    resumed: int = 0
    elsewhere: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def miss(self, reason: str, place: str) -> None:
        """Count one that cannot be read."""
        self.unreadable[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(place)

    def __str__(self) -> str:
        parts = [f"{self.scored} scored"]
        parts += [f"{self.resumed} scored before"] if self.resumed else []
        parts += [f"{self.elsewhere} of other shards"] if self.elsewhere else []
        parts += [f"{count} unreadable: {reason} ({', '.join(self.examples[reason])}{', ...' if count > _EXAMPLES else ''})"
                  for reason, count in self.unreadable.items()]  # fmt: skip
        return "; ".join(parts)


def corpus_documents(
    paths: Iterable[str | Path],
    *,
    field: str = "text",
    domain_field: str = "domain",
    txt: str = "file",
    report: CorpusReport | None = None,
) -> Iterator[Document]:
    """Documents of files and folders, in the order of their names, read line by line.

    Args:
        paths: `.jsonl` (an object a line), `.txt`, either with `.gz`; or folders, whose files of these kinds are taken.
        field, domain_field: of a JSON object: the text, and the domain it is ranked in (where it has none, the file's name).
        txt: a `.txt` is one document ("file") or one a line ("line").
        report: where lines and files that cannot be read are counted; they are passed over.

    Raises:
        ValueError: a path that is not there, or no file at all. (A file that cannot be opened later on is counted.)
    """
    require_name("txt", txt, ("file", "line"))
    found = CorpusReport() if report is None else report
    for path in _files(paths):
        name = str(path)
        try:
            with _open(path) as file:
                if ".jsonl" in path.suffixes:
                    yield from _json_lines(file, name, field, domain_field, path.name, found)
                else:
                    pieces: Iterable[bytes] = [file.read()] if txt == "file" else file
                    for number, raw in enumerate(pieces):
                        text = _decoded(raw, f"{name}:{number}", found)
                        if text is not None and text.strip():
                            yield Document(name, number, text, path.name)
                        elif text is not None and txt == "file":
                            found.miss("empty file", name)
        except (OSError, EOFError) as error:  # gzip tells of a cut-off file by EOFError
            found.miss(f"file cannot be read ({type(error).__name__})", name)


def _json_lines(
    file: IO[bytes], name: str, field: str, domain_field: str, domain: str, report: CorpusReport
) -> Iterator[Document]:
    for number, raw in enumerate(file):
        place = f"{name}:{number + 1}"
        line = _decoded(raw, place, report)
        if line is None or not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            report.miss("not JSON", place)
            continue
        text = item.get(field) if isinstance(item, dict) else None
        if not isinstance(text, str):
            report.miss(f"no text in {field!r}", place)
        elif not text.strip():
            report.miss("empty text", place)
        else:
            yield Document(name, number, text, str(item.get(domain_field) or domain))


def _decoded(raw: bytes, place: str, report: CorpusReport) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        report.miss("not UTF-8", place)
        return None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    given = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in given:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        elif path.exists():
            require(path.name.endswith(SUFFIXES), "corpus", str(path), f"files ending in {', '.join(SUFFIXES)}")
            found.append(path)
        else:
            raise bad_value("corpus", str(path), "a file or folder that is there")
    require(bool(found), "corpus", [str(path) for path in given], f"at least one file ending in {', '.join(SUFFIXES)}")
    return found


def score_files(
    model: Any,
    tokenizer: Any,
    paths: Sequence[str | Path],
    heads: Iterable[tuple[int, int]],
    out: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    resume: bool = True,
    batch_size: int = 8,
    max_tokens: int = 4096,
    literal: bool = False,
    field: str = "text",
    domain_field: str = "domain",
    txt: str = "file",
    progress: Callable[[int], None] = lambda done: None,
) -> CorpusReport:
    """Score a corpus and write `out`, one JSON line a document: file, line, domain, score, base, ref, tokens.

    Args:
        model, tokenizer, heads, batch_size, max_tokens, literal: as in `corpus_influence`. paths, field, domain_field, txt: as in
            `corpus_documents`.
        out: where the lines go, appended to as batches are done. With `resume` what it holds is kept, if its settings are these;
            a half-written last line is dropped. Without, it is written anew.
        shard: (i, n): score documents i, i + n, i + 2n, ... alone; give each process its own `out`.
        progress: called with the number of documents done.

    Raises:
        ValueError: `out` was written with other settings, a shard that is none, a corpus that is not there.
    """
    index, count = shard
    require_int("shard", count, 1)
    require(0 <= index < count, "shard", shard, "(i, n) with 0 <= i < n")
    out, chosen = require_writable(out), sorted((int(layer), int(head)) for layer, head in heads)
    settings = {
        "heads": [list(head) for head in chosen],
        "max_tokens": max_tokens,
        "literal": literal,
        "field": field,
        "txt": txt,
        "shard": list(shard),
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", "")),
    }
    known = _kept(out, settings) if resume and out.exists() else set()
    report = CorpusReport()
    if not known:
        write_whole(out, json.dumps({"settings": settings}) + "\n")

    waiting: list[Document] = []

    def texts() -> Iterator[str]:
        documents = corpus_documents(paths, field=field, domain_field=domain_field, txt=txt, report=report)
        for number, document in enumerate(documents):
            if number % count != index:
                report.elsewhere += 1
            elif (document.file, document.line) in known:
                report.resumed += 1
            else:
                waiting.append(document)
                yield document.text

    with out.open("a", encoding="utf-8") as file:
        found = corpus_influence(
            model, tokenizer, texts(), chosen, batch_size=batch_size, max_tokens=max_tokens, literal=literal
        )
        for score in found:
            document = waiting.pop(0)
            if score.score != score.score:
                report.miss("fewer than two tokens", f"{document.file}:{document.line}")
            else:
                report.scored += 1
            row = {
                "file": document.file,
                "line": document.line,
                "domain": document.domain,
                "score": _number(score.score),
            }
            row |= {name: _number(value) for name, value in asdict(score).items()}
            file.write(json.dumps(row) + "\n")
            if not waiting or report.scored % batch_size == 0:
                file.flush()
            progress(report.scored)
    return report


def _number(value: float) -> float | None:
    return None if value != value else value


def _kept(out: Path, settings: dict[str, Any]) -> set[tuple[str, int]]:
    """Documents that `out` holds already; its last line is cut off if it is not whole."""
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        header, *rows = [json.loads(line) for line in whole.splitlines()] or [{}]
        was = header["settings"]
        known = {(str(row["file"]), int(row["line"])) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise bad_value("out", str(out), f"a file that score_files wrote, or none ({error})") from None
    changed = [name for name in settings if was.get(name) != settings[name]]
    if changed:
        raise bad_value(
            "out",
            f"{out} with {changed[0]}={was.get(changed[0])!r}",
            f"{changed[0]}={settings[changed[0]]!r} as in this run, or resume=False",
        )
    if len(whole) < len(raw):
        write_whole(out, whole)
    return known


def rank_corpus(outs: Iterable[str | Path], share: float = 0.2) -> list[dict[str, Any]]:
    """All scored documents of what shards wrote, best first within each domain, with `keep`: whether in the best `share` of its domain."""
    rows: list[dict[str, Any]] = []
    for out in outs:
        lines = Path(out).read_text(encoding="utf-8").splitlines()
        rows += [row for row in map(json.loads, lines) if "score" in row and row["score"] is not None]
    require(bool(rows), "outs", [str(out) for out in outs], "files of score_files with at least one scored document")
    kept = set(select_top([row["score"] for row in rows], [row["domain"] for row in rows], share))
    for number, row in enumerate(rows):
        row["keep"] = number in kept
    return sorted(rows, key=lambda row: (row["domain"], -row["score"]))
