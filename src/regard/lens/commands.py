"""The commands of this room: `regard look`, and `regard lens ...`."""

from __future__ import annotations

import importlib

import typer

from . import look_command

lens = typer.Typer(help="What the heads of a model do: printed, drawn and kept.", no_args_is_help=True)


@lens.callback()
def _group() -> None:
    pass  # with a callback a group of one command keeps that command's name


for _part in (".heads_command", ".influence_command", ".mass_command"):
    importlib.import_module(_part, __package__).register(lens)


def register(app: typer.Typer) -> None:
    """Add the room's commands to the application."""
    look_command.register(app)
    app.add_typer(lens, name="lens")
