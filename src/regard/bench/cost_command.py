"""`regard bench cost`: the cost model beside the clock, or what methods cost on a model and a device by the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .._console import console

_NOTE = """\
ratio: measured over predicted, with its range over the rounds. 1 is a machine that reaches its own matrix products, memory and
exponentials in attention; above 1 is what the model leaves out (scheduling, caches missed, blocks that do not fill)."""


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(cost)


def cost(
    model: Annotated[
        str | None, typer.Option(help="A known model shape: predict what methods cost on it, measure nothing.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="With --model: tokens of context.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="With --model: sequences decoded together.")] = 1,
    budget: Annotated[float, typer.Option(help="With --model: budget of the methods, a share or tokens.")] = 0.125,
    target: Annotated[str, typer.Option(help="With --model: a100, h100, h200, b200, or here.")] = "h100",
    device: Annotated[str, typer.Option(help="cpu or cuda, for what is measured.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the measurement.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences: shows that it runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """Predicted beside measured times of attention; with --model, what each method costs there."""
    import torch

    from .._checks import bad_value, require_name
    from .._files import require_writable
    from .cost import DEVICES, MODELS, Device

    if json is not None:
        require_writable(json)
    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise bad_value("device", device, "cpu: torch sees no CUDA GPU here")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if model is not None:
        require_name("model", model, MODELS)
        require_name("target", target, [*DEVICES, "here"])
        where = Device.measure(device, dtype) if target == "here" else DEVICES[target]
        tokens: int | float = int(budget) if budget > 1 else budget
        figures = _predict(MODELS[model], where, context, batch, tokens)
    else:
        figures = _check(device, dtype, quick, rounds)
    if json is not None:
        import json as encoder

        from .._files import write_whole

        console().print(f"figures: {write_whole(json, encoder.dumps(figures, indent=1) + chr(10))}")


def _check(device: str, dtype: Any, quick: bool, rounds: int) -> dict[str, Any]:
    import dataclasses

    from rich import box
    from rich.table import Table

    from .cost import Device
    from .cost_check import check
    from .timing import machine

    facts = machine(device)
    out, aside = console(), console(stderr=True)
    with aside.status("measuring the machine") as status:
        where = Device.measure(device, dtype)
        rows = check(where, where=device, dtype=dtype, quick=quick, rounds=rounds, say=lambda text: status.update(text))
    out.print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, load {facts['load']}: "
        f"{where.flops / 1e9:.0f} GFLOP/s, {where.bandwidth / 1e9:.1f} GB/s, {where.exp_rate / 1e9:.2f} G exp/s, "
        f"{where.overhead * 1e6:.1f} us a call"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attention with 9 query heads, 3 kv heads of 64")
    for name in ("GFLOP", "MB", "predicted ms", "measured ms", "ratio (range)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.what} [dim]({row.backend})[/dim]",
            f"{row.flops / 1e9:.3g}",
            f"{row.bytes / 1e6:.3g}",
            f"{row.predicted * 1e3:.3g}",
            f"{row.measured * 1e3:.3g}",
            f"{row.ratio.median:.2f} [dim]{row.ratio.low:.2f}–{row.ratio.high:.2f}[/dim]",
        )
    out.print(table)
    out.print(_NOTE, style="dim")
    return {
        "machine": facts,
        "device": dataclasses.asdict(where),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _predict(shape: Any, where: Any, context: int, batch: int, budget: int | float) -> dict[str, Any]:
    from rich import box
    from rich.table import Table

    from .cost import decode_cost, prefill_cost
    from .roster import ROSTER, parse_method

    table = Table(
        title=f"{shape.name} at {context} tokens, batch {batch}, budget {budget:g}, on {where.name}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("method")
    for name in ("prefill\nPFLOP", "prefill\ns", "token\nGFLOP", "token\nMB moved", "token\nms", "KV\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = []
    for name in ROSTER:
        try:
            _, method = parse_method(name, budget=budget, context=context)
            first = prefill_cost(shape, method, context, batch=batch)
            step = decode_cost(shape, method, context, batch=batch)
        except ValueError as error:
            console(stderr=True).print(f"[yellow]{name}: {error}[/yellow]")
            continue
        fits = "" if step.fits(where, shape) else " [red](does not fit)[/red]"
        rows.append(
            {
                "method": name,
                "prefill_flops": first.flops,
                "prefill_seconds": first.seconds(where),
                "token_flops": step.flops,
                "token_bytes": step.bytes,
                "token_seconds": step.seconds(where),
                "kv_bytes": step.held_bytes,
            }
        )
        table.add_row(
            name + fits,
            f"{first.flops / 1e15:.3g}",
            f"{first.seconds(where):.3g}",
            f"{step.flops / 1e9:.3g}",
            f"{step.bytes / 1e6:.0f}",
            f"{step.seconds(where) * 1e3:.3g}",
            f"{step.held_bytes / 1e6:.0f}",
        )
    console().print(table)
    return {"model": shape.name, "context": context, "batch": batch, "device": where.name, "rows": rows}
