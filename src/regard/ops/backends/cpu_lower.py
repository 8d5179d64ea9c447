"""From a `BlockPlan` to pieces: which (head, query block) units become slices, which are gathered, and how many go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import FULL, LAZY, BlockPlan
from .cpu_frame import Geometry
from .cpu_pieces import Gather, Piece, Slice, Span, TileStore

MAX_RUNS = 4  # more runs of adjacent key blocks than this are gathered, unless they are long
LONG_RUN = 8  # blocks
SCORES = 1 << 19  # numbers: scores of one piece, so that they stay in the cache between the products
GATHERED = 1 << 20  # numbers: keys and values of one gathered piece
PACKED = 2  # times as many of both where products are faster, so that the calls around them weigh less


class _Size(NamedTuple):
    """Of one piece, at most: scores, and gathered keys."""

    scores: int
    keys: int


@dataclass
class _Lists:
    """A plan with its head axis at the grain that pieces use: kv heads (`per_group`) or query heads.

    `row_of`: for each flat head, its (batch, head) place in `kv_blocks`.
    """

    kv_blocks: Tensor
    tiles_of: Tensor
    per_group: bool
    row_of: list[tuple[int, int]]


def lower(plan: BlockPlan, geometry: Geometry, width: int, dtype: torch.dtype, packed: bool = False) -> list[Piece]:
    """Pieces that cover every row that sees something.

    `width`: head_dim of keys plus that of values, for sizing; `packed`: see `Frame`.
    """
    size = _Size(SCORES, GATHERED // width) if not packed else _Size(PACKED * SCORES, PACKED * GATHERED // width)
    if plan.kv_blocks.numel() == 0:
        return []
    lists = _grain(plan, geometry)
    store = TileStore(plan.tiles, dtype)
    pieces: list[Piece] = []
    gathered: list[tuple[range, tuple[int, int], list[int]]] = []
    counts, numbers = _counts(lists.kv_blocks)
    for heads in _alike(lists):
        place = lists.row_of[heads.start]
        rest = []
        for block, (count, runs) in enumerate(zip(counts[place].tolist(), numbers[place].tolist())):
            if count and _worth_slicing(len(heads), runs, count, lists.per_group, geometry, size):
                kv, tile = (x[place][block, :count].tolist() for x in (lists.kv_blocks, lists.tiles_of))
                pieces += _slices(heads, block, _runs(kv), tile, store, geometry, size)
            elif count:
                rest.append(block)
        if rest:
            gathered.append((heads, place, rest))
    if gathered:
        pieces += _gathers(gathered, lists, store, geometry, size)
    return pieces


def _grain(plan: BlockPlan, geometry: Geometry) -> _Lists:
    """Bring the plan to one row a kv head where the query heads of every group agree, else to one a query head."""
    kv, tiles = plan.kv_blocks, plan.tiles_of
    heads, group = kv.shape[1], geometry.group
    per_group = True
    if heads == geometry.num_heads and group > 1:
        by_group = [x.unflatten(1, (-1, group)) for x in (kv, tiles)]
        per_group = all(bool((x == x[:, :, :1]).all()) for x in by_group)
        if per_group:
            kv, tiles = (x[:, :, 0] for x in by_group)
    flat = geometry.num_kv_heads if per_group else geometry.num_heads
    row_of = [
        (b if kv.shape[0] > 1 else 0, h if kv.shape[1] > 1 else 0) for b in range(geometry.batch) for h in range(flat)
    ]
    return _Lists(kv, tiles, per_group, row_of)


def _alike(lists: _Lists) -> list[range]:
    """Ranges of adjacent flat heads with the same lists."""

    def equal(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a == b or all(bool((x[a] == x[b]).all()) for x in (lists.kv_blocks, lists.tiles_of))

    starts = [i for i, place in enumerate(lists.row_of) if i == 0 or not equal(lists.row_of[i - 1], place)]
    return [range(lo, hi) for lo, hi in zip(starts, [*starts[1:], len(lists.row_of)])]


def _counts(kv_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each list has, and in how many runs of adjacent ones."""
    listed = kv_blocks >= 0
    starts = listed.clone()
    starts[..., 1:] &= kv_blocks[..., 1:] != kv_blocks[..., :-1] + 1
    return listed.sum(-1), starts.sum(-1)


def _runs(kv: list[int]) -> list[tuple[int, int]]:
    """[first, last) of each run of adjacent numbers in an ascending list."""
    starts = [i for i, block in enumerate(kv) if i == 0 or block != kv[i - 1] + 1]
    return [(kv[lo], kv[hi - 1] + 1) for lo, hi in zip(starts, [*starts[1:], len(kv)])]


def _worth_slicing(heads: int, runs: int, count: int, per_group: bool, geometry: Geometry, size: _Size) -> bool:
    """Views are free, but one piece is then one query block of the heads that share it: too little work when it is one short list."""
    if not per_group or (runs > MAX_RUNS and count < LONG_RUN * runs):
        return False
    scores = geometry.group * geometry.block_q * count * geometry.block_k
    return heads > 1 or 2 * scores > size.scores


def _slices(
    heads: range,
    block: int,
    runs: list[tuple[int, int]],
    tile: list[int],
    store: TileStore,
    geometry: Geometry,
    size: _Size,
) -> list[Piece]:
    start, stop = block * geometry.block_q, min((block + 1) * geometry.block_q, geometry.q_len)
    keys = [(lo * geometry.block_k, min(hi * geometry.block_k, geometry.kv_len)) for lo, hi in runs]
    r, w = stop - start, sum(last - first for first, last in keys)
    spans, slot = [], 0
    while slot < len(tile):
        end = slot + 1
        if tile[slot] >= 0:
            while end < len(tile) and tile[end] >= 0:
                end += 1
            first, last = slot * geometry.block_k, min(end * geometry.block_k, w)
            spans.append(Span(first, last, tuple(tile[slot:end]), r, store))
        slot = end
    step = _together(len(heads), size.scores // max(1, geometry.group * r * w))
    return [
        Slice(
            lo=lo,
            hi=min(lo + step, heads.stop),
            start=start,
            stop=stop,
            runs=keys,
            spans=spans,
            ask_mask=LAZY in tile,
            may_be_empty=FULL not in tile,
            shape=(min(lo + step, heads.stop) - lo, geometry.group, r, w),
        )
        for lo in range(heads.start, heads.stop, step)
    ]


def _together(available: int, fitting: int) -> int:
    """How many to take at a time: what fits, at least one a thread, in equal shares."""
    threads = torch.get_num_threads()
    most = max(threads, fitting // threads * threads)
    return -(-available // -(-available // most))


def _gathers(
    gathered: list[tuple[range, tuple[int, int], list[int]]],
    lists: _Lists,
    store: TileStore,
    geometry: Geometry,
    size: _Size,
) -> list[Piece]:
    """Units with equally long lists go together, whatever head they are of."""
    _, plan_heads, q_blocks, _ = lists.kv_blocks.shape
    heads, rows, blocks = [], [], []
    for alike, (b, h), these in gathered:
        block = torch.tensor(these)
        for head in alike:
            heads.append(torch.full_like(block, head))
            rows.append((b * plan_heads + h) * q_blocks + block)
            blocks.append(block)
    units = _Units(torch.cat(heads), torch.cat(blocks), torch.cat(rows), lists, geometry)
    pieces: list[Piece] = []
    start = 0
    for kind, number in zip(*(x.tolist() for x in torch.unique_consecutive(units.kind, return_counts=True))):
        count = kind // 2
        r, w = units.group * geometry.block_q, count * geometry.block_k
        step = _together(number, min(size.scores // (r * w), size.keys // w))
        for lo in range(start, start + number, step):
            pieces.append(units.piece(lo, min(lo + step, start + number), count, bool(kind % 2), store))
        start += number
    return pieces


class _Units:
    """All gathered (flat head, query block) units, ordered by the length of their lists, and what pieces need to know of them.

    `kind`: twice the length, plus one where the list ends in the block that the last key cuts short.
    """

    def __init__(self, head: Tensor, block: Tensor, row: Tensor, lists: _Lists, geometry: Geometry) -> None:
        self.geometry, self.per_group = geometry, lists.per_group
        longest = lists.kv_blocks.shape[3]
        self.kv, self.tiles_of = lists.kv_blocks.reshape(-1, longest), lists.tiles_of.reshape(-1, longest)
        self.short = geometry.k_blocks * geometry.block_k - geometry.kv_len
        counts = (self.kv >= 0).sum(-1)[row]
        ragged = self.kv[row, counts - 1] == geometry.k_blocks - 1 if self.short else torch.zeros_like(row)
        self.kind, order = torch.sort(counts * 2 + ragged.long(), stable=True)
        self.head, self.block, self.row = head[order], block[order], row[order]
        self.group = geometry.group if lists.per_group else 1
        kv_head = self.head if lists.per_group else self.head // geometry.group
        self.first_key_block = kv_head[:, None] * geometry.k_blocks
        heads = self.head[:, None] * self.group + torch.arange(self.group)
        self.row_index = heads * geometry.q_blocks + self.block[:, None]
        # index of the first unit of each stretch of adjacent rows
        flat = self.row_index[:, 0]
        breaks = torch.ones_like(flat, dtype=torch.bool)
        breaks[1:] = flat[1:] != flat[:-1] + 1
        self.stretch = breaks.cumsum(0).tolist()
        listed = self.kv >= 0
        self.full = (listed & (self.tiles_of == FULL)).any(-1)[self.row].tolist()
        self.lazy = (listed & (self.tiles_of == LAZY)).any(-1)[self.row].tolist()
        self.mixed = (listed & (self.tiles_of >= 0)).any(-1)[self.row].tolist()

    def piece(self, lo: int, hi: int, count: int, ragged: bool, store: TileStore) -> Gather:
        row = self.row[lo:hi]
        tile_at = (row[:0], row[:0])
        tile_ids = row[:0]
        common: list[int] = []
        if any(self.mixed[lo:hi]):
            tiles = self.tiles_of[row, :count]
            units, slots = (tiles >= 0).nonzero(as_tuple=True)
            tile_at, tile_ids = (units, slots), tiles[units, slots]
            if bool((tiles == tiles[0]).all()) and hi - lo > 1:  # all units alike, as within a sliding window
                common = tiles[0].tolist()
        index = self.row_index[lo:hi].flatten()
        adjacent = self.group == 1 and self.stretch[lo] == self.stretch[hi - 1]
        return Gather(
            heads=self.head[lo:hi],
            q_blocks=self.block[lo:hi],
            per_group=self.per_group,
            kv_blocks=self.kv,
            plan_rows=row,
            row_index=index,
            first_key_block=self.first_key_block[lo:hi],
            tile_at=tile_at,
            tile_ids=tile_ids,
            common=common,
            store=store,
            ask_mask=any(self.lazy[lo:hi]),
            may_be_empty=not all(self.full[lo:hi]),
            beyond=self.short if ragged else 0,
            first_row=int(index[0]) if adjacent else None,
            slots=count,
            shape=(hi - lo, self.group, self.geometry.block_q, count * self.geometry.block_k),
        )
