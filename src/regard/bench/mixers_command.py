"""`regard bench mixers`: layers of the library compared in one small model at equal size."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from .._console import console


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(mixers)


def mixers(
    names: Annotated[list[str] | None, typer.Argument(help="Rows (see --list). None: all.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Which rows there are; train nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A minute, two steps a row: shows that it runs.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file that is gone on with. Default: results/mixers.json, or mixers-quick.json."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write recall against state bytes here, as PNG.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, as Markdown.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps on recall.")] = None,
    text_steps: Annotated[int | None, typer.Option(min=1, help="Training steps on text.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row.")] = 1,
) -> None:
    """Recall, text and bytes carried, for every causal mixer at equal parameters. A stopped run goes on where it was."""
    from dataclasses import replace

    from .._files import require_writable, write_whole
    from . import mixers as bench

    if list_:
        for label, entry in bench.ROSTER.items():
            console().print(f"{label}: {' + '.join(entry.mixer)} {dict(entry.options) or ''}", highlight=False)
        return
    settings = bench.Settings.quick() if quick else bench.Settings()
    settings = replace(settings, steps=steps or settings.steps, text_steps=text_steps or settings.text_steps)
    out = out or Path("results") / ("mixers-quick.json" if quick else "mixers.json")
    for path in (picture, markdown):
        if path is not None:
            require_writable(path)
    screen = console(stderr=True)
    report = bench.measure(
        names, settings, seeds=seeds, path=out, progress=True,
        on_row=lambda what, number, of: screen.print(f"{number + 1}/{of} {what}", highlight=False),
    )  # fmt: skip
    console().print(table(report))
    console().print(f"nothing betters: {', '.join(bench.frontier(report))}", highlight=False)
    console().print(f"wrote {out.resolve()}", soft_wrap=True)
    if markdown is not None:
        console().print(f"wrote {write_whole(markdown, as_markdown(report))}", soft_wrap=True)
    if picture is not None:
        console().print(f"wrote {write_whole(picture, bench.picture(report))}", soft_wrap=True)


def cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, best mean recall first; rows that failed last."""
    from .mixers import recall_of

    pairs = [str(count) for count in report["settings"]["pairs"]]
    heads = [
        "mixer",
        "parameters",
        "state bytes",
        *(f"recall, {count} keys" for count in pairs),
        "text, bits/byte",
        "seconds",
    ]
    ranked = sorted(report["results"].items(), key=lambda item: ("error" in item[1], -recall_of(item[1])))
    rows = []
    for label, row in ranked:
        if "error" in row:
            rows.append([label, *[""] * (len(heads) - 2), row["error"][:60]])
            continue
        held = f"{row['state_bytes']:,}{' (all tokens)' if row['holds_all'] else ''}" if "state_bytes" in row else ""
        recalled = [_mean(row.get("recall", {}).get(count, []), 3) for count in pairs]
        seconds = sum(sum(spent) for spent in row.get("seconds", {}).values())
        rows.append(
            [label, f"{row.get('parameters', 0):,}", held, *recalled, _mean(row.get("text", []), 3), f"{seconds:.0f}"]
        )
    return heads, rows


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(report: dict[str, Any]) -> Any:
    """The report as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    heads, rows = cells(report)
    made = Table(title=escape(_title(report)))
    for number, head in enumerate(heads):
        made.add_column(head, justify="right" if number else "left")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    heads, rows = cells(report)
    lines = [_title(report), "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return (
        "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]) + "\n"
    )


def _title(report: dict[str, Any]) -> str:
    s, m = report["settings"], report["machine"]
    return (
        f"{s['num_layers']} layers of width {s['dim']}, {s['num_heads']} heads; recall: {s['steps']} steps at {s['length']} tokens; "
        f"text: {s['text_steps']} steps at {s['text_length']} bytes; one learning rate, {s['lr']:g} ({m['device']}, {m['threads']} threads)"
    )
