"""`BlockPlan`: what a mask and a selection lower to, once, for every block backend.

For each (batch, head, query block) the key blocks that hold at least one allowed pair, each either full or with a boolean
tile saying which pairs are allowed. Tiles are shared: the diagonal of a causal mask is one tile, not one a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._shapes import broadcast_shape
from .masks import Mask, everything
from .selection import Selection

FULL = -1
LAZY = -2
_TILE_BUDGET = 1 << 22  # booleans evaluated at a time while tiles are made
_KEPT = 4  # plans per mask,
_KEPT_SIZE = 1 << 20  # of at most so many listed blocks

_plans_of: WeakKeyDictionary[Mask, dict[tuple, BlockPlan]] = WeakKeyDictionary()


@dataclass
class BlockPlan:
    """Block-level description of who attends to whom.

    Attributes:
        kv_blocks: int64 (B|1, H|1, nQ, K): key blocks with work, ascending, -1 at the end.
        tiles_of: int64, same shape: `FULL` (-1) or the number of the tile in `tiles`; meaningless where `kv_blocks` is -1.
            `LAZY` (-2) for every mixed block when there were more distinct tiles than `max_tiles`: ask the mask again.
        tiles: bool (T, block_q, block_k), distinct mixed tiles; False outside the lengths.
        block_q, block_k, q_len, kv_len: geometry. A full block at the ragged end is full over what exists.
    """

    kv_blocks: Tensor
    tiles_of: Tensor
    tiles: Tensor
    block_q: int
    block_k: int
    q_len: int
    kv_len: int

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.kv_len // self.block_k)

    @property
    def counts(self) -> Tensor:
        """Key blocks with work per query block, (B|1, H|1, nQ)."""
        return (self.kv_blocks >= 0).sum(-1)

    def density(self) -> float:
        """Share of key blocks that hold work (mixed blocks count whole): the share of dense time a block backend can reach."""
        cells = self.kv_blocks.shape[0] * self.kv_blocks.shape[1] * self.num_q_blocks * self.num_k_blocks
        return int((self.kv_blocks >= 0).sum()) / cells if cells else 0.0

    def transposed(self) -> tuple[Tensor, Tensor]:
        """The same plan seen from the keys: (q_blocks, tiles_of), each (B|1, H|1, nK, K'), -1 at the end. For backward passes."""
        lead = self.kv_blocks.shape[:2]
        grid = torch.full(
            (*lead, self.num_q_blocks, self.num_k_blocks + 1), -2, dtype=torch.long, device=self.kv_blocks.device
        )
        where = torch.where(self.kv_blocks < 0, self.num_k_blocks, self.kv_blocks)
        grid.scatter_(-1, where, torch.where(self.kv_blocks < 0, -2, self.tiles_of))
        grid = grid[..., : self.num_k_blocks].transpose(-1, -2)
        return _lists(grid > -2, grid)


def _lists(present: Tensor, tile_grid: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a grid of presence and tile numbers into padded lists along the last axis."""
    width = int(present.sum(-1).max()) if present.numel() else 0
    order = torch.argsort(present.to(torch.int8), dim=-1, descending=True, stable=True)[..., :width]
    kept = present.gather(-1, order)
    return torch.where(kept, order, -1), torch.where(kept, tile_grid.gather(-1, order), FULL)


def make_plan(
    mask: Mask | None,
    selection: Selection | None,
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    q_len: int,
    kv_len: int,
    q_offset: int,
    block_q: int = 64,
    block_k: int = 64,
    device: torch.device | str | None = None,
    max_tiles: int | None = None,
) -> BlockPlan:
    """Lower a mask and/or a selection to blocks.

    The block sizes of `selection` win over `block_q`, `block_k`. The head axis of the result is 1 when nothing depends on the
    head, `num_kv_heads` when only a selection per kv head does, else `num_heads`; likewise the batch axis.
    `max_tiles` bounds the distinct tiles that are stored (None: all of them): beyond it mixed blocks are marked `LAZY`.
    """
    mask = everything if mask is None else mask
    if selection is not None:
        block_q, block_k = selection.block_q, selection.block_k
        device = selection.indices.device if device is None else device
    num_q, num_k = -(-q_len // block_q), -(-kv_len // block_k)
    plan_batch = batch if mask.varies_batch else 1
    plan_heads = num_heads if mask.varies_head else 1
    if selection is not None:
        indices = selection.indices.to(device) if device is not None else selection.indices
        if plan_heads == num_heads and indices.shape[1] not in (1, num_heads):
            indices = selection.for_heads(num_heads, num_kv_heads).to(indices.device)
        lead = broadcast_shape((plan_batch, plan_heads), indices.shape[:2])
        indices = indices.expand(*lead, *indices.shape[2:])
    else:
        indices = torch.arange(num_k, device=device).expand(plan_batch, plan_heads, num_q, num_k)
    device = indices.device
    if indices.numel() == 0:
        return _empty(indices, block_q, block_k, q_len, kv_len)

    b = torch.arange(indices.shape[0], device=device).view(-1, 1, 1, 1)
    h = torch.arange(indices.shape[1], device=device).view(1, -1, 1, 1)
    i = torch.arange(num_q, device=device).view(1, 1, -1, 1)
    q_lo = i * block_q + q_offset
    q_hi = (i * block_q + block_q).clamp(max=q_len) - 1 + q_offset
    j = indices.clamp(min=0)
    kv_lo, kv_hi = j * block_k, (j * block_k + block_k).clamp(max=kv_len) - 1
    some, every = mask.bounds(b, h, q_lo, q_hi, kv_lo, kv_hi)
    present = (some & (indices >= 0)).expand(indices.shape)
    mixed = present & ~every
    tiles_of = torch.full(indices.shape, FULL, dtype=torch.long, device=device)
    tiles, numbers, alive = _make_tiles(mask, mixed, j, block_q, block_k, q_len, kv_len, q_offset, max_tiles)
    tiles_of[mixed] = numbers
    present = present.clone()
    present[mixed] = alive
    order = torch.argsort(present.to(torch.int8), dim=-1, descending=True, stable=True)
    order = order[..., : int(present.sum(-1).max())]
    kept = present.gather(-1, order)
    return BlockPlan(
        kv_blocks=torch.where(kept, j.expand(indices.shape).gather(-1, order), -1),
        tiles_of=torch.where(kept, tiles_of.gather(-1, order), FULL),
        tiles=tiles,
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
    )


def kept_plan(mask: Mask | None, selection: Selection | None, **options: Any) -> BlockPlan:
    """`make_plan`, kept as long as the mask is there where the mask cannot change and no selection comes with it."""
    mask = everything if mask is None else mask
    if not mask.frozen or selection is not None:
        return make_plan(mask, selection, **options)
    kept = _plans_of.setdefault(mask, {})
    # what does not depend on the batch or the head is the same plan for any number of them
    key = tuple(
        (name, str(value))
        for name, value in sorted(options.items())
        if (name != "batch" or mask.varies_batch) and (name not in ("num_heads", "num_kv_heads") or mask.varies_head)
    )
    if key not in kept:
        with torch.inference_mode(False), torch.no_grad():  # a plan made while evaluating may serve training later
            plan = make_plan(mask, selection, **options)
        if plan.kv_blocks.numel() > _KEPT_SIZE:
            return plan
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = plan
    return kept[key]


def _empty(indices: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int) -> BlockPlan:
    none = indices.new_empty((*indices.shape[:3], 0))
    tiles = torch.zeros((0, block_q, block_k), dtype=torch.bool, device=indices.device)
    return BlockPlan(none, none, tiles, block_q, block_k, q_len, kv_len)


def _make_tiles(
    mask: Mask,
    mixed: Tensor,
    j: Tensor,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    q_offset: int,
    max_tiles: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the mixed blocks. Returns distinct tiles, the tile number of each mixed block (FULL when it turned out full, LAZY when
    there are too many to keep), and whether it holds anything at all."""
    device = mixed.device
    where = mixed.nonzero()
    blocks = j.expand(mixed.shape)[mixed]
    alike: Tensor | None = None
    kinds = _kinds(mask, where, blocks, block_q, block_k, q_len, kv_len, q_offset) if where.shape[0] > 1 else None
    if kinds is not None:
        where, blocks, alike = _one_of_each(where, blocks, kinds, block_q, block_k, q_len, kv_len)
    rows, columns = torch.arange(block_q, device=device), torch.arange(block_k, device=device)
    store = _TileStore(block_q, block_k, max_tiles, device)
    numbers = torch.full((where.shape[0],), FULL, dtype=torch.long, device=device)
    alive = torch.zeros(where.shape[0], dtype=torch.bool, device=device)
    step = max(1, _TILE_BUDGET // (block_q * block_k))
    for lo in range(0, where.shape[0], step):
        part, block = where[lo : lo + step], blocks[lo : lo + step]
        row = part[:, 2, None, None] * block_q + rows[None, :, None]
        column = block[:, None, None] * block_k + columns[None, None, :]
        exists = (row < q_len) & (column < kv_len)
        row_at, column_at = row.clamp(max=q_len - 1) + q_offset, column.clamp(max=kv_len - 1)
        tile = mask.keep(part[:, 0, None, None], part[:, 1, None, None], row_at, column_at)
        tile = torch.broadcast_to(tile, exists.shape) & exists
        alive[lo : lo + step] = tile.any(-1).any(-1)
        stored = (alive[lo : lo + step] & (tile != exists).any(-1).any(-1)).nonzero()[:, 0] + lo
        numbers[stored] = store.add(tile[stored - lo])
    numbers = store.final(numbers)
    return store.tiles, numbers if alike is None else numbers[alike], alive if alike is None else alive[alike]


def _kinds(
    mask: Mask, where: Tensor, blocks: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int, q_offset: int
) -> Tensor | None:
    first_row, first_key = where[:, 2] * block_q, blocks * block_k
    last_row, last_key = (first_row + block_q).clamp(max=q_len) - 1, (first_key + block_k).clamp(max=kv_len) - 1
    return mask.kind(where[:, 0], where[:, 1], first_row + q_offset, last_row + q_offset, first_key, last_key)


def _one_of_each(
    where: Tensor, blocks: Tensor, mask_kinds: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks of one kind at equal distance from the diagonal, cut alike by the lengths, the first; and for each which it equals."""
    distance = where[:, 2] * block_q - blocks * block_k
    ragged = (where[:, 2] == (q_len - 1) // block_q).long() * 2 + (blocks == (kv_len - 1) // block_k).long()
    kinds, alike = torch.unique(torch.stack([distance, ragged, mask_kinds], dim=1), dim=0, return_inverse=True)
    first = torch.full((kinds.shape[0],), where.shape[0], dtype=torch.long, device=where.device)
    first.scatter_reduce_(0, alike, torch.arange(where.shape[0], device=where.device), reduce="amin")
    return where[first], blocks[first], alike


class _TileStore:
    """Distinct tiles, collected chunk by chunk; gives up (keeps none) beyond `limit`."""

    def __init__(self, block_q: int, block_k: int, limit: int | None, device: torch.device) -> None:
        self.limit = limit
        self.given_up = False
        self.tiles = torch.zeros((0, block_q, block_k), dtype=torch.bool, device=device)
        self.codes = torch.zeros((0, -(-block_q * block_k // 32)), dtype=torch.long, device=device)

    def add(self, tiles: Tensor) -> Tensor:
        """Numbers of `tiles` (P, block_q, block_k) in the store."""
        if self.given_up or tiles.shape[0] == 0:
            return torch.full((tiles.shape[0],), LAZY, dtype=torch.long, device=tiles.device)
        known = self.codes.shape[0]
        codes = torch.cat([self.codes, _pack(tiles.flatten(1))])
        distinct, inverse = torch.unique(codes, dim=0, return_inverse=True)
        # number the distinct ones by first appearance, so that those given out before stay valid
        first = torch.full((distinct.shape[0],), codes.shape[0], dtype=torch.long, device=codes.device)
        first.scatter_reduce_(0, inverse, torch.arange(codes.shape[0], device=codes.device), reduce="amin")
        first, order = first.sort()
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        if self.limit is not None and distinct.shape[0] > self.limit:
            self.given_up = True
            self.tiles, self.codes = self.tiles[:0], self.codes[:0]
            return torch.full((tiles.shape[0],), LAZY, dtype=torch.long, device=tiles.device)
        self.tiles = torch.cat([self.tiles, tiles[first[known:] - known]])
        self.codes = codes[first]
        return place[inverse[known:]]

    def final(self, numbers: Tensor) -> Tensor:
        """`numbers` as given out, all LAZY when the store gave up in between."""
        return torch.where(numbers == FULL, FULL, LAZY) if self.given_up else numbers


def _pack(bits: Tensor) -> Tensor:
    """(P, n) booleans as (P, ceil(n / 32)) integers, for finding equal tiles."""
    pad = -bits.shape[1] % 32
    bits = torch.nn.functional.pad(bits, (0, pad)).view(bits.shape[0], -1, 32)
    weights = (1 << torch.arange(32, device=bits.device)).to(torch.float64)
    return torch.matmul(bits.to(torch.float64), weights).long()
