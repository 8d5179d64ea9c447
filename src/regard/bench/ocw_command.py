"""`regard bench ocw`: score answers to Only Connect walls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .._console import console


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(ocw)


def ocw(
    predictions: Annotated[
        Path, typer.Argument(help='JSON: a list of {"wall_id", "predicted_groups", "predicted_connections"}.')
    ],
    walls: Annotated[Path, typer.Option(help="JSON of the walls, as published (test.json).")],
    out: Annotated[Path | None, typer.Option(help="Write all scores here (JSON, in the authors' layout).")] = None,
) -> None:
    """Only Connect walls: groups and walls found, agreement of partitions, connections, for a file of answers."""
    from rich.table import Table

    from .._files import require_writable, write_whole
    from .ocw import load_walls, ocw_score

    if out is not None:
        require_writable(out)
    try:
        given = json.loads(predictions.read_text(encoding="utf-8"))
        report = ocw_score(given, load_walls(walls))
    except (OSError, ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    table = Table(title=f"{len(report.walls)} walls")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in report.total.items():
        table.add_row(name, f"{value:.4g}")
    console().print(table)
    if out is not None:
        write_whole(out, json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
