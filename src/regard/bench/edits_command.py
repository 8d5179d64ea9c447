"""`regard bench edits`: what edits of attention cost in a prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._console import console


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(edits)


def edits(
    model: Annotated[str, typer.Option(help="A name or path for `regard.load`.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=8, help="Length of the prompt.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the measurement.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Time and peak memory of a prefill with edits of scores, head outputs and weights, beside the plain model, in one run."""
    import json as format_

    from rich.table import Table

    from .._files import require_writable, write_whole
    from ..integrations.hub import load
    from . import edits as bench
    from .timing import machine

    if json is not None:
        require_writable(json)
    loaded, tokenizer = load(model)
    screen, aside = console(), console(stderr=True)
    where = machine(str(next(loaded.parameters()).device.type))
    with aside.status("") as status:
        rows = bench.measure(loaded, tokenizer, tokens, rounds, lambda text: status.update(text))
    shown = Table(title=f"prefill of {tokens} tokens, {model} ({where['device']}, {where['threads']} threads)")
    for name in ("edit", "stage", "seconds", "of plain", "range", "peak MB", "its weights, MB"):
        shown.add_column(name, justify="left" if name in ("edit", "stage") else "right")
    for row in rows:
        mark = {True: " [green]✓[/green]", False: " [red]✗[/red]", None: ""}[row.holds]
        cells = (f"{row.seconds:.2f}", f"{row.ratio.median:.3f}{mark}", f"{row.ratio.low:.3f}–{row.ratio.high:.3f}")
        weights = f"{row.weights_bytes / 1e6:.1f}" if row.weights_bytes else ""
        shown.add_row(row.what, row.stage, *cells, f"{row.extra_bytes / 1e6:.1f}", weights)
    screen.print(shown)
    judged = [row for row in rows if row.holds is not None]
    screen.print(f"at most {bench.MOST:g} of plain: {sum(bool(row.holds) for row in judged)} of {len(judged)}")
    if json is not None:
        content = {
            "machine": where,
            "model": model,
            "tokens": tokens,
            "rounds": rounds,
            "rows": [row.as_dict() for row in rows],
        }
        screen.print(f"wrote {write_whole(json, format_.dumps(content, indent=1) + chr(10))}", soft_wrap=True)
