"""Neighborhoods: on a grid of tokens, a query sees the window of keys around it, shifted inwards (not cut) at the borders.

Faster Neighborhood Attention (Hassani et al., 2024, arXiv 2403.04690) with stride as in Generalized Neighborhood Attention. Code read
for numbers: SHI-Labs/NATTEN, `src/natten/backends/flex.py` and `utils/checks.py` (MIT). The rule of one axis is `GridAxis`; a query
sees the product of its axes' windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, require, require_int
from .mask_base import Mask
from .range_extremes import range_extremes, range_table


@dataclass(frozen=True)
class GridAxis:
    """One axis of a grid and its window: `kernel` keys, moved in steps of `stride`, `dilation` apart.

    Coordinates with the same remainder by `dilation` form a group; x = remainder + dilation * place, and windows are ranges of places.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def places(self, remainder: int) -> int:
        """How many coordinates have this remainder."""
        return -(-(self.length - remainder) // self.dilation)

    def windows(self, remainder: int) -> tuple[Tensor, Tensor]:
        """First and last place that each place of the group sees, both inclusive, (places,) each.

        All queries of a stride's step look from one leader. Around it lie `kernel // 2` keys on the left and as many on the right (one
        less where `kernel` is even); where that would leave the group the window is shifted, so it always has `kernel` keys. A causal
        window ends at the query itself and starts `kernel - 1` before the last query of the step.
        """
        count = self.places(remainder)
        place = torch.arange(count)
        step = place // self.stride * self.stride
        if self.causal:
            leader = (step + self.stride - 1).clamp(max=count - 1)
            return (leader - self.kernel + 1).clamp(min=0), place
        left, right = self.kernel // 2, (self.kernel - 1) // 2
        leader = (step + self.stride // 2).clamp(max=count - 1)
        first = leader.clamp(left, count - 1 - right) - left
        return first, first + self.kernel - 1

    @property
    def sees_all(self) -> bool:
        """Whether every coordinate sees every other."""
        return not self.causal and self.dilation == 1 and self.kernel == self.length

    def by_coordinate(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rank, first, last) for each coordinate, (length,) each: coordinates are ranked group after group, and a coordinate sees
        exactly the ranks first .. last."""
        rank, first, last = (torch.empty(self.length, dtype=torch.long) for _ in range(3))
        start = 0
        for remainder in range(self.dilation):
            low, high = self.windows(remainder)
            count = low.shape[0]
            rank[remainder :: self.dilation] = torch.arange(start, start + count)
            first[remainder :: self.dilation] = low + start
            last[remainder :: self.dilation] = high + start
            start += count
        return rank, first, last


def grid_axes(
    shape: Any, kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False
) -> tuple[GridAxis, ...]:
    """The axes of a grid of 1 to 3 dimensions. Each option is one value for all axes or a sequence with one an axis.

    Raises ValueError / TypeError unless 1 <= kernel_size, kernel_size * dilation <= length and 1 <= stride <= kernel_size on every axis.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    require(1 <= len(sizes) <= 3, "shape", shape, "1 to 3 lengths")
    lengths = [require_int("shape", size, 1) for size in sizes]
    kernels, strides, dilations = (
        _per_axis(name, value, len(sizes))
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    causal = is_causal if isinstance(is_causal, Sequence) else (is_causal,) * len(sizes)
    require(len(causal) == len(sizes), "is_causal", is_causal, f"a bool, or {len(sizes)} of them")
    for flag in causal:
        if not isinstance(flag, bool):
            raise bad_type("is_causal", flag, "a bool, or one an axis")
    axes = tuple(GridAxis(*values) for values in zip(lengths, kernels, strides, dilations, causal))
    for number, axis in enumerate(axes):
        reach = axis.kernel * axis.dilation
        got = f"{axis.kernel} (with dilation {axis.dilation}) on axis {number}"
        require(
            reach <= axis.length, "kernel_size", got, f"kernel_size * dilation <= {axis.length}, the length of the axis"
        )
        require(
            axis.stride <= axis.kernel,
            "stride",
            f"{axis.stride} on axis {number}",
            f"at most kernel_size = {axis.kernel}",
        )
    return axes


def _per_axis(name: str, value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    require(len(values) == count, name, value, f"an int, or {count} of them: one for each axis of the grid")
    return tuple(require_int(name, one, 1) for one in values)


def tile_order(axes: tuple[GridAxis, ...], tile: tuple[int, ...]) -> Tensor:
    """Row-major token numbers, (tokens,), in the order of tiles of `tile` places: neighbors on the grid become neighbors in the order.

    Every group of a dilated axis is tiled by itself, so that a tile's windows lie close together."""
    keys = []
    for axis, extent in zip(axes, tile):
        coordinate = torch.arange(axis.length)
        remainder, place = coordinate % axis.dilation, coordinate // axis.dilation
        keys.append((remainder * axis.length + place // extent, place % extent))
    order = torch.arange(math.prod(axis.length for axis in axes)).view([axis.length for axis in axes])
    number = torch.zeros_like(order)
    for which in (0, 1):  # tiles first, then within the tile
        for dim, (axis, key) in enumerate(zip(axes, keys)):
            shape = [1] * len(axes)
            shape[dim] = axis.length
            number = number * (int(key[which].max()) + 1) + key[which].view(shape)
    return order.flatten()[number.flatten().argsort()]


class Neighborhood(Mask):
    """Positions are tokens of the grid, row-major or in the order of tiles; positions from `tokens` on are extra keys that all see."""

    frozen = True

    def __init__(self, axes: tuple[GridAxis, ...], tile: tuple[int, ...] | None = None) -> None:
        self.axes, self.tile = axes, tile
        self.tokens = math.prod(axis.length for axis in axes)
        self.order = None if tile is None else tile_order(axes, tile)
        tables = []
        for dim, axis in enumerate(axes):
            shape = [1] * len(axes)
            shape[dim] = axis.length
            for values in axis.by_coordinate():
                spread = values.view(shape).expand([other.length for other in axes]).reshape(-1)
                tables.append(spread if self.order is None else spread[self.order])
        self.table = torch.stack(tables).int()  # (axes * (rank, first, last), tokens)
        self._ranges: Tensor | None = None

    def keep(self, b, h, q_idx, kv_idx):
        table = self.table.to(q_idx.device)
        query, key = q_idx.clamp(0, self.tokens - 1), kv_idx.clamp(0, self.tokens - 1)
        kept = kv_idx >= self.tokens
        inside = ~kept
        for row in range(0, table.shape[0], 3):
            rank = table[row][key]
            inside = inside & (table[row + 1][query] <= rank) & (rank <= table[row + 2][query])
        return inside | kept

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        if self._ranges is None:
            self._ranges = range_table(self.table)
        ranges = self._ranges.to(q_lo.device)
        some = every = (q_lo == q_lo) & (kv_lo < self.tokens)
        for row in range(0, ranges.shape[2], 3):
            (rank_min, rank_max), (first_min, first_max), (last_min, last_max) = (
                range_extremes(ranges, torch.full_like(lo, row + which), lo, hi)
                for which, lo, hi in ((0, kv_lo, kv_hi), (1, q_lo, q_hi), (2, q_lo, q_hi))
            )
            some = some & (first_min <= rank_max) & (rank_min <= last_max)
            every = every & (first_max <= rank_min) & (rank_max <= last_min)
        return some | (kv_hi >= self.tokens), every | ((kv_lo >= self.tokens) & (q_lo == q_lo))

    def __repr__(self) -> str:
        shape, kernel, stride, dilation, causal = (
            tuple(getattr(axis, name) for axis in self.axes)
            for name in ("length", "kernel", "stride", "dilation", "causal")
        )
        return f"neighborhood({shape}, {kernel}, stride={stride}, dilation={dilation}, is_causal={causal}, tile={self.tile})"
