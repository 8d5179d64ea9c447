"""`regard papers`: the catalog as a table, one row in full, and both as JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .catalog import MARKS, Paper, find_paper, load_catalog, search_papers


def register(app: typer.Typer) -> None:
    """Add `regard papers` to the command line."""
    app.command(name="papers")(papers)


def papers(
    query: Annotated[
        list[str] | None,
        typer.Argument(help="An id, key or name (004, moh) for one paper in full; anything else is free text."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only this family: linear, sparse, llm, vision, vlm, …")] = None,
    seam: Annotated[str | None, typer.Option(help="Only this seam: mask, score, selector, state, mixer, …")] = None,
    kind: Annotated[str | None, typer.Option(help="Only papers that bring this: module, op, edit, probe, …")] = None,
    status: Annotated[str | None, typer.Option(help="planned, works, verified or measured.")] = None,
    search: Annotated[str, typer.Option(help="Words that must all occur in the row.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list, or one object for one paper.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole catalog as docs/papers.md has it.")
    ] = False,
) -> None:
    """List the 196 papers, or show one in full: what it does, how to use it, what was verified and measured."""
    if markdown:
        from .markdown import page

        print(page(load_catalog()), end="")
        return
    text = " ".join(query or [])
    filtered = any((family, seam, kind, status, search))
    if text and not filtered:
        try:
            one = find_paper(text)
        except ValueError as unknown:
            rows = search_papers(text)
            # A number is never free text, and a name that occurs nowhere deserves the near ones rather than an empty table.
            if not rows or text.isdigit():
                raise unknown from None
        else:
            _print_json(one.as_dict()) if as_json else _show(one)
            return
    rows = search_papers(f"{text} {search}", family=family, seam=seam, kind=kind, status=status)
    _print_json([paper.as_dict() for paper in rows]) if as_json else _table(rows)


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _table(rows: list[Paper]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .._console import console

    out = console()
    if not rows:
        out.print("no paper matches")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    columns = {"id": "cyan", "key": "bold", "seam": "magenta", "kind": "dim", "family": "dim", "status": ""}
    lines = [(p.id, p.key, p.seam, p.kind[0], p.family, _status(p)) for p in rows]
    for column, (heading, style) in enumerate(columns.items()):
        # Only the title gives way to a narrow terminal (and, past 24 characters, the key).
        width = min(max(len(heading), *(len(line[column]) for line in lines)), 24)
        table.add_column(heading, style=style, no_wrap=True, overflow="ellipsis", min_width=width, max_width=width)
    table.add_column("title")  # the one that may shrink; its cells are cut, not wrapped
    for paper, line in zip(rows, lines):
        style = "green" if paper.status == "works" else "dim"
        table.add_row(*line[:-1], Text(line[-1], style), Text(paper.title, no_wrap=True, overflow="ellipsis"))
    out.print(table)
    everything = len(load_catalog())
    total = f"{len(rows)} papers" if len(rows) == everything else f"{len(rows)} of {everything} papers"
    counts = " · ".join(f"{sum(paper.has_status(s) for paper in rows)} {s}" for s in ("works", *MARKS))
    out.print(
        f"\n{total}: {counts}", "[dim]v: verified, m: measured; `regard papers ID` shows a paper in full[/]", sep="\n"
    )


def _status(paper: Paper) -> str:
    """ "planned", "works", and behind it v and m for the marks the row carries."""
    return " ".join((paper.status, *(mark[0] for mark in MARKS if paper.has_status(mark))))


def _show(paper: Paper) -> None:
    from rich.markup import escape
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.syntax import Syntax
    from rich.text import Text

    from .._console import console

    out = console()

    def section(heading: str, *lines: str) -> None:
        out.print(f"\n[bold]{heading}[/]")
        for line in lines:
            out.print(Padding(Text(line), (0, 0, 0, 2)))

    out.print(Rule(f"[bold cyan]{paper.id}[/] [bold]{escape(paper.name)}[/]", align="left", style="cyan"))
    out.print(Text(paper.title))
    marks = [paper.status, *(mark for mark in MARKS if paper.has_status(mark))]
    code = paper.code or (
        f"none of the authors; read instead: {paper.code_other}" if paper.code_other else "none public"
    )
    licence = {"": "", "none": " (no licence: read for numbers only)"}.get(
        paper.code_licence, f" ({paper.code_licence})"
    )
    for label, value in (
        ("paper", f"{paper.year} · arXiv {paper.arxiv}"),
        ("code", code + licence),
        ("brings", f"{' · '.join(paper.kind)} · seam {paper.seam} · family {paper.family}"),
        ("status", " · ".join(marks)),
        ("key", paper.key),
    ):
        out.print(f"  [dim]{label:8}[/]{escape(value)}")
    if paper.status == "planned":
        section("What it does", "Planned: not built yet, so there is nothing to use, verify or measure here.")
        return
    section("What it does", paper.summary)
    out.print("\n[bold]How to use it[/]")
    out.print(
        Padding(Syntax(paper.use.strip("\n"), "python", background_color="default", word_wrap=True), (0, 0, 0, 2))
    )
    section("Public names", *paper.exports)
    if paper.docs:
        section("Good to know", *paper.docs.split("\n\n"))
    if paper.note:
        section("What differs from the paper or its code", paper.note)
    out.print("\n[bold]Verified against[/]")
    for vector, source in zip(paper.vectors, paper.sources):
        out.print(f"  {vector}")
        out.print(Padding(Text(source, "dim"), (0, 0, 0, 6)))
    if paper.vectors:
        out.print(f"  [dim]check again in a checkout: regard verify {paper.id}[/]")
    else:
        out.print("  Nothing recorded from the authors' code yet.")
    section("Measured", paper.outcome or "Nothing measured yet.", *paper.results)
