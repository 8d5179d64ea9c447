"""The command `regard lens mass`: how much attention goes from which part of a prompt to which, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .._console import console


def register(app: typer.Typer) -> None:
    """Add the command to `regard lens`."""
    app.command("mass")(mass)


def mass(
    prompt: Annotated[str, typer.Option(help="The user's words; @FILE reads them from a file.")],
    model: Annotated[str, typer.Option(help="A hub name, a local folder, or smollm2-135m.")] = "smollm2-135m",
    system: Annotated[
        str, typer.Option(help="What the system says; empty = what the chat template says by itself.")
    ] = "",
    part: Annotated[list[str] | None, typer.Option(help="NAME=TEXT: a piece of the prompt; may be repeated.")] = None,
    plain: Annotated[bool, typer.Option(help="Plain text, without the chat template.")] = False,
    layer: Annotated[int | None, typer.Option(help="One layer's table instead of the mean over all.")] = None,
    png: Annotated[Path | None, typer.Option(help="Heat maps of all heads, from the last token.")] = None,
) -> None:
    """Print how much attention the spans of a prompt give each other, and the prompt's last token gives them."""
    from .. import load
    from .._files import require_writable
    from ..integrations.spans import chat_spans, text_spans
    from .attention_mass import span_mass

    parts = _parts(part or [])
    if png is not None:
        require_writable(png)
    text = Path(prompt[1:]).read_text() if prompt.startswith("@") else prompt
    screen = console(stderr=True)
    with screen.status("loading the model"):
        loaded, tokenizer = load(model)
    if plain:
        made = text_spans(tokenizer, text, parts)
        made.mark("prompt", text)
    else:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        made = chat_spans(tokenizer, [*messages, {"role": "user", "content": text}], parts)
    with screen.status("looking"):
        found = span_mass(loaded, made, queries=[*made.spans, "last"])
    table = Table(title=f"{model}, {made.input_ids.shape[1]} tokens: mean attention from (row) to (column)")
    table.add_column("from")
    for name in found.keys:
        table.add_column(name, justify="right")
    for name, row in found.table(layer=layer).items():
        table.add_row("last token" if name == "last" else name, *(f"{value:.3f}" for value in row.values()))
    console().print(table)
    if png is not None:
        console().print(f"wrote {found.plot(png, 'last')}", soft_wrap=True)


def _parts(given: list[str]) -> dict[str, str]:
    from .._checks import bad_value

    parts: dict[str, str] = {}
    for text in given:
        name, sign, piece = text.partition("=")
        if not (name.strip() and sign and piece):
            raise bad_value("part", text, "NAME=TEXT")
        parts[name.strip()] = piece
    return parts
