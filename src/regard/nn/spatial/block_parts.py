"""Parts that the blocks of vision transformers on tokens (B, N, C) and on maps (B, C, H, W) share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grids import Grid, from_windows, to_windows

__all__ = ["LayerNorm2d", "Mlp", "attend_in_windows", "interleaved_rotary_2d", "rotate_pairs", "tokens_to_map"]


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
