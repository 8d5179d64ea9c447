"""The command line: `regard papers | verify | compare | bench | look | lens`.

Thin on purpose: each room says what its commands are (`register(app)` in the room's own file) and does the work. Those files
import nothing heavy at their top, so that `regard --help` answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Annotated

import typer

from . import __version__

app = typer.Typer(
    name="regard",
    help="One library for attention: build with it, put it into pretrained models, look at it, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _room in (".papers.commands", ".bench.verify", ".bench.commands", ".lens.commands", ".scale.commands"):
    if importlib.util.find_spec(_room, __package__) is not None:
        importlib.import_module(_room, __package__).register(app)


def main() -> None:
    """Entry point of the `regard` script: what is wrong with the input becomes one clear line and exit status 2.

    `REGARD_TRACEBACK=1` shows where it was raised.
    """
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("REGARD_TRACEBACK"):
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
