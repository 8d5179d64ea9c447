"""Grids of tokens and windows on them, shared by the spatial mixers."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from ..._checks import bad_type, require, require_int

Grid = tuple[int, int]


def grid_pair(name: str, value: int | Grid) -> Grid:
    """(height, width) from an int (square) or a pair, each >= 1."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise bad_type(name, value, "an int or a pair (height, width)")
    return require_int(name, value[0], 1), require_int(name, value[1], 1)


def to_windows(maps: Tensor, window: Grid) -> Tensor:
    """Cut (B, height, width, C) into windows without overlap: (B * windows, window height * window width, C), rows first."""
    height, width = maps.shape[1:3]
    fits = height % window[0] == 0 and width % window[1] == 0
    require(fits, "window", window, f"sides that divide the grid {(height, width)}")
    return rearrange(maps, "b (i h) (j w) c -> (b i j) (h w) c", h=window[0], w=window[1])


def from_windows(windows: Tensor, window: Grid, grid: Grid) -> Tensor:
    """Undo `to_windows`: (B * windows, cells, C) back to (B, height, width, C)."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    return rearrange(windows, "(b i j) (h w) c -> b (i h) (j w) c", i=rows, j=columns, h=window[0], w=window[1])
