"""Neighborhood attention on the CPU: tiles of the grid with the halo of keys around them, as pieces of the blocked engine.

All queries of a tile see keys of one box, so a tile is two dense products (its queries by its box) with what lies outside their windows
masked in between. Tiles of a dilated axis hold coordinates of one group, read and written with a step: nothing is permuted. Tiles
that are alike, as all in the interior are, share their mask and go through the products together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..mask_neighborhood import GridAxis
from .cpu_frame import Frame, Geometry, Keys, Rows
from .cpu_lower import GATHERED, PACKED, SCORES
from .cpu_pieces import Positions, flat_heads

_ROWS = 64  # queries of a tile, about: enough for the products to run at full speed
_IDLE = 32  # rows' worth of time that a product costs whatever its rows: what weighs larger tiles against smaller halos


class AxisTile(NamedTuple):
    """One axis of a tile: its coordinates and those of its box (both with step `dilation`), and who sees whom.

    `windows`: for each query its first and last key, counted from the start of the box; equal for tiles that are alike.
    """

    queries: slice
    keys: slice
    windows: tuple[tuple[int, int], ...]
    width: int
    first_offset: int
    """Places from the tile's first query to its box's first key."""


class Cell(NamedTuple):
    """A tile's coordinates and its box's, one slice an axis."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]


@dataclass(frozen=True)
class Kind:
    """What tiles that are alike share: extents of tile and box, and which key of the box each query sees.

    `additive` (r, w + extra): 0 where seen, -inf where not; None when every query sees the whole box. `offsets` (r, w): where the pair
    is in the table of relative biases, flattened.
    """

    tile: tuple[int, ...]
    box: tuple[int, ...]
    additive: Tensor | None
    offsets: Tensor


@dataclass
class Halo:
    """Tiles of one kind for flat kv heads [lo, hi); units run tile by tile, within a tile head by head.

    Key rows from `tokens` on are `extra` ones that every query sees. A bias is (1, H | 1, 1, entries): read at `offsets`, 0 for extras.
    """

    lo: int
    hi: int
    cells: list[Cell]
    kind: Kind
    grid: tuple[int, ...]
    extra: int
    shape: tuple[int, int, int, int]
    may_be_empty: bool = False

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def _query_grid(self, rows: Rows) -> Tensor:
        """(heads, group, *grid, width)."""
        grouped = rows.grouped[self.lo : self.hi]
        return grouped.reshape(*grouped.shape[:2], *self.grid, grouped.shape[3])

    def _key_grid(self, keys: Keys) -> Tensor:
        """(heads, *grid, width)."""
        own = keys.flat[self.lo : self.hi, : self.tokens]
        return own.reshape(own.shape[0], *self.grid, own.shape[2])

    def rows(self, rows: Rows, frame: Frame, name: str) -> Tensor:
        n, g, r, _ = self.shape
        grid = self._query_grid(rows)
        width, heads = grid.shape[-1], self.hi - self.lo
        out = frame.scratch(name, len(self.cells), heads, g, *self.kind.tile, width)
        for place, cell in zip(out, self.cells):
            place.copy_(grid[(slice(None), slice(None), *cell.queries)])
        return out.view(n, g * r, width)

    def put(self, rows: Rows, values: Tensor, divisor: Tensor | None = None) -> None:
        g = self.shape[1]
        grid = self._query_grid(rows)
        values = values if divisor is None else values.div_(divisor)
        for cell, value in zip(self.cells, values.view(len(self.cells), self.hi - self.lo, g, *self.kind.tile, -1)):
            grid[(slice(None), slice(None), *cell.queries)] = value

    def keys(self, keys: Keys, frame: Frame, name: str) -> Tensor:
        n, _, _, w = self.shape
        grid = self._key_grid(keys)
        width, heads, own = grid.shape[-1], self.hi - self.lo, w - self.extra
        out = frame.scratch(name, len(self.cells), heads, w, width)
        for place, cell in zip(out, self.cells):
            place[:, :own].view(heads, *self.kind.box, width).copy_(grid[(slice(None), *cell.keys)])
        if self.extra:
            out[:, :, own:] = keys.flat[self.lo : self.hi, self.tokens :]
        return out.view(n, w, width)

    def add_product(self, keys: Keys, weights: Tensor, rows: Tensor, scale: float, frame: Frame) -> None:
        n, _, _, w = self.shape
        width, heads, own = keys.flat.shape[2], self.hi - self.lo, w - self.extra
        out = frame.scratch("product", n, w, width)
        torch.baddbmm(out, weights.mT, rows, beta=0, alpha=scale, out=out)
        by_tile = out.view(len(self.cells), heads, w, width)
        grid = self._key_grid(keys)
        for value, cell in zip(by_tile, self.cells):
            grid[(slice(None), *cell.keys)] += value[:, :own].view(heads, *self.kind.box, width)
        if self.extra:
            keys.flat[self.lo : self.hi, self.tokens :] += by_tile[:, :, own:].sum(0)

    def positions(self, geometry: Geometry) -> Positions:
        b, h = flat_heads(torch.arange(self.lo, self.hi).repeat(len(self.cells)), geometry, per_group=True)
        number, heads = torch.arange(self.tokens).view(self.grid), self.hi - self.lo
        qi = torch.stack([number[cell.queries].flatten() for cell in self.cells]).repeat_interleave(heads, 0)
        ki = torch.stack([number[cell.keys].flatten() for cell in self.cells]).repeat_interleave(heads, 0)
        ki = torch.cat([ki, (self.tokens + torch.arange(self.extra)).expand(ki.shape[0], -1)], dim=1)
        return b, h, qi[:, None, :, None] + geometry.q_offset, ki[:, None, None, :]

    def forbid(self, scores: Tensor, frame: Frame) -> None:
        if self.kind.additive is not None:
            scores.add_(self.kind.additive)

    def _heads(self, matrix: Tensor, geometry: Geometry) -> Tensor:
        """Head of the table for each flat head and member of its group, (heads, g)."""
        _, h = flat_heads(torch.arange(self.lo, self.hi), geometry, per_group=True)
        return h[:, :, 0, 0] * (matrix.shape[1] > 1)

    def pick(self, matrix: Tensor, geometry: Geometry) -> Tensor:
        bias = matrix[0, :, 0][self._heads(matrix, geometry)][..., self.kind.offsets]  # (heads, g, r, w)
        bias = torch.nn.functional.pad(bias, (0, self.extra)) if self.extra else bias
        return bias.repeat(len(self.cells), 1, 1, 1)

    def add_to(self, matrix: Tensor, values: Tensor, geometry: Geometry) -> None:
        own = self.shape[3] - self.extra
        by_head = values.view(len(self.cells), self.hi - self.lo, *values.shape[1:])[..., :own].sum(0)
        tables = matrix.new_zeros((*by_head.shape[:2], matrix.shape[3]))
        tables.index_add_(2, self.kind.offsets.flatten(), by_head.flatten(2))
        matrix[0, :, 0].index_add_(0, self._heads(matrix, geometry).flatten(), tables.flatten(0, 1))


def tile_extents(axes: tuple[GridAxis, ...], group: int = 1) -> tuple[int, ...]:
    """Places of a tile along each axis that make the least work: larger tiles feed the products, smaller ones have smaller halos."""
    rows = max(1, -(-_ROWS // group))

    def options(axis: GridAxis) -> list[int]:
        longest = axis.places(0)
        steps = {min(longest, 1 << power) for power in range(rows.bit_length() + 1)}
        steps |= {min(longest, axis.stride * n) for n in range(1, max(1, rows // axis.stride) + 1) if axis.stride > 1}
        # a window as long as the axis has no halo: then nothing speaks for small tiles
        return sorted(steps | ({longest} if axis.kernel == longest else set()))

    def cost(extents: tuple[int, ...]) -> float:
        queries = group * math.prod(extents)
        box = math.prod(
            min(
                axis.places(0),
                axis.kernel + (extent - 1 if axis.stride == 1 else (extent - 1) // axis.stride * axis.stride),
            )
            for axis, extent in zip(axes, extents)
        )
        tiles = math.prod(-(-axis.places(0) // extent) for axis, extent in zip(axes, extents))
        return tiles * box * (queries + _IDLE)

    fitting = [extents for extents in product(*map(options, axes)) if math.prod(extents) <= 4 * rows]
    return min(fitting, key=lambda extents: (cost(extents), extents))


def _axis_tiles(axis: GridAxis, extent: int) -> list[AxisTile]:
    tiles = []
    for remainder in range(axis.dilation):
        first, last = (x.tolist() for x in axis.windows(remainder))
        for lo in range(0, len(first), extent):
            hi = min(lo + extent, len(first))
            start, stop = first[lo], last[hi - 1] + 1  # windows move to the right only
            queries, keys = (
                slice(remainder + axis.dilation * a, remainder + axis.dilation * (b - 1) + 1, axis.dilation)
                for a, b in ((lo, hi), (start, stop))
            )
            windows = tuple((a - start, b - start) for a, b in zip(first[lo:hi], last[lo:hi]))
            tiles.append(AxisTile(queries, keys, windows, stop - start, start - lo))
    return tiles


def _kind(axes: tuple[GridAxis, ...], tiles: tuple[AxisTile, ...], extra: int, dtype: torch.dtype) -> Kind:
    allowed = torch.ones((1, 1), dtype=torch.bool)
    offsets = torch.zeros((1, 1), dtype=torch.long)
    for axis, tile in zip(axes, tiles):
        query, key = torch.arange(len(tile.windows))[:, None], torch.arange(tile.width)[None]
        first, last = (torch.tensor([window[end] for window in tile.windows])[:, None] for end in (0, 1))
        seen = (first <= key) & (key <= last)
        # key minus query, from -(kernel - 1) to kernel - 1; what is not seen may lie beyond, anywhere in the table will do
        offset = (key + tile.first_offset - query + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        r, w = allowed.shape
        allowed = (allowed[:, None, :, None] & seen[None, :, None, :]).reshape(r * query.shape[0], w * key.shape[1])
        offsets = offsets[:, None, :, None] * (2 * axis.kernel - 1) + offset[None, :, None, :]
        offsets = offsets.reshape(allowed.shape)
    additive = None
    if not bool(allowed.all()):
        additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
        additive = torch.nn.functional.pad(additive, (0, extra))
    return Kind(tuple(len(tile.windows) for tile in tiles), tuple(tile.width for tile in tiles), additive, offsets)


@lru_cache(maxsize=16)
def lower(
    axes: tuple[GridAxis, ...], geometry: Geometry, width: int, dtype: torch.dtype, packed: bool, threads: int
) -> list[Halo]:
    """Pieces that cover every query of the grid. `geometry.kv_len` beyond the tokens are extra keys; `width`: dims of a key and a value."""
    grid = tuple(axis.length for axis in axes)
    extra = geometry.kv_len - math.prod(grid)
    extents = tile_extents(axes, geometry.group)
    cells: dict[tuple, list[Cell]] = defaultdict(list)
    samples: dict[tuple, tuple[AxisTile, ...]] = {}
    for tiles in product(*(_axis_tiles(axis, extent) for axis, extent in zip(axes, extents))):
        alike = tuple((tile.windows, tile.width, tile.first_offset) for tile in tiles)
        samples.setdefault(alike, tiles)
        cells[alike].append(Cell(tuple(tile.queries for tile in tiles), tuple(tile.keys for tile in tiles)))
    heads = geometry.batch * geometry.num_kv_heads
    pieces = []
    for alike, tiles in samples.items():
        kind = _kind(axes, tiles, extra, dtype)
        r, w = math.prod(kind.tile), math.prod(kind.box) + extra
        more = PACKED if packed else 1
        fitting = min(more * SCORES // (geometry.group * r * w), more * GATHERED // (width * w))
        units = max(threads, fitting // threads * threads)
        step = min(heads, units)
        some = max(1, units // step)
        for lo in range(0, heads, step):
            for first in range(0, len(cells[alike]), some):
                part, hi = cells[alike][first : first + some], min(lo + step, heads)
                pieces.append(Halo(lo, hi, part, kind, grid, extra, (len(part) * (hi - lo), geometry.group, r, w)))
    return pieces
