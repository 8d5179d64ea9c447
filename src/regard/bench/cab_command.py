"""`regard bench cab`: attention methods side by side on four attention patterns, with their index, efficiency length and causality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._console import console

if TYPE_CHECKING:
    from rich.table import Table

_PATTERN_NAMES = {
    "NS": "non-causal self", "CS": "causal self", "NC": "non-causal cross", "CC": "causal cross"
}  # fmt: skip


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(cab)


def cab(
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas. Default: all of them.")] = None,
    tasks: Annotated[str | None, typer.Option(help='Tasks or patterns, e.g. "NS MLM,CC". Default: all.')] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a task.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings a task and method; tables show the mean.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds: shows that everything runs, says nothing.")] = False,
    lengths: Annotated[bool, typer.Option(help="Measure efficiency lengths (time) too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Keep results here (JSON) and go on with what is there.")] = None,
) -> None:
    """CAB in small: train methods on up to eleven tasks, and set their scores, costs and causality side by side (about 10 minutes)."""
    from rich.progress import Progress

    from .._files import require_writable
    from .cab import METHODS, Sizes, run_tasks

    chosen = None if methods is None else [name.strip() for name in methods.split(",")]
    wanted = None if tasks is None else [name.strip() for name in tasks.split(",")]
    if out is not None:
        require_writable(out)
    sizes = Sizes(dim=16, layers=1, batch=2, kept=4, text=32) if quick else Sizes()
    screen = console()
    with Progress(console=screen, transient=True) as progress:
        bar = progress.add_task("tasks")

        def on_step(what: str, number: int, total: int) -> None:
            progress.update(bar, description=what, completed=number, total=total)

        report = run_tasks(
            chosen, wanted, steps=2 if quick else steps, sizes=sizes, seeds=seeds, path=out, on_step=on_step
        )
    for table in score_tables(report):
        screen.print(table)
    screen.print(method_table(chosen or list(METHODS), lengths, quick))
    screen.print(causality_table())
    if out is not None:
        screen.print(f"results: {out}")


def score_tables(report: dict[str, Any]) -> list[Table]:
    """One table a pattern: methods, best index first, with the mean of every metric."""
    import statistics

    from rich import box
    from rich.table import Table

    from .cab import TASKS, indices

    tables = []
    for pattern, scores in indices(report).items():
        tasks = [task for task in TASKS.values() if task.pattern == pattern and task.name in report["results"]]
        made = Table(title=f"{pattern}, {_PATTERN_NAMES[pattern]}", box=box.SIMPLE_HEAD, pad_edge=False)
        made.add_column("method", no_wrap=True)
        made.add_column("CI", justify="right")
        for task in tasks:
            for metric, sign in task.signs.items():
                made.add_column(f"{task.task}\n{metric} {'↑' if sign > 0 else '↓'}", justify="right", no_wrap=True)
        tested = {method for task in tasks for method in report["results"][task.name]}
        for method in sorted(tested, key=lambda name: -scores.get(name, -1e9)):
            cells = []
            for task in tasks:
                found = report["results"][task.name].get(method)
                cells += [f"{statistics.fmean(found[metric]):.4g}" if found else "−" for metric in task.signs]
            index = f"{scores[method]:+.2f}" if method in scores else "−"
            made.add_row(method, index, *cells)
        made.caption = "CI: mean of (value - mean) / deviation over the methods of this run, better is higher; attention left out: none"
        tables.append(made)
    return tables


def method_table(methods: list[str], lengths: bool, quick: bool) -> Table:
    """What each method can do, whether its causal layers are causal, and from which length on it is faster than vanilla."""
    from rich import box
    from rich.table import Table

    from .cab.report import method_rows

    made = Table(title="methods", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("method", no_wrap=True)
    for name in _PATTERN_NAMES:
        made.add_column(name, justify="center")
    made.add_column("efficiency length\n(time)", justify="right")
    for row in method_rows(methods, lengths, quick):
        made.add_row(row.name, *(row.patterns[name] for name in _PATTERN_NAMES), row.efficiency)
    made.caption = "✓ can do, leaks: a causal layer whose outputs depend on later tokens; length: of the whole layer, 128 wide, 4 heads"
    return made


def causality_table() -> Table:
    """The causality test on this library's own ops."""
    from rich import box
    from rich.table import Table

    from .cab import causal_ops, leaks

    made = Table(title="causality of our own ops, CAB's test", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("op")
    made.add_column("largest difference", justify="right")
    made.add_column("verdict")
    for name, op in causal_ops().items():
        found = leaks(op)
        made.add_row(name, f"{found:.1e}", "causal" if found <= 1e-4 else "[red]depends on later tokens[/red]")
    made.caption = "output on a prefix against the prefix of the output; selectors that pool the queries of a block see its later ones"
    return made
