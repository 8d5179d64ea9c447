"""`regard bench claims`: measure again what papers claim, keep it in results/, print the catalog's line from what is kept."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .._console import console

_PAPERS = "Papers by id, key or name (068, DuoAttention). None: all that have a claim."


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(claims)


def claims(
    papers: Annotated[list[str] | None, typer.Argument(help=_PAPERS)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Which claims there are; measure nothing.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds, not minutes: shows that it runs, proves nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for NNN-slug.json and README.md.")] = Path("results"),
    model: Annotated[str, typer.Option(help="The language model that claims on one use.")] = "smollm2-135m",
    table: Annotated[bool, typer.Option("--table", help="Only write README.md again from the kept figures.")] = False,
    notes: Annotated[
        bool, typer.Option("--notes", help="Only print the catalog's lines, as TOML, from the kept figures.")
    ] = False,
    notes_to: Annotated[
        Path | None, typer.Option(help="Only write them to this folder, NNN.measured.toml each.")
    ] = None,
) -> None:
    """Measure headline claims of papers small, beside their baselines, each in one run."""
    from .claims import MODULES, get_claim

    ids = [_id_of(name) for name in papers] if papers else list(MODULES)
    if list_:
        for paper in ids:
            console().print(f"[bold]{paper}[/bold] {get_claim(paper).says}", highlight=False)
    elif notes or notes_to is not None:
        _notes(ids, out, notes_to)
    elif table:
        _say(write_table(out))
    else:
        _measure(ids, out, quick, model)


def _id_of(name: str) -> str:
    from ..papers.catalog import find_paper
    from .claims import MODULES

    paper = find_paper(name).id
    if paper not in MODULES:
        raise ValueError(f"papers: got {name!r}, need a paper with a measured claim: {', '.join(MODULES)}")
    return paper


def _measure(ids: list[str], out: Path, quick: bool, model: str) -> None:
    from .._files import require_writable
    from .claims import get_claim
    from .claims.claim import Scale, run, save

    require_writable(out / "README.md")
    scale, failed = Scale(quick, model), []
    for paper in ids:
        claim = get_claim(paper)
        console().print(f"\n[bold]{paper}[/bold] {claim.says}", highlight=False)
        # the command of this claim alone, so that whoever reads the file can run just that
        words = ["regard", "bench", "claims", paper]
        words += ["--quick"] * quick + (["--model", model] if model != "smollm2-135m" else [])
        try:
            record = run(claim, scale, shlex.join(words))
        except (ArithmeticError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
            failed.append(paper)
            console(stderr=True).print(f"[red]{paper} could not be measured[/red]: {error}")
            continue
        _show(record)
        _say(save(record, claim, out))
    if not quick:
        _say(write_table(out))
    if failed:
        console(stderr=True).print(f"not measured: {', '.join(failed)}")
        raise typer.Exit(1)


def _show(record: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from .claims.claim import Check

    shown = Table(title=escape(record["setting"]))
    for name in ("what", "figure", "mean", "of the baseline"):
        shown.add_column(name, justify="right" if name in ("mean", "of the baseline") else "left")
    for row in record["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g} ± {row['spread']:.2g}"
        shown.add_row(escape(row["label"]), escape(row["figure"]), f"{row['mean']:.4g} {row['unit']}".rstrip(), ratio)
    screen = console()
    screen.print(shown)
    for check in record["checks"]:
        screen.print(f"  [{'green' if check['holds'] else 'red'}]{escape(str(Check(**check)))}")
    screen.print(f"[bold]{record['verdict']}[/bold] at this scale ({record['seconds']:.0f} s) {escape(record['note'])}")


def _say(path: Path) -> None:
    console().print(f"wrote {path.resolve()}", soft_wrap=True)


# From the kept figures


def kept(out: Path, paper: str) -> tuple[Path, dict[str, Any]] | None:
    """What is kept of a paper's claim, or None. A file that is no such record gives a `ValueError` naming it."""
    from .claims import get_claim

    path = out / get_claim(paper).file_name()
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["verdict"], record["checks"], record["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {str(path)!r} is not what `regard bench claims` wrote ({error})") from None
    return path, record


def note(path: Path, record: dict[str, Any]) -> str:
    """The catalog's fields for one paper, as TOML: id, measured, results, command."""
    from .claims.claim import measured_line

    fields = {
        "id": record["paper"],
        "measured": measured_line(record),
        "results": [f"results/{path.name}"],
        "command": record["command"],
    }
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in fields.items())


def _notes(ids: list[str], out: Path, folder: Path | None) -> None:
    from .._files import write_whole

    for paper in ids:
        found = kept(out, paper)
        if found is None:
            continue
        if folder is None:
            sys.stdout.write(note(*found) + "\n")
        else:
            _say(write_whole(folder / f"{paper}.measured.toml", note(*found)))


def write_table(out: Path) -> Path:
    """Write `out`/README.md: every kept claim with its verdict and checks."""
    from .._files import write_whole
    from .claims import MODULES
    from .claims.claim import Check, busy

    lines = [
        "# Measured claims",
        "",
        "Written by `regard bench claims`, from the JSON files beside it. Each line is one paper's headline claim, measured small, its",
        "baseline in the same run; what did not come out says so. `±` is half the range over the repeats.",
        "",
        "| paper | claim | measured on | what came out | at this scale | again |",
        "|---|---|---|---|---|---|",
    ]
    for paper in MODULES:
        found = kept(out, paper)
        if found is None:
            continue
        path, record = found
        checks = "<br>".join(str(Check(**check)) for check in record["checks"])
        machine = record["machine"]
        where = (
            f"{record['setting']}<br>{machine['device']}, {machine['threads']} threads, {record['date']}{busy(machine)}"
        )
        cells = [
            f"[{paper}]({path.name})",
            record["claim"],
            where,
            checks,
            f"**{record['verdict']}**",
            f"`{record['command']}`",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return write_whole(out / "README.md", "\n".join(lines) + "\n")
