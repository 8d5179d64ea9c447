"""`BlockSummaries`: summaries of the blocks of a growing row of keys. A finished block is summarised once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_tensor
from .summaries import block_summaries, reductions_of


class BlockSummaries:
    """Summaries of keys (B, Hkv, M, D) in blocks, kept up to date while keys are appended.

    Memory grows by doubling; per appended token at most the keys of the unfinished block are read.

    Args:
        keys: the first keys, or None: none yet.
        block: keys a block. kind: see `block_summaries`.
        levels: 1, or more for a hierarchy: a block of level l + 1 summarises `fan` blocks of level l. Extremes are those of all keys
            below; a mean is the mean of the means below (all of one weight but for the last); a centroid likewise.
        fan: blocks that a block of the next level holds.
    """

    def __init__(
        self, keys: Tensor | None = None, *, block: int = 64, kind: str = "mean", levels: int = 1, fan: int = 8
    ) -> None:
        self.block = require_int("block", block, 1)
        self.kind, self._parts = kind, reductions_of(kind)
        self.levels, self.fan = require_int("levels", levels, 1), require_int("fan", fan, 2)
        self.length = 0
        self._rows: list[Tensor] = []  # one (B, Hkv, capacity, F) a level
        self._tail: Tensor | None = None  # keys of the unfinished block
        if keys is not None:
            self.append(keys)

    def __len__(self) -> int:
        """Blocks, the unfinished one included."""
        return -(-self.length // self.block)

    def level(self, number: int = 0) -> Tensor:
        """Summaries of one level, (B, Hkv, blocks, F): a view, good until the next `append`."""
        require(0 <= number < self.levels, "number", number, f"a level in [0, {self.levels})")
        if not self._rows:
            raise bad_value("keys", "none so far", "some keys appended first")
        return self._rows[number][:, :, : self._count(number)]

    @property
    def values(self) -> Tensor:
        """`level(0)`: one summary a block."""
        return self.level(0)

    def append(self, keys: Tensor) -> BlockSummaries:
        """Take in keys (B, Hkv, n, D) that follow those already here."""
        require_tensor("keys", keys, dims=4, floating=True)
        if self._tail is not None:
            need = (*self._tail.shape[:2], -1, self._tail.shape[3])
            fits = keys.shape[:2] == self._tail.shape[:2] and keys.shape[3] == self._tail.shape[3]
            require(fits, "keys", f"shape {tuple(keys.shape)}", f"{need} like those before")
        started = self.length // self.block  # finished blocks so far
        fresh = keys if self._tail is None else torch.cat((self._tail, keys), dim=2)
        self.length += keys.shape[2]
        self._write(0, started, block_summaries(fresh, self.block, self.kind))
        for number in range(1, self.levels):
            started //= self.fan
            self._write(number, started, self._above(number, started))
        self._tail = fresh[:, :, fresh.shape[2] - self.length % self.block :].clone()
        return self

    def update(self, keys: Tensor) -> BlockSummaries:
        """Be the summaries of `keys` (B, Hkv, M, D), the whole row, which is the one from before with its end longer or shorter."""
        require_tensor("keys", keys, dims=4, floating=True)
        if keys.shape[2] < self.length:
            self.crop(keys)
        return self.append(keys[:, :, self.length :]) if keys.shape[2] > self.length or self._tail is None else self

    def crop(self, keys: Tensor) -> None:
        """Go back to `keys`, a shorter beginning of the same row."""
        whole = keys.shape[2] // self.block * self.block
        self.length, self._tail = whole, keys[:, :, :0].clone()
        self.append(keys[:, :, whole:])

    def reorder(self, rows: Tensor) -> None:
        """Let batch row i be what row `rows[i]` was (beam search)."""
        self._rows = [level.index_select(0, rows.to(level.device)) for level in self._rows]
        if self._tail is not None:
            self._tail = self._tail.index_select(0, rows.to(self._tail.device))

    def _count(self, number: int) -> int:
        return -(-self.length // (self.block * self.fan**number))

    def _above(self, number: int, started: int) -> Tensor:
        """Blocks of level `number` from `started` on, out of the level below."""
        below = self.level(number - 1)[:, :, started * self.fan :]
        if self.kind == "centroid":
            return block_summaries(below, self.fan, self.kind)
        parts = zip(below.chunk(len(self._parts), dim=-1), self._parts)
        return torch.cat([block_summaries(part, self.fan, name) for part, name in parts], dim=-1)

    def _write(self, number: int, start: int, rows: Tensor) -> None:
        need = start + rows.shape[2]
        if number == len(self._rows):
            self._rows.append(rows.contiguous())
            return
        have = self._rows[number]
        if have.shape[2] < need:
            grown = have.new_empty(*have.shape[:2], max(need, 2 * have.shape[2]), have.shape[3])
            grown[:, :, :start] = have[:, :, :start]
            have = self._rows[number] = grown
        have[:, :, start:need] = rows
