"""The rows of `catalog.toml`, checked as they are read, and three ways to ask for them."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

SEAMS = ("mask", "score", "selector", "state", "mixer", "cache", "edit", "decoder", "probe", "loss")
#: What stands in `seam` where none of the ten fits: the paper is a whole network, a benchmark or a composition.
NO_SEAM = ("network", "benchmark", "recipe")
KINDS = (
    *("module", "network", "op", "edit", "cache", "decoder"),
    *("probe", "trainer", "benchmark", "recipe", "survey"),
)
FAMILIES = ("diffusion", "gaze", "linear", "llm", "medical", "sparse", "vision", "vlm")
STATUSES = ("planned", "works")
#: The two marks on top of "works"; accepted wherever a status filters rows.
MARKS = ("verified", "measured")


@dataclass(frozen=True)
class Paper:
    """One row of the catalog. The head of `catalog.toml` says what each field holds."""

    id: str
    key: str
    name: str
    title: str
    year: int
    family: str
    arxiv: str
    code: str
    kind: tuple[str, ...]
    seam: str
    status: str
    code_other: str = ""
    code_licence: str = ""
    exports: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    verified: bool = False
    results: tuple[str, ...] = ()
    #: What was measured and what came out, in words; empty when nothing was.
    outcome: str = ""
    note: str = ""
    summary: str = ""
    use: str = ""
    docs: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.outcome)

    def has_status(self, status: str) -> bool:
        """Whether the row carries `status`: "planned", "works", or one of the marks "verified" and "measured"."""
        if status in MARKS:
            return bool(getattr(self, status))
        return self.status == status

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON; `measured` is the mark, `outcome` the words behind it."""
        row = asdict(self)
        row["measured"] = self.measured
        return row

    def text(self) -> str:
        """What free text is looked for in."""
        words = (self.id, self.key, self.name, self.title, str(self.year), self.family, self.seam, *self.kind)
        return " ".join((*words, self.arxiv, self.code, self.summary, self.note, *self.exports)).lower()


def _parse(row: dict[str, Any]) -> Paper:
    """One table of the file as a `Paper`; a misspelt or missing field is an error that names the row."""
    row = dict(row)
    row["outcome"] = row.pop("measured", "")
    # Prose is wrapped in the file for whoever edits it; line ends there mean nothing, empty lines part paragraphs.
    for name in ("summary", "note", "outcome", "docs"):
        if isinstance(row.get(name), str):
            row[name] = "\n\n".join(" ".join(part.split()) for part in row[name].strip().split("\n\n"))
    known = {field.name for field in fields(Paper)}
    where = f"catalog.toml, paper {row.get('id', '?')}"
    if unknown := sorted(set(row) - known):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}")
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        paper = Paper(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
    for name, value, allowed in (
        ("seam", paper.seam, (*SEAMS, *NO_SEAM)),
        ("family", paper.family, FAMILIES),
        ("status", paper.status, STATUSES),
        *(("kind", kind, KINDS) for kind in paper.kind),
    ):
        if value not in allowed:
            raise ValueError(f"{where}: {name} is {value!r}, need one of {', '.join(allowed)}")
    return paper


@cache
def load_catalog() -> tuple[Paper, ...]:
    """All rows, in the order of their ids."""
    text = resources.files(__package__).joinpath("catalog.toml").read_text(encoding="utf-8")
    return tuple(_parse(row) for row in tomllib.loads(text)["paper"])


def _names(paper: Paper) -> set[str]:
    """What a person may call a paper by, in lower case."""
    bare = paper.id.lstrip("0")
    return {paper.id, bare, paper.key.lower(), paper.name.lower(), *paper.name.lower().split(" / ")}


def find_paper(name: str) -> Paper:
    """The row called `name`: an id ("004" or "4"), a key ("moh") or a method's name ("MoH").

    Raises a `ValueError` that lists near names when there is none.
    """
    wanted = name.strip().lower()
    for paper in load_catalog():
        if wanted in _names(paper):
            return paper
    known = {called: paper for paper in load_catalog() for called in _names(paper) if not called.isdigit()}
    # Near in spelling first, then by parts: "lightning" stands in several names and is near to none of them.
    near = [known[called] for called in difflib.get_close_matches(wanted, known, n=5, cutoff=0.6)]
    near += [paper for called, paper in known.items() if len(wanted) > 2 and wanted in called]
    labels = list(dict.fromkeys(f"{paper.id} {paper.key}" for paper in near))[:5]
    hint = f"did you mean {', '.join(labels)}?" if labels else "`regard papers` lists all"
    raise ValueError(f"paper: unknown name {name!r}; {hint}")


def _accept(argument: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{argument}: unknown value {value!r}; {hint}one of: {', '.join(allowed)}")


def search_papers(
    text: str = "",
    *,
    family: str | None = None,
    seam: str | None = None,
    kind: str | None = None,
    status: str | None = None,
) -> list[Paper]:
    """The rows for which every given filter holds.

    `text` is words that must all occur somewhere in the row; `family`, `seam` and `kind` are values of those fields; `status`
    is "planned", "works", "verified" or "measured". A value that no row could have raises a `ValueError` with the ones that exist.
    """
    _accept("family", family, FAMILIES)
    _accept("seam", seam, (*SEAMS, *NO_SEAM))
    _accept("kind", kind, KINDS)
    _accept("status", status, (*STATUSES, *MARKS))
    words = text.lower().split()
    return [
        paper
        for paper in load_catalog()
        if (family is None or paper.family == family)
        and (seam is None or paper.seam == seam)
        and (kind is None or kind in paper.kind)
        and (status is None or paper.has_status(status))
        and all(word in paper.text() for word in words)
    ]
