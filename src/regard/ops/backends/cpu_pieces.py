"""Pieces of a blocked attention call: some query rows of some heads, with all the keys that they may see.

Because a piece holds every key of its rows, its softmax is final: nothing is merged, and the backward pass needs only q, k, v.
`Slice` reads its keys as views: one run of adjacent blocks (sliding window, causal, prefix, document ...), or a few runs put side
by side (sinks + window). `Gather` collects the key blocks of many (head, query block) units with equally long lists.

Both offer the same few methods to the engine in `cpu.py`; shapes there: n heads or units, g query heads of a group, r rows,
w keys; rows are (n, g * r, D), keys (n, w, D), scores (n, g * r, w) or (n, g, r, w).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cpu_frame import Frame, Geometry, Keys, Rows

_SHORT = 1 << 10  # entries

Positions = tuple[Tensor, Tensor, Tensor, Tensor]


class Piece(Protocol):
    shape: tuple[int, int, int, int]
    """(n, g, r, w)."""
    may_be_empty: bool
    """Whether mask and selection can leave a row without keys."""

    def rows(self, rows: Rows, frame: Frame, name: str) -> Tensor:
        """The piece's rows in the arithmetic's type, (n, g * r, width)."""
        ...

    def put(self, rows: Rows, values: Tensor, divisor: Tensor | None = None) -> None:
        """Store results (n, g * r, width) of the piece's rows, divided by `divisor` (n, g * r, 1)."""
        ...

    def keys(self, keys: Keys, frame: Frame, name: str) -> Tensor:
        """The piece's keys, (n, w, width)."""
        ...

    def add_product(self, keys: Keys, weights: Tensor, rows: Tensor, scale: float, frame: Frame) -> None:
        """keys += scale * weights^T rows, at the piece's keys. weights (n, g * r, w)."""
        ...

    def positions(self, geometry: Geometry) -> Positions:
        """Batch, query head, query position and key position, for masks and score mods; they broadcast to (n, g, r, w)."""
        ...

    def forbid(self, scores: Tensor, frame: Frame) -> None:
        """-inf in scores (n, g, r, w) where mask and selection say so."""
        ...

    def pick(self, matrix: Tensor, geometry: Geometry) -> Tensor:
        """The piece's part of a bias (B|1, H|1, N|1, M|1), broadcastable to (n, g, r, w)."""
        ...

    def add_to(self, matrix: Tensor, values: Tensor, geometry: Geometry) -> None:
        """matrix += values (n, g, r, w) at the piece's place, summed over the axes where the matrix broadcasts."""
        ...


def flat_heads(flat: Tensor, geometry: Geometry, per_group: bool) -> tuple[Tensor, Tensor]:
    """Batch (n, 1, 1, 1) and query head (n, g, 1, 1) of flat kv heads (`per_group`) or flat query heads."""
    flat = flat.view(-1, 1, 1, 1)
    if not per_group:
        return flat // geometry.num_heads, flat % geometry.num_heads
    first = flat % geometry.num_kv_heads * geometry.group
    return flat // geometry.num_kv_heads, first + torch.arange(geometry.group).view(1, -1, 1, 1)


def _sum_broadcast(matrix: Tensor, values: Tensor) -> Tensor:
    """`values` (n, g, r, w) summed over rows and keys where the matrix has one for all."""
    axes = [axis for axis in (2, 3) if matrix.shape[axis] == 1]
    return values.sum(axes, keepdim=True) if axes else values


def _store(place: Tensor, values: Tensor, divisor: Tensor | None, shape: tuple[int, ...]) -> None:
    if divisor is None:
        place.copy_(values.view(*shape, -1))
    else:
        torch.div(values.view(*shape, -1), divisor.view(*shape, 1), out=place)


class TileStore:
    """The distinct tiles of a plan; short spans of them are kept ready to be added to scores."""

    KEPT = 4

    def __init__(self, tiles: Tensor, dtype: torch.dtype) -> None:
        self.tiles, self.dtype = tiles, dtype
        self.ready: dict[tuple[int, ...], Tensor] = {}

    def allowed(self, ids: tuple[int, ...]) -> Tensor:
        """Tiles side by side, bool (block_q, len(ids) * block_k)."""
        return self.tiles[list(ids)].transpose(0, 1).flatten(1)

    def additive(self, ids: tuple[int, ...]) -> Tensor:
        """The same as 0 where allowed and -inf where not."""
        if ids not in self.ready:
            allowed = self.allowed(ids)
            self.ready[ids] = torch.zeros(allowed.shape, dtype=self.dtype).masked_fill_(~allowed, -torch.inf)
        return self.ready[ids]


class Span(NamedTuple):
    """Adjacent mixed blocks: columns [first, last) of the scores and the tiles that cover them."""

    first: int
    last: int
    ids: tuple[int, ...]
    rows: int
    store: TileStore

    def forbid(self, scores: Tensor) -> None:
        part, width = scores[..., self.first : self.last], self.last - self.first
        if len(self.ids) <= TileStore.KEPT:
            part.add_(self.store.additive(self.ids)[: self.rows, :width])
        else:
            part.masked_fill_(~self.store.allowed(self.ids)[: self.rows, :width], -torch.inf)


@dataclass
class Slice:
    """Adjacent kv heads [lo, hi) (flat, all query heads of each), query rows [start, stop), keys in `runs` of [first, last)."""

    lo: int
    hi: int
    start: int
    stop: int
    runs: list[tuple[int, int]]
    spans: list[Span]
    ask_mask: bool
    """The mask must be evaluated: its tiles were too many to keep."""
    may_be_empty: bool
    shape: tuple[int, int, int, int]

    def rows(self, rows: Rows, frame: Frame, name: str) -> Tensor:
        view = rows.grouped[self.lo : self.hi, :, self.start : self.stop]
        n, g, r, width = view.shape
        if g == 1 and view.dtype == frame.dtype and view.stride(3) == 1 and (n == 1 or not frame.packed):
            return view[:, 0]
        return frame.scratch(name, n, g, r, width).copy_(view).view(n, g * r, width)

    def put(self, rows: Rows, values: Tensor, divisor: Tensor | None = None) -> None:
        n, g, r, _ = self.shape
        _store(rows.grouped[self.lo : self.hi, :, self.start : self.stop], values, divisor, (n, g, r))

    def keys(self, keys: Keys, frame: Frame, name: str) -> Tensor:
        parts = [keys.flat[self.lo : self.hi, first:last] for first, last in self.runs]
        if len(parts) == 1 and (self.hi - self.lo == 1 or not frame.packed):
            return parts[0]
        together = frame.scratch(name, self.hi - self.lo, self.shape[3], keys.flat.shape[2])
        torch.cat(parts, dim=1, out=together)
        return together

    def add_product(self, keys: Keys, weights: Tensor, rows: Tensor, scale: float, frame: Frame) -> None:
        if len(self.runs) == 1 and not frame.packed:
            first, last = self.runs[0]
            keys.flat[self.lo : self.hi, first:last].baddbmm_(weights.mT, rows, alpha=scale)
            return
        product = frame.scratch("product", self.hi - self.lo, self.shape[3], keys.flat.shape[2])
        torch.bmm(weights.mT, rows, out=product)
        column = 0
        for first, last in self.runs:
            keys.flat[self.lo : self.hi, first:last].add_(product[:, column : column + last - first], alpha=scale)
            column += last - first

    def positions(self, geometry: Geometry) -> Positions:
        b, h = flat_heads(torch.arange(self.lo, self.hi), geometry, per_group=True)
        qi = torch.arange(self.start, self.stop).view(1, 1, -1, 1) + geometry.q_offset
        ki = torch.cat([torch.arange(first, last) for first, last in self.runs]).view(1, 1, 1, -1)
        return b, h, qi, ki

    def forbid(self, scores: Tensor, frame: Frame) -> None:
        for span in self.spans:
            span.forbid(scores)
        if self.ask_mask and frame.options.mask is not None:
            scores.masked_fill_(~frame.options.mask.keep(*self.positions(frame.geometry)), -torch.inf)

    def _columns(self, matrix: Tensor) -> list[tuple[Tensor, int]]:
        """Views (B|1, H|1, r|1, columns) of a bias, each with the column of the scores where it starts."""
        view = matrix[:, :, self.start : self.stop] if matrix.shape[2] > 1 else matrix
        if matrix.shape[3] == 1:
            return [(view, 0)]
        out, column = [], 0
        for first, last in self.runs:
            out.append((view[..., first:last], column))
            column += last - first
        return out

    def pick(self, matrix: Tensor, geometry: Geometry) -> Tensor:
        part = torch.cat([view for view, _ in self._columns(matrix)], dim=3)
        if matrix.shape[0] == matrix.shape[1] == 1:
            return part
        b, h, _, _ = self.positions(geometry)
        return part[b[..., 0, 0] * (matrix.shape[0] > 1), h[..., 0, 0] * (matrix.shape[1] > 1)]

    def add_to(self, matrix: Tensor, values: Tensor, geometry: Geometry) -> None:
        values = _sum_broadcast(matrix, values)
        b, h, _, _ = self.positions(geometry)
        for number, value in enumerate(values):
            batch = int(b[number, 0, 0, 0]) if matrix.shape[0] > 1 else 0
            head = int(h[number, 0, 0, 0])
            heads = slice(head, head + geometry.group) if matrix.shape[1] > 1 else slice(0, 1)
            value = value if matrix.shape[1] > 1 else value.sum(0, keepdim=True)
            for view, column in self._columns(matrix):
                view[batch, heads].add_(value[..., column : column + view.shape[3]])


@dataclass
class Gather:
    """Units (flat head, query block) whose key lists are equally long.

    `heads`, `q_blocks` (n,): flat kv heads (`per_group`: all query heads of the group are rows) or flat query heads, and query
    blocks. `plan_rows` (n,): where the lists of the units are in `kv_blocks` (R, K). `tile_at`: (units, slots) that are mixed,
    `tile_ids` which tile each has; `common`: by slot, when they are the same in all units (else empty). `beyond`: columns at the
    end that lie past the last key. `first_row`: where the units' rows start in the blocked rows when they are adjacent (then they
    are a view), else None.
    """

    heads: Tensor
    q_blocks: Tensor
    per_group: bool
    kv_blocks: Tensor
    plan_rows: Tensor
    row_index: Tensor
    first_key_block: Tensor
    tile_at: tuple[Tensor, Tensor]
    tile_ids: Tensor
    common: list[int]
    store: TileStore
    ask_mask: bool
    may_be_empty: bool
    beyond: int
    first_row: int | None
    slots: int
    shape: tuple[int, int, int, int]
    kept_index: Tensor | None = None

    @property
    def blocks(self) -> Tensor:
        """Key blocks of each unit, (n, slots)."""
        return self.kv_blocks[self.plan_rows, : self.slots]

    @property
    def key_index(self) -> Tensor:
        """The same among the blocks of all heads, (n * slots,). Kept when short: for selections of single keys it is as big as they."""
        if self.kept_index is not None:
            return self.kept_index
        index = (self.blocks + self.first_key_block).flatten()
        if index.shape[0] <= _SHORT:
            self.kept_index = index
        return index

    def rows(self, rows: Rows, frame: Frame, name: str) -> Tensor:
        n, g, r, _ = self.shape
        if self.first_row is not None and rows.flat.dtype == frame.dtype:
            return rows.blocks[self.first_row : self.first_row + n]
        picked = rows.blocks.index_select(0, self.row_index)
        return picked.to(frame.dtype).view(n, g * r, picked.shape[2])

    def put(self, rows: Rows, values: Tensor, divisor: Tensor | None = None) -> None:
        n, g, r, _ = self.shape
        if self.first_row is not None:
            _store(rows.blocks[self.first_row : self.first_row + n], values, divisor, (n, r))
            return
        values = values if divisor is None else values.div_(divisor)
        rows.blocks.index_copy_(0, self.row_index, values.view(n * g, r, -1).to(rows.flat.dtype))

    def keys(self, keys: Keys, frame: Frame, name: str) -> Tensor:
        n, _, _, w = self.shape
        width = keys.flat.shape[2]
        out = frame.scratch(name, n * self.slots, keys.blocks.shape[1])
        return torch.index_select(keys.blocks, 0, self.key_index, out=out).view(n, w, width)

    def add_product(self, keys: Keys, weights: Tensor, rows: Tensor, scale: float, frame: Frame) -> None:
        n, _, _, w = self.shape
        product = frame.scratch("product", n, w, keys.flat.shape[2])
        torch.bmm(weights.mT, rows, out=product)
        keys.blocks.index_add_(0, self.key_index, product.view(n * self.slots, -1), alpha=scale)

    def positions(self, geometry: Geometry) -> Positions:
        b, h = flat_heads(self.heads, geometry, self.per_group)
        row = self.q_blocks[:, None] * geometry.block_q + torch.arange(geometry.block_q)
        qi = row.clamp(max=geometry.q_len - 1).view(self.shape[0], 1, -1, 1) + geometry.q_offset
        column = self.blocks[:, :, None] * geometry.block_k + torch.arange(geometry.block_k)
        return b, h, qi, column.clamp(max=geometry.kv_len - 1).view(self.shape[0], 1, 1, -1)

    def forbid(self, scores: Tensor, frame: Frame) -> None:
        n, g, r, w = self.shape
        if self.beyond:
            scores[..., w - self.beyond :] = -torch.inf
        if self.ask_mask and frame.options.mask is not None:
            scores.masked_fill_(~frame.options.mask.keep(*self.positions(frame.geometry)), -torch.inf)
        elif self.common:
            by_slot = scores.view(n, g, r, self.slots, -1)
            for slot, tile in enumerate(self.common):
                if tile >= 0:
                    by_slot[:, :, :, slot].add_(self.store.additive((tile,)))
        elif self.tile_ids.numel():
            by_slot = scores.view(n, g, r, self.slots, -1)
            units, slots = self.tile_at
            kept = self.store.tiles[self.tile_ids][:, None]
            if units.shape[0] == n and bool(
                (slots == slots[0]).all()
            ):  # as the diagonal of a causal mask: one place in every list
                by_slot[:, :, :, int(slots[0])].masked_fill_(~kept, -torch.inf)
            else:
                by_slot[units, :, :, slots] = by_slot[units, :, :, slots].masked_fill_(~kept, -torch.inf)

    def _places(self, matrix: Tensor, geometry: Geometry) -> Positions:
        b, h, qi, ki = self.positions(geometry)
        places = (b, h, qi - geometry.q_offset, ki)
        b, h, qi, ki = (place * (size > 1) for place, size in zip(places, matrix.shape))
        return b, h, qi, ki

    def pick(self, matrix: Tensor, geometry: Geometry) -> Tensor:
        return matrix[self._places(matrix, geometry)]

    def add_to(self, matrix: Tensor, values: Tensor, geometry: Geometry) -> None:
        b, h, qi, ki = self._places(matrix, geometry)
        qi = qi[:, :, :1] if matrix.shape[2] == 1 else qi
        ki = ki[..., :1] if matrix.shape[3] == 1 else ki
        matrix.index_put_((b, h, qi, ki), _sum_broadcast(matrix, values), accumulate=True)
