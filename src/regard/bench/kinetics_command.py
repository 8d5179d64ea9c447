"""`regard bench kinetics`: what an answer costs with its attention counted, and what to do with a cost budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._console import console

if TYPE_CHECKING:
    from rich.table import Table

_CURVE = "ceiling,tokens[,keys[,spread]]: a task curve (see regard.bench.kinetics_plan.TaskCurve) for the models, largest first."


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(kinetics)


def kinetics(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs: JSON lines in the authors' layout.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Known model shapes. Default: the Qwen3 family.")] = None,
    curve: Annotated[list[str] | None, typer.Option(help=_CURVE)] = None,
    budget: Annotated[float, typer.Option(min=0, help="With --curve: 1e12 eFLOPs a question.")] = 1e4,
    context: Annotated[int, typer.Option(min=0, help="Tokens of a question.")] = 512,
    intensity: Annotated[float, typer.Option(min=0, help="FLOPs a byte of the device.")] = 562.5,
    variant: Annotated[str, typer.Option(help="released or paper: the authors' top-k cost, or the corrected one.")] = (
        "released"
    ),
    picture: Annotated[Path | None, typer.Option(help="Write the frontier here, as PNG.")] = None,
) -> None:
    """Costs of answers by length; with runs, accuracy against cost; with --curve, how long, how often, how sparse."""
    from .._checks import require_name
    from .._files import require_writable, write_whole
    from .cost import MODELS

    require_name("variant", variant, ("released", "paper"))
    if picture is not None:
        require_writable(picture)
    names = model or [name for name in MODELS if name.startswith("qwen3")]
    shapes = [MODELS[require_name("model", name, MODELS)] for name in names]
    if runs:
        fronts, points = _measured(runs, intensity, variant)
    elif curve:
        fronts, points = _planned(shapes, curve, budget, context, intensity)
    else:
        console().print(costs(shapes, context, intensity))
        fronts, points = {}, []
    if picture is not None:
        from .._checks import bad_value
        from .kinetics_plan import png

        if not fronts:
            raise bad_value("picture", str(picture), "runs or --curve: costs alone have no accuracy")
        console().print(f"picture: {write_whole(picture, png(fronts, points))}")


def costs(shapes: list[Any], context: int, intensity: float) -> Table:
    """Dense cost and the share of attention by length, and the same with 1024 keys in blocks of 16."""
    from rich import box
    from rich.table import Table

    from .kinetics import Sparsity, attention_share, dense_cost

    sparse = Sparsity(60, recent=64, block_size=16)
    made = Table(
        title=f"PeFLOPs of one answer (share of attention), {context} tokens of question, {intensity:g} FLOPs a byte",
        caption=f"sparse: {sparse}, 1024 keys a token",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    lengths = (1024, 8192, 32768)
    made.add_column("model", no_wrap=True)
    for length in lengths:
        made.add_column(f"{length}\ndense", justify="right", no_wrap=True)
        made.add_column(f"{length}\nsparse", justify="right", no_wrap=True)
    for shape in shapes:
        cells = []
        for length in lengths:
            options: dict[str, Any] = {"model": shape, "context": context, "generated": length, "intensity": intensity}
            for cost in (dense_cost(**options), sparse.cost(**options, variant="paper")):
                cells.append(f"{cost.total / 1e3:.3g} [dim]({attention_share(cost, shape, length):.0%})[/dim]")
        made.add_row(shape.name, *cells)
    return made


def _measured(paths: list[Path], intensity: float, variant: str) -> tuple[dict[str, Any], list[Any]]:
    from .kinetics import best_of_n, frontier, long_cot, read_run
    from .kinetics_plan import Plan

    points: list[Any] = []
    for path in paths:
        run = read_run(path)
        most = min(len(question.scores) for question in run.questions)
        trials = [n for n in (1, 2, 4, 8, 16, 32) if n <= most]
        points += best_of_n(run, trials, intensity=intensity, variant=variant)
        points += long_cot(run, intensity=intensity, variant=variant)
    dense = [point for point in points if point.sparsity == "dense"]
    made = Plan(max(p.total for p in points), None, None, frontier(points), frontier(dense))
    console().print(made.table())
    return {"all": made.front} | ({"dense": made.dense_front} if dense else {}), points


def _planned(
    shapes: list[Any], curves: list[str], budget: float, context: int, intensity: float
) -> tuple[dict[str, Any], list[Any]]:
    from .._checks import bad_value
    from .kinetics_plan import TaskCurve, plan

    parsed = []
    for text in curves:
        try:
            parsed.append(TaskCurve(*(float(part) for part in text.split(","))))
        except (ValueError, TypeError) as error:
            raise bad_value("curve", text, f"ceiling,tokens[,keys[,spread]] ({error})") from None
    if len(parsed) not in (1, len(shapes)):
        raise bad_value("curve", f"{len(parsed)} curves", f"one, or one for each of the {len(shapes)} models")
    shapes = sorted(shapes, key=lambda shape: -shape.params)
    models = list(zip(shapes, parsed * (len(shapes) if len(parsed) == 1 else 1)))
    found = plan(models, budget, context=context, intensity=intensity)
    out = console()
    out.print(found.table())
    for name, point in (("best", found.best), ("dense", found.dense)):
        if point is None:
            out.print(f"{name} within {budget:g}: nothing is that cheap")
        else:
            out.print(
                f"{name} within {budget:g}: {point.accuracy:.3f} with {point.model}, {point.generated} tokens, "
                f"{point.trials} trials, {point.sparsity}; costs {point.total:.4g}"
            )
    return {"all": found.front, "dense": found.dense_front}, []
