"""Where tables are printed: the terminal's own width, and a readable one when the output goes into a pipe or a file."""

from __future__ import annotations

import os

from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A console for one command's output. `COLUMNS` sets the width; without it and without a terminal it is 120."""
    plain = Console(stderr=stderr, highlight=False)
    if plain.is_terminal or "COLUMNS" in os.environ:
        return plain
    return Console(stderr=stderr, highlight=False, width=120)
