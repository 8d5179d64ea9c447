"""The catalog as pages of documentation: what is built, with its own words, and what is planned."""

from __future__ import annotations

from collections.abc import Iterable

from .catalog import Paper

_INTRO = """# The papers

Made by `regard papers --markdown > docs/papers.md`; the words live in `src/regard/papers/catalog.toml`. *Works*: public API with tests.
*Verified*: its numbers are those of the authors' code. *Measured*: a claim was measured here, with what came out.
"""


def page(papers: Iterable[Paper]) -> str:
    """Markdown: an entry for each paper that works, then the list of planned ones by family."""
    papers = list(papers)
    built = [paper for paper in papers if paper.status == "works"]
    parts = [_INTRO, "## Built\n", _index(built)]
    parts += [_entry(paper) for paper in built]
    parts.append("## Planned\n")
    for family in sorted({paper.family for paper in papers}):
        rows = [paper for paper in papers if paper.family == family and paper.status != "works"]
        if rows:
            lines = "\n".join(f"- {paper.id} {paper.title} ({paper.seam})" for paper in rows)
            parts.append(f"### {family}\n\n{lines}\n")
    return "\n".join(parts)


def _marks(paper: Paper) -> str:
    return ", ".join(mark for mark in ("verified", "measured") if paper.has_status(mark)) or "works"


def _index(papers: list[Paper]) -> str:
    lines = ["| id | paper | seam | public names | status |", "|---|---|---|---|---|"]
    for paper in papers:
        names = "<br>".join(f"`{name}`" for name in paper.exports[:3])
        lines.append(f"| [{paper.id}](#{paper.id}) | {paper.name} | {paper.seam} | {names} | {_marks(paper)} |")
    return "\n".join(lines) + "\n"


def _entry(paper: Paper) -> str:
    parts = [
        f'<a id="{paper.id}"></a>\n### {paper.id} {paper.title}',
        f"{paper.year}, arXiv {paper.arxiv}. {_marks(paper).capitalize()}.",
    ]
    parts += [paper.summary, f"```python\n{paper.use.strip()}\n```"]
    if paper.docs:
        parts.append(paper.docs)
    if paper.note:
        parts.append(f"**What differs.** {paper.note}")
    if paper.vectors:
        parts.append(
            "**Verified against** "
            + ", ".join(f"`{name.removesuffix('.safetensors')}`" for name in paper.vectors)
            + "."
        )
    if paper.measured:
        parts.append(f"**Measured.** {paper.outcome}")
    return "\n\n".join(parts) + "\n"
