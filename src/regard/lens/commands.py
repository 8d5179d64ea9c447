"""The commands of this room: `regard look`."""

from __future__ import annotations

import typer

from . import look_command


def register(app: typer.Typer) -> None:
    """Add the room's commands to the application."""
    look_command.register(app)
