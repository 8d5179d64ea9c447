"""The commands of this room: `regard compare`, and `regard bench ...`."""

from __future__ import annotations

import importlib
import importlib.util

import typer

from . import compare_command

bench = typer.Typer(
    help="Speed and claims, measured here: ratios beside dense attention, in one run.", no_args_is_help=True
)

for _part in (
    ".ops_command",
    ".claims_command",
    ".cost_command",
    ".kinetics_command",
    ".cab_command",
    ".mixers_command",
    ".ocw_command",
    ".edits_command",
):
    if importlib.util.find_spec(_part, __package__) is not None:
        importlib.import_module(_part, __package__).register(bench)


def register(app: typer.Typer) -> None:
    """Add the room's commands to the application."""
    compare_command.register(app)
    app.add_typer(bench, name="bench")
