"""The commands of this room: `regard scale simulate | plan | serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._console import console

scale = typer.Typer(help="Attention over several machines: balance it, simulate it.", no_args_is_help=True)

_RANKS = "Devices."


def register(app: typer.Typer) -> None:
    """Add the room's commands to the application."""
    app.add_typer(scale, name="scale")


@scale.command()
def simulate(
    devices: Annotated[int, typer.Option(min=1, help=_RANKS)] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens a device holds, even.")] = 16384,
    longest: Annotated[int, typer.Option(min=2, help="The longest document, even.")] = 524288,
    model: Annotated[str, typer.Option(help="A known model shape.")] = "llama-3-8b",
    device: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    shared: Annotated[int, typer.Option(min=1, help="Devices that share every layer (tensor parallel), one rank.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the document lengths (log-normal, median 2048).")] = 0,
    overlap: Annotated[bool, typer.Option(help="Travel behind the other half batch's computation.")] = True,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
) -> None:
    """One layer's forward on many devices, by the cost model: documents in order, packed, and with attention disaggregated."""
    from .._checks import require, require_name
    from .._files import require_writable, write_whole
    from ..bench.cost import DEVICES, MODELS
    from .simulate import sample_documents, table
    from .simulate import simulate as run

    require_name("model", model, MODELS)
    require_name("device", device, DEVICES)
    if json is not None:
        require_writable(json)
    need = f"a divisor of {devices} devices"
    require(devices % shared == 0, "shared", shared, need)
    ranks, tokens = devices // shared, tokens * shared
    lengths = sample_documents(ranks * tokens, longest, seed=seed)
    found = run(lengths, ranks, tokens, shape=MODELS[model], device=DEVICES[device].together(shared), overlap=overlap)
    title = (
        f"{model} on {devices} x {device}: {len(lengths)} documents up to {max(lengths)} tokens, "
        f"{ranks} ranks of {shared} with {tokens} tokens each"
    )
    console().print(table(found, title))
    if json is not None:
        import dataclasses
        import json as encoder

        rows = [dataclasses.asdict(outcome) for outcome in found]
        content = {
            "ranks": ranks,
            "tokens": tokens,
            "model": model,
            "device": device,
            "doc_lens": lengths,
            "rows": rows,
        }
        console().print(f"figures: {write_whole(json, encoder.dumps(content, indent=1) + chr(10))}")


@scale.command()
def plan(
    lengths: Annotated[list[int], typer.Argument(help="Tokens of each document.")],
    ranks: Annotated[int, typer.Option(min=1, help=_RANKS)] = 4,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a device holds. Default: an equal share.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share of the mean load that a device may lack.")] = 0.1,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks as well.")] = False,
) -> None:
    """Place documents and balance their attention: who computes what, and what travels."""
    from .planner import plan_tasks

    made = plan_tasks(lengths, ranks, tokens, tolerance=tolerance)
    console().print(made.report())
    if tasks:
        for task in made.tasks:
            console().print(
                f"document {task.doc}: rows {task.q_start}–{task.kv_len - 1}, rank {task.home} → server {task.server}"
            )


@scale.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Loopback only, unless told otherwise.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="First port; 0: free ones.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Server processes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 1,
) -> None:
    """Attention servers for clients that hold REGARD_SERVER_KEY; ends with standard input."""
    import sys

    from . import server

    options = {"--host": host, "--port": port, "--count": count, "--threads": threads}
    sys.argv = ["regard scale serve", *(str(part) for pair in options.items() for part in pair)]
    server.main()
