"""`regard bench ops`: times of the ops in one table, as ratios."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._console import console

if TYPE_CHECKING:
    from rich.table import Table

    from .ops import Row, Setting

_NOTE = """\
× dense: times faster than the dense op of the same pass in the same run, median over the rounds.
ideal: pairs of a query and a key that the dense op computes, over those that are left (both causal for windows and prefill);
for growth, time per token at the shortest length over that at this one. share: of the ideal, with the range over the rounds.
extra: peak memory beyond inputs and results."""


def register(bench: typer.Typer) -> None:
    """Add the command to `regard bench`."""
    bench.command()(ops)


def ops(
    only: Annotated[str | None, typer.Option(help="One part; default: all. A name that is none lists them.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short sequences: shows that it runs, proves nothing.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of the measurement. Default 5.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    flex: Annotated[bool, typer.Option(help="Compile FlexAttention as a peer (takes half a minute).")] = True,
) -> None:
    """Time attention ops beside dense SDPA, their ideal and FlexAttention, in one run."""
    import dataclasses

    import torch

    from .._checks import bad_value
    from .._files import require_writable
    from .ops import Setting, measure
    from .timing import machine

    if json is not None:
        require_writable(json)
    try:
        available = torch.device(device).type == "cpu" or torch.cuda.is_available()
    except RuntimeError as error:
        raise bad_value("device", device, "cpu or cuda") from error
    if not available:
        raise bad_value("device", device, "cpu: torch sees no CUDA GPU here")
    if threads is not None:
        torch.set_num_threads(threads)
    changes: dict[str, Any] = {} if rounds is None else {"rounds": rounds}
    setting = Setting.of(device, quick)
    setting = dataclasses.replace(setting, **changes, flex=setting.flex and flex)
    out, aside = console(), console(stderr=True)
    where = machine(device)
    out.print(f"{setting}; {where['device']}, {where['threads']} threads, torch {where['torch']}, load {where['load']}")
    if where["load"] != "unknown" and float(where["load"]) > 0.5 * float(where["cores"]):
        aside.print("[yellow]others are at work on this machine: times are rough[/yellow]")
    with aside.status("") as status:
        rows = measure(setting, only, lambda text: status.update(text))
    out.print(table(rows))
    out.print(_NOTE, style="dim")
    missed = [row for row in rows if row.holds is False]
    judged = [row for row in rows if row.holds is not None]
    if judged:
        out.print(f"targets met: {len(judged) - len(missed)} of {len(judged)}")
    if json is not None:
        save(json, rows, setting, where)
        out.print(f"figures: {json}")


def table(rows: list[Row]) -> Table:
    """The rows for the screen."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("what", min_width=34)
    for name in ("pass", "ms", "× dense", "ideal", "share (range)", "target", "peer"):
        made.add_column(name, justify="right" if name != "pass" else "left", no_wrap=name != "peer")
    made.add_column("MB", justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*_cells(row))
    return made


def _cells(row: Row) -> list[str]:
    from .timing import Ratio

    target = []
    if row.target is not None:
        target.append(f"share ≥{row.target:.2f}")
    if row.target_ratio is not None:
        target.append(f"≥{row.target_ratio:g}×")
    if row.peer_target is not None:
        target.append(f"≥{row.peer_target:g}× peer")
    colour = {True: "green", False: "red", None: "default"}[row.holds]
    mark = {True: " ✓", False: " ✗", None: ""}[row.holds]
    peers = [
        f"{peer.median:.2f}× {name}" if isinstance(peer, Ratio) else f"{name}: {peer}"
        for name, peer in row.peers.items()
    ]
    ranged = row.share or row.ratio
    return [
        row.what
        + (f" [dim]({row.backend})[/dim]" if row.backend else "")
        + (f"\n[dim]{row.note}[/dim]" if row.note else ""),
        {"forward": "fwd", "forward+backward": "fwd+bwd"}.get(row.pass_, row.pass_),
        f"{row.seconds * 1e3:.1f}",
        "" if row.ratio is None else f"{row.ratio.median:.2f}×",
        "" if row.ideal is None else f"{row.ideal:.2f}×",
        ("" if row.share is None else f"[{colour}]{row.share.median:.2f}[/{colour}] ")
        + ("" if ranged is None else f"[dim]{ranged.low:.2f}–{ranged.high:.2f}[/dim]"),
        "[{0}]{1}{2}[/{0}]".format(colour, "\n".join(target), mark) if target else "",
        "\n".join(peers),
        "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}",
    ]


def save(path: Path, rows: list[Row], setting: Setting, where: dict[str, str]) -> Path:
    """Write the figures as JSON, whole or not at all."""
    import dataclasses
    import json

    from .._files import write_whole

    content = {
        "machine": where,
        "setting": {**dataclasses.asdict(setting), "dtype": str(setting.dtype).removeprefix("torch.")},
        "rows": [{**dataclasses.asdict(row), "holds": row.holds} for row in rows],
    }
    return write_whole(path, json.dumps(content, indent=1) + "\n")
