"""`regard verify`: run the conformance vectors and print how near our numbers are to the authors'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .conformance import Result


def register(app: typer.Typer) -> None:
    """Add `regard verify` to the command line."""
    app.command(name="verify")(verify)


def default_folder() -> Path:
    """`tests/conformance` of the checkout one stands in, or of the one this package was imported from."""
    here = Path.cwd()
    places = [here, *here.parents, Path(__file__).resolve().parents[3]]
    for place in places:
        folder = place / "tests" / "conformance"
        if (folder / "vectors").is_dir():
            return folder
    raise ValueError(
        "vectors: no tests/conformance here or above, and none beside the package (an installed wheel carries no vectors); "
        "run in a checkout or name a folder with --vectors DIR"
    )


def verify(
    paper: Annotated[str | None, typer.Argument(help="Only this paper: an id, key or name. Default: all.")] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(help="A folder with *.safetensors, targets.toml and adapters. Default: the checkout's own."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare our numbers with those recorded from the authors' code; exits with 1 unless every one agrees."""
    from ..papers.catalog import find_paper
    from .conformance import find_checks, run_all, uncompared

    wanted = find_paper(paper).id if paper is not None else None
    folder = vectors if vectors is not None else default_folder()
    checks = [check for check in find_checks(folder) if wanted in (None, check.paper)]
    if not checks:
        raise ValueError(f"paper: no vector of paper {wanted} in {str(folder)!r}, so there is nothing to verify")

    results = run_all(checks)
    passed = sum(result.ok for result in results)
    if as_json:
        print(json.dumps([_as_dict(result) for result in results], indent=2))
    else:
        _print_table(results)
        for stem, names in uncompared(results).items():
            typer.echo(f"{stem}: recorded but compared by no case: {', '.join(names)}")
        typer.echo(f"\n{passed} of {len(results)} agree with the recorded numbers")
    if passed < len(results):
        raise typer.Exit(1)


def _as_dict(result: Result) -> dict[str, object]:
    worst = result.worst
    return {
        "paper": result.check.paper,
        "vector": result.check.stem,
        "case": result.check.case,
        "output": worst.output if worst else None,
        "max_rel_error": worst.error if worst else None,
        "tolerance": worst.tolerance if worst else None,
        "ok": result.ok,
        "detail": result.detail,
    }


def _print_table(results: list[Result]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from .._console import console

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading, style in (("paper", "cyan"), ("vector", ""), ("case", "dim"), ("worst output", "dim")):
        table.add_column(heading, style=style, overflow="fold")
    for heading in ("max rel error", "tolerance", "ok"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        check, worst = result.check, result.worst
        numbers = (worst.output, f"{worst.error:.2e}", f"{worst.tolerance:.0e}") if worst else ("", "–", "–")
        ok = "[green]yes[/]" if result.ok else "[bold red]NO[/]"
        table.add_row(check.paper, escape(check.stem), escape(check.case), *map(escape, numbers), ok)
    out = console()
    out.print(table)
    for result in results:
        if not result.ok:
            out.print(f"[red]{escape(result.check.name)}[/]: {escape(result.detail)}")
