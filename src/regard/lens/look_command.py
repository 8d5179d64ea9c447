"""The command `regard look`: a prompt in, one HTML page out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._console import console


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(look)


def look(
    prompt: Annotated[str, typer.Option(help="The text to look at; @FILE reads it from a file.")],
    model: Annotated[str, typer.Option(help="A hub name, a local folder, or smollm2-135m.")] = "smollm2-135m",
    html: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("look.html"),
    max_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 1024,
    retrieval: Annotated[
        bool, typer.Option(help="Also score retrieval heads on hidden needles (takes longer).")
    ] = True,
) -> None:
    """Write one self-contained page: every head of the model, coloured by a probe, and what each token reads."""
    from .. import load
    from .._files import require_writable, write_whole
    from .look import look as make
    from .retrieval_heads import retrieval_heads

    require_writable(html)
    text = Path(prompt[1:]).read_text() if prompt.startswith("@") else prompt
    screen = console(stderr=True)
    with screen.status("loading the model"):
        loaded, tokenizer = load(model)
    scores = {}
    if retrieval:
        with screen.status("scoring retrieval heads on hidden needles"):
            scores["retrieval"] = retrieval_heads(loaded, tokenizer)
    with screen.status("looking"):
        page = make(
            loaded, tokenizer, text, title=f"{model}: what every head looks at", scores=scores, max_tokens=max_tokens
        )
    write_whole(html, page)
    console().print(f"wrote {html.resolve()} ({len(page) / 2**20:.1f} MB)", soft_wrap=True)
