"""The cache of core-context attention (Chen et al., 2024, arXiv 2412.12465): core tokens of old groups, and the last tokens one by one.

Entries after N tokens: N // group core tokens and at most window + group - 1 tokens, each store rounded up to 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.core_context import pool_groups, visible, visible_cores
from ...ops.joint import KeySet, joint_attention
from ..call import AttentionCall
from .layer import AttendingLayer

_PAGE = 32


class Rows:
    """Keys and values (B, H, length, D) in storage with a little room at the end."""

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def reserve(self, length: int, keys: Tensor, values: Tensor, drop: int = 0) -> None:
        """Make room for `length` rows after the first `drop` have gone; `keys` and `values` tell batch, heads and sizes."""
        if self.keys is None or self.values is None or drop or length > self.keys.shape[2]:
            room = -(-length // _PAGE) * _PAGE
            self.keys, self.values = (
                _moved(old, like, room, drop, self.length) for old, like in ((self.keys, keys), (self.values, values))
            )
            self.length -= min(drop, self.length)

    def view(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        end = self.length if last is None else last
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = fn(self.keys), fn(self.values)


def _moved(old: Tensor | None, like: Tensor, room: int, drop: int, length: int) -> Tensor:
    new = like.new_zeros((*like.shape[:2], room, like.shape[3]))
    if old is not None and length > drop:
        new[:, :, : length - drop] = old[:, :, drop:length]
    return new


class CoreContextLayer(AttendingLayer):
    """One layer's past: a core token for every complete group of `group` tokens, and the last `window + group - 1` tokens.

    Args:
        group, window, pool, per_head, rotate: as in `regard.ops.core_context_attention`.
    """

    def __init__(self, group: int, window: int, pool: str, per_head: bool, rotate: Any) -> None:
        self.group, self.window, self.pool, self.per_head, self.rotate = group, window, pool, per_head, rotate
        super().__init__()

    def clear(self) -> None:
        self.cores, self.tail = Rows(), Rows()
        self._row_starts: tuple[Tensor, list[int]] | None = None

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.cores.map_rows(fn)
        self.tail.map_rows(fn)

    def drop_last(self, count: int) -> None:
        left, first = self.seen - count, self.seen - self.tail.length
        if left == 0:
            self.clear()
            return
        needed = min(start + self._seen_cores(left - 1 - start) * self.group for start in set(self._padding()))
        if needed < first:
            super().drop_last(count)  # says that it cannot
        self.tail.length -= count
        self.cores.length = min(self.cores.length, max(0, left - min(self._padding())) // self.group)

    # The attention over it

    def attend(self, call: AttentionCall) -> Tensor:
        """Head outputs (B, H, N, Dv) of a call whose keys and values `update` has just brought."""
        new_keys, new_values, before = self.take(call)
        keys, values = new_keys, new_values
        if before:
            self._append(new_keys, new_values)
            keys, values = self.tail.view()
        first = self.seen - keys.shape[2]
        fresh = self._pool(call, keys, values, before, first)
        if call.q_len == 1 and before:
            out = self._attend_one(call, keys, values, first)
        else:
            start = self.start if self.latest_start else None
            core_mask, local_mask = visible(
                start, before, call.q_len, first, self.group, self.window, device=call.q.device
            )
            cores = self.cores.view() if before or fresh is None else fresh  # of a prompt: with their graph
            out = self._joint(call, [KeySet(*cores, core_mask), KeySet(keys, values, local_mask)])
        self._keep(keys, values)
        return out

    def _attend_one(self, call: AttentionCall, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """A decoded token: it stands last, so only what is out of its reach needs a mask, and that only beside left padding."""
        length, starts = self.seen, self._padding()
        if not self.latest_start:
            seen = self._seen_cores(length - 1)
            begin = seen * self.group - first
            return self._joint(
                call, [KeySet(*self.cores.view(0, seen)), KeySet(keys[:, :, begin:], values[:, :, begin:])]
            )
        assert self.start is not None
        most = max(self._seen_cores(length - 1 - start) for start in starts)
        count = visible_cores(length - 1 - self.start, self.group, self.window)[:, None, None, None]
        place = torch.arange(max(most, keys.shape[2]), device=keys.device)
        local = place[: keys.shape[2]] + first >= self.start[:, None, None, None] + count * self.group
        return self._joint(call, [KeySet(*self.cores.view(0, most), place[:most] < count), KeySet(keys, values, local)])

    def _joint(self, call: AttentionCall, sets: list[KeySet]) -> Tensor:
        soft_cap = None if call.soft_cap is None else ops.scores.soft_cap(call.soft_cap)
        return joint_attention(
            call.q, sets, scale=call.scale, score_mod=soft_cap, dropout=call.dropout, backend=call.backend
        )

    # What it stores

    def _seen_cores(self, position: int) -> int:
        return max(0, position + 1 - self.window) // self.group

    def _padding(self) -> list[int]:
        """`start` as numbers, read from the device once."""
        assert self.start is not None
        if self._row_starts is None or self._row_starts[0] is not self.start:
            self._row_starts = (self.start, self.start.tolist() if self.latest_start else [0])
        return self._row_starts[1]

    def _pool(
        self, call: AttentionCall, keys: Tensor, values: Tensor, before: int, first: int
    ) -> tuple[Tensor, Tensor] | None:
        """Pool the groups that these tokens complete and store their core tokens; also returned, padded to the row with the most."""
        group, length, starts = self.group, self.seen, self._padding()
        most = max(max(0, length - s) // group - max(0, before - s) // group for s in starts)
        if not self.cores.length and not most:
            self.cores.reserve(0, keys, values)
        if not most:
            return None
        assert self.start is not None
        start = self.start if self.latest_start else self.start.new_zeros(1)
        old = (before - start).clamp(min=0) // group  # groups that each row had
        slot = old[:, None] + torch.arange(most, device=keys.device)
        token = start[:, None, None] + slot[..., None] * group + torch.arange(group, device=keys.device)
        fresh = pool_groups(
            call.q,
            keys,
            values,
            token - first,
            length=length - first,
            q_first=before - first,
            pool=self.pool,
            per_head=self.per_head,
            rotate=self.rotate,
            scale=call.scale,
            soft_cap=call.soft_cap,
        )
        total = max(max(0, length - s) // group for s in starts)
        self.cores.reserve(total, *fresh)
        self.cores.length = total
        assert self.cores.keys is not None and self.cores.values is not None
        for store, new in ((self.cores.keys, fresh[0]), (self.cores.values, fresh[1])):
            if not self.latest_start:
                store[:, :, total - most : total] = new.detach()
                continue
            complete = token[..., -1] < length
            row, place = complete.nonzero(as_tuple=True)
            store[row, :, slot[row, place]] = new.detach().transpose(1, 2)[row, place]
        return fresh

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Put new tokens behind the tail; what is out of everybody's reach goes first when there is no room."""
        tail = self.tail
        assert tail.keys is not None and tail.values is not None
        need = tail.length + keys.shape[2]
        if need > tail.keys.shape[2]:
            drop = max(0, tail.length - (self.window + self.group - 1))
            tail.reserve(need - drop, keys, values, drop)
            need -= drop
        tail.keys[:, :, tail.length : need] = keys.detach()
        tail.values[:, :, tail.length : need] = values.detach()
        tail.length = need

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """After a prompt, or a longer piece: hold no more than the last `window + group - 1` tokens."""
        most = self.window + self.group - 1
        if self.tail.keys is not None and self.tail.length <= most + _PAGE:
            return
        self.tail = Rows()
        last = min(most, keys.shape[2])
        self.tail.reserve(last, keys, values)
        self.tail.length = 0
        self._append(keys[:, :, keys.shape[2] - last :], values[:, :, values.shape[2] - last :])


def plainly_causal(call: AttentionCall) -> bool:
    """Whether the model's mask hides nothing but left padding and the future from its real tokens."""
    mask: Any = call.mask
    if mask is None:
        return call.causal or call.q_len == 1
    if call.q_len == 1 or getattr(mask, "structure", None) is not None:
        return True
    found = getattr(mask, "hides_the_future", None)
    if found is None:
        query = torch.arange(call.q_len, device=mask.device)[:, None] + call.position
        key = torch.arange(mask.shape[3], device=mask.device)
        start = call.start[:, None, None, None]
        found = bool(((mask == ((key <= query) & (key >= start))) | (query < start)).all())
        mask.hides_the_future = found
    return found
