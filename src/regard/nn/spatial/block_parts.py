"""Parts that the blocks of vision transformers on tokens (B, N, C) and on maps (B, C, H, W) share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ..layers import drop_samples
from .grids import Grid, from_windows, grid_pair, to_windows

__all__ = [
    "LayerNorm2d",
    "Mlp",
    "WindowedBlock",
    "attend_in_windows",
    "interleaved_rotary_2d",
    "rotate_pairs",
    "tokens_to_map",
]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with dropout after both: (..., dim) kept. Parameter names are timm's."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def tokens_to_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, height * width, C), rows first -> (B, C, height, width)."""
    return x.transpose(1, 2).unflatten(2, grid)


def attend_in_windows(
    attend: Callable[[Tensor], Tensor], x: Tensor, grid: Grid, window: Grid, shift: int = 0
) -> Tensor:
    """`attend` on the windows of x (B, height * width, C), rolled by `shift` cells before they are cut (Swin)."""
    maps = x.unflatten(1, grid).roll((-shift, -shift), (1, 2))
    maps = from_windows(attend(to_windows(maps, window)), window, grid)
    return maps.roll((shift, shift), (1, 2)).flatten(1, 2)


class WindowedBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`, over a whole grid or in windows of it. A subclass makes these four and `drop_path`.

    Args:
        grid: int or (height, width). cls_tokens: tokens in front of the grid's; 0 together with windows.
        window: side of the windows, int or (height, width), which divides the grid; an int not smaller than the grid's shorter side
            becomes that side, without a shift. None: no windows. shift: cells by which the grid is rolled before it is cut.
    """

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path: float

    def __init__(self, grid: int | Grid, window: int | Grid | None, shift: int, cls_tokens: int) -> None:
        super().__init__()
        self.grid = grid_pair("grid", grid)
        self.window: Grid | None = None
        self.shift = require_int("shift", shift)
        if window is None:
            require(shift == 0, "shift", shift, "0 without a window")
            return
        require(cls_tokens == 0, "cls_tokens", cls_tokens, "0 together with window")
        if isinstance(window, int) and window >= min(self.grid):
            window, self.shift = min(self.grid), 0
        self.window = grid_pair("window", window)
        cut = all(cells % side == 0 for cells, side in zip(self.grid, self.window))
        require(cut, "window", self.window, f"sides that divide grid {self.grid}")
        require(self.shift < min(self.window), "shift", shift, f"less than the window's shorter side {self.window}")

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        require(grid is None or self.window is None, "grid", grid, "None in a block with windows")
        x = x + drop_samples(self._attend(self.norm1(x), grid), self.drop_path, self.training)
        return x + drop_samples(self.mlp(self.norm2(x)), self.drop_path, self.training)

    def _attend(self, x: Tensor, grid: int | Grid | None) -> Tensor:
        if self.window is None:
            return self.attn(x, grid)
        cells = math.prod(self.grid)
        require(x.shape[1] == cells, "x", f"shape {tuple(x.shape)}", f"{cells} tokens for grid {self.grid}")
        return attend_in_windows(self._in_windows, x, self.grid, self.window, self.shift)

    def _in_windows(self, windows: Tensor) -> Tensor:
        return self.attn(windows)


def interleaved_rotary_2d(grid: Grid, dims: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height * width, dims) float32 of a grid's cells: half of the channels turns with the row, then half with the
    column. Pairs are neighbours (0 with 1, 2 with 3, ...); their rates fall from 1 to 1 / 10000 in dims // 4 steps. dims: a multiple of 4.
    """
    rates = (1.0 / 10000 ** torch.linspace(0, 1, dims // 4)).to(device).repeat_interleave(2)
    rows, columns = (torch.arange(side, device=rates.device)[:, None] * rates for side in grid)
    both = (rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1))
    angles = torch.cat(both, dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the neighbouring channel pairs of x (B, H, N, D) by a table (N, D) of `interleaved_rotary_2d`."""
    cos, sin = (part.to(x.dtype) for part in table)
    other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + other * sin
