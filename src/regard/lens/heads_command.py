"""The command `regard lens heads`: the head atlas of a language model, printed, drawn and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .._console import console


def register(app: typer.Typer) -> None:
    """Add the command to `regard lens`."""
    app.command("heads")(heads)


def heads(
    model: Annotated[str, typer.Option(help="A hub name, a local folder, or smollm2-135m.")] = "smollm2-135m",
    out: Annotated[Path, typer.Option(help="Folder for heads.png, heads.json and heads.safetensors.")] = Path("heads"),
    kinds: Annotated[str, typer.Option(help="Kinds of heads, separated by commas; empty = all.")] = "",
    top: Annotated[int, typer.Option(help="Heads to print of each kind.")] = 6,
    prompts: Annotated[int, typer.Option(help="Prompts of prose, and of random tokens.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 256,
    needle_lengths: Annotated[str, typer.Option(help="Context lengths of the needles.")] = "256,512",
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
) -> None:
    """Find out which heads of a language model do what: retrieval, induction, duplicate-token, previous-token, sink, local."""
    from .. import load
    from .._files import require_writable
    from .head_atlas import KINDS, THRESHOLDS, head_atlas
    from .needle import NeedleHaystack

    files = [require_writable(out / f"heads.{suffix}") for suffix in ("png", "json", "safetensors")]
    wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()] or KINDS
    lengths = [int(part) for part in needle_lengths.split(",")]
    screen = console(stderr=True)
    with screen.status("loading the model"):
        loaded, tokenizer = load(model)
    with screen.status("looking at every head"):
        atlas = head_atlas(
            loaded,
            tokenizer,
            kinds=wanted,
            prompts=prompts,
            length=length,
            samples=NeedleHaystack(lengths=lengths),
            seed=seed,
        )
    atlas.info["model"] = model
    shape = next(iter(atlas.tables.values())).scores.shape
    table = Table(title=f"{model}: {shape[0]} layers x {shape[1]} heads")
    for column in ("kind", "called so above", "heads", "of all", "the best (layer-head score)"):
        table.add_column(column)
    for kind, scores in atlas.tables.items():
        named = atlas.heads(kind)
        best = "  ".join(f"{layer}-{head} {scores[layer, head]:.2f}" for layer, head in scores.ranking()[:top])
        share = f"{100 * len(named) / scores.scores.numel():.1f} %"
        table.add_row(kind, f"{THRESHOLDS[kind]:g}", str(len(named)), share, best)
    console().print(table)
    atlas.plot(files[0])
    for path in files[1:]:
        atlas.save(path)
    console().print(f"wrote {', '.join(str(path) for path in files)}", soft_wrap=True)
