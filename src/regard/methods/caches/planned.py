"""`PlannedLayer`: a cache layer whose heads keep what their rules (`regard.methods.plans`) will ever let a query see, and no more.

Kv heads with the same rule (strided columns aside) share one store, so a decoded token costs one attention per kind of rule, not
per head; storage is that of the rules, without padding to the longest head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._checks import require
from ..._shapes import broadcast_shape
from ..call import AttentionCall
from ..plans import Full, Rule, Sharded, Window, union
from ..slots import AllSlots, ShardedSlots, Slots
from .layer import AttendingLayer, attention_over

_ROWS = 512  # query rows of a chunk whose mask over the stored entries is made at once


class PlannedLayer(AttendingLayer):
    """One layer's cache under a plan.

    Args:
        rules: called once, at the first `attend`, with (tokens of the prompt, query heads, kv heads); returns the layer's rules, one
            a query head. They are settled with `Rule.at(tokens)` and stay so.

    The first chunk is computed by the call itself (so the method's mask decides what it sees, and fast block backends run); later
    chunks and tokens read the store. Query heads that share a kv head may have different windows: the widest is stored.
    """

    def __init__(self, rules: Callable[[int, int, int], Sequence[Rule]]) -> None:
        self.rules = rules
        super().__init__()

    def clear(self) -> None:
        self.groups: list[_Group] = []
        self._uniform: tuple[Any, bool] = (None, True)

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        assert self.start is not None
        if not self.groups:
            self.groups = self._make_groups(call.seen, call.num_heads, keys.shape[1], keys.device)
        if before == 0:
            out = call.attention()
            for group in self.groups:
                group.add(*group.own(keys, values), before, self.start)
            return out
        if len(self.groups) == 1:
            return self.groups[0].attend(call, call.q, keys, values, before, self.start, self.uniform)
        out = call.q.new_empty((*call.q.shape[:3], values.shape[3]))
        parts = []
        for group in self.groups:
            q = call.q.index_select(1, group.q_heads)
            parts.append(group.attend(call, q, *group.own(keys, values), before, self.start, self.uniform))
        return out.index_copy(1, torch.cat([group.q_heads for group in self.groups]), torch.cat(parts, dim=1))

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same amount of left padding."""
        if self._uniform[0] is not self.start:
            same = self.start is None or not self.start.numel() or int(self.start.min()) == self.latest_start
            self._uniform = (self.start, same)
        return self._uniform[1]

    def _make_groups(self, seen: int, num_heads: int, num_kv_heads: int, device: torch.device) -> list[_Group]:
        assert self.start is not None
        rules = self.rules(seen, num_heads, num_kv_heads)
        require(len(rules) == num_heads, "rules", f"{len(rules)} rules", f"one a query head, {num_heads}")
        # each row's rules are those of its own length, whatever it is batched with
        lengths, number = (seen - self.start).clamp(min=0).unique(return_inverse=True)
        settled = [[rule.at(length) for rule in rules] for length in lengths.tolist()]
        kinds = list(dict.fromkeys(tuple(kind) for kind in settled))
        which = torch.tensor([kinds.index(tuple(kind)) for kind in settled], device=device)[number]
        share = num_heads // num_kv_heads
        alike: dict[Rule, list[int]] = {}
        kept = [
            union([rule for kind in kinds for rule in kind[head * share : (head + 1) * share]])
            for head in range(num_kv_heads)
        ]
        for head, rule in enumerate(kept):
            alike.setdefault(replace(rule, phase=0) if isinstance(rule, Sharded) else rule, []).append(head)
        return [
            _Group(heads, [kept[head] for head in heads], kinds, which, share, device, len(heads) == num_kv_heads)
            for heads in alike.values()
        ]

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        for group in self.groups:
            group.map_rows(fn)

    def drop_last(self, count: int) -> None:
        """Possible as long as nothing has been evicted."""
        if any(group.slots.held_tokens(self.seen) < self.seen for group in self.groups):
            super().drop_last(count)
        for group in self.groups:
            group.forget_masks()


class _Group:
    """Kv heads whose rules differ in nothing but the phase of their strided columns, and what is stored for them."""

    def __init__(
        self,
        heads: list[int],
        kept: list[Rule],
        kinds: list[tuple[Rule, ...]],
        which: Tensor,
        share: int,
        device: torch.device,
        every: bool,
    ) -> None:
        self.heads = torch.tensor(heads, device=device)
        self.q_heads = (self.heads[:, None] * share + torch.arange(share, device=device)).flatten()
        self.every, self.share, self.rule = every, share, kept[0]
        self.slots: Slots = kept[0].slots()
        self.phases: Tensor | None = None
        if isinstance(self.slots, ShardedSlots):
            phases = tuple(phase for rule in kept for phase in rule.slots().phases)  # type: ignore[attr-defined]
            self.slots = replace(self.slots, phases=phases if len(set(phases)) > 1 else phases[:1])
            self.phases = torch.tensor(self.slots.phases, device=device)
        own = [[rules[head] for head in self.q_heads.tolist()] for rules in kinds]
        # where query heads of one kv head differ, or rows of the batch, each needs a mask of its own; else the kept rule speaks for all
        differ = any(rule != kept[i // share] for rules in own for i, rule in enumerate(rules))
        self.q_rules = own if differ else None  # for each kind of rows, a rule for each query head
        self.which = which  # (B,): the kind of each row
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._strided: tuple[int, Tensor] | None = None  # a block of queries, and what they see of strided slots

    def own(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (keys, values) if self.every else (keys.index_select(1, self.heads), values.index_select(1, self.heads))

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values, self.which = fn(self.keys), fn(self.values), fn(self.which)
            device = self.keys.device
            self.heads, self.q_heads = self.heads.to(device), self.q_heads.to(device)
            self.phases = None if self.phases is None else self.phases.to(device)
            self._strided = None

    def forget_masks(self) -> None:
        self._strided = None

    # What is stored

    def _lengths(self, seen: int, start: Tensor) -> Tensor:
        """Real tokens of each row after `seen` columns, (B, 1, 1). Heads that keep all count padding too: slots are columns."""
        if isinstance(self.slots, AllSlots):
            return torch.full((1, 1, 1), seen, device=start.device)
        return (seen - start).clamp(min=0)[:, None, None]

    def positions(self, seen: int, start: Tensor) -> Tensor:
        """The position, counted from the row's first real token, of what each slot holds; -1: empty or padding. (B|1, H|1, slots)."""
        assert self.keys is not None
        held = self.slots.held(self._lengths(seen, start), self.keys.shape[2])
        if isinstance(self.slots, AllSlots):
            return (held - start[:, None, None]).clamp(min=-1)
        return held

    def add(self, keys: Tensor, values: Tensor, before: int, start: Tensor) -> None:
        """Store what is to be kept of columns [before, before + n)."""
        seen = before + keys.shape[2]
        length, old_length = self._lengths(seen, start), self._lengths(before, start)
        capacity = self.slots.capacity(seen)
        if self.keys is not None and self.values is not None:
            if isinstance(self.slots, AllSlots):
                self._grow(capacity)
                self.keys = _written(self.keys, slice(before, seen), keys)
                self.values = _written(self.values, slice(before, seen), values)
                return
            if keys.shape[2] == 1:
                self._grow(capacity)
                self._add_one(keys, values, old_length)
                return
        self._strided = None
        held = self.slots.held(length, capacity)
        column = held - before  # among the new ones
        if not isinstance(self.slots, AllSlots):
            column = column + start[:, None, None]
        if self.keys is None or self.values is None:
            self.keys, self.values = _pick(keys, column), _pick(values, column)
            return
        index = torch.where(column >= 0, self.keys.shape[2] + column, self.slots.of(held.clamp(min=0), old_length))
        self.keys, self.values = (
            _pick(torch.cat([self.keys, keys], 2), index),
            _pick(torch.cat([self.values, values], 2), index),
        )

    def _grow(self, capacity: int) -> None:
        assert self.keys is not None and self.values is not None
        if capacity > self.keys.shape[2]:
            self.keys, self.values = _grown(self.keys, capacity), _grown(self.values, capacity)

    def _add_one(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """One token at `position` (B, 1, 1) of each row, written in place."""
        assert self.keys is not None and self.values is not None
        slot = self.slots.of(position, position + 1)
        if isinstance(self.slots, ShardedSlots):  # what its slot holds may be an entry that stays, elsewhere
            leaving = position - self.slots.ring
            target = torch.where(leaving >= 0, self.slots.of(leaving.clamp(min=0), position + 1), slot)
            target = torch.where(target < self.keys.shape[2], target, slot)  # not kept at all
            self.keys = _scattered(self.keys, target, _pick(self.keys, slot))
            self.values = _scattered(self.values, target, _pick(self.values, slot))
            if self._strided is not None and self._strided[1].shape[3] == self.keys.shape[2]:
                for place in (
                    target,
                    slot,
                ):  # within a block of queries, slots that are filled stay seen; nothing else changes
                    rows = place[:1].expand(1, len(self.heads), 1).repeat_interleave(self.share, dim=1)
                    self._strided[1].scatter_(3, rows[:, :, None], True)
        self.keys, self.values = _scattered(self.keys, slot, keys), _scattered(self.values, slot, values)

    # The attention over it

    def attend(
        self, call: AttentionCall, q: Tensor, keys: Tensor, values: Tensor, before: int, start: Tensor, uniform: bool
    ) -> Tensor:
        """Attention of new queries over what is stored and what has just come; then (for one token: before) it is stored."""
        if q.shape[2] == 1:
            self.add(keys, values, before, start)
            assert self.keys is not None and self.values is not None
            k, v, mask = self._readable(before + 1, start, uniform)
            return attention_over(call, q, k, v, mask)
        assert self.keys is not None and self.values is not None
        fresh = (torch.arange(before, before + q.shape[2], device=q.device) - start[:, None])[:, None]
        held = self.positions(before, start)
        held = held.expand(max(held.shape[0], fresh.shape[0]), -1, -1)
        position = torch.cat([held, fresh.expand(held.shape[0], held.shape[1], -1)], 2)
        k, v = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        outs = []
        for i in range(0, q.shape[2], _ROWS):
            mask = self.visible(fresh[:, :, i : i + _ROWS, None], position[:, :, None])
            outs.append(attention_over(call, q[:, :, i : i + _ROWS], k, v, mask))
        self.add(keys, values, before, start)
        return torch.cat(outs, dim=2)

    def _readable(self, seen: int, start: Tensor, uniform: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values for the newest query, and a mask (B, H, 1, slots) unless it sees all of them."""
        assert self.keys is not None and self.values is not None
        k, v, offset = self.keys, self.values, int(start[0]) if uniform else 0
        if uniform and self.q_rules is None:
            if isinstance(self.rule, Full):
                return k[:, :, offset:seen], v[:, :, offset:seen], None
            if isinstance(self.rule, Window):
                return k[:, :, : seen - offset], v[:, :, : seen - offset], None
        if uniform and isinstance(self.slots, ShardedSlots) and self.q_rules is None:
            return k, v, self._strided_mask(seen, start[:1], offset)
        query = (seen - 1 - start)[:, None, None, None]
        return k, v, self.visible(query, self.positions(seen, start)[:, :, None])

    def _strided_mask(self, seen: int, start: Tensor, offset: int) -> Tensor:
        """(1, query heads, 1, slots), made once a block: working it out costs as much as attending."""
        assert self.keys is not None and isinstance(self.slots, ShardedSlots)
        block, slots = (seen - 1 - offset) // self.slots.block, self.keys.shape[2]
        if self._strided is None or self._strided[0] != block or self._strided[1].shape[3] != slots:
            query = (seen - 1 - start)[:, None, None, None]
            mask = self.visible(query, self.positions(seen, start)[:, :, None])
            self._strided = (block, mask.expand(-1, len(self.q_heads), -1, -1).contiguous())
        return self._strided[1]

    def visible(self, query: Tensor, position: Tensor) -> Tensor:
        """Which positions (B, H|1, 1, n) the queries at (B, 1, rows, 1) see: (B, 1 | query heads, rows, n)."""
        if self.q_rules is None:
            if self.phases is None:
                return self.rule.visible(query, position)
            rule = self.rule
            assert isinstance(rule, Sharded)
            seen = rule.visible_by(query, position, self.phases[None, :, None, None])
            return seen.repeat_interleave(self.share, dim=1) if seen.shape[1] > 1 else seen
        kinds = [self._visible_by_head(rules, query, position) for rules in self.q_rules]
        out = kinds[0]
        for number, kind in enumerate(kinds[1:], 1):
            out = torch.where((self.which == number)[:, None, None, None], kind, out)
        return out

    def _visible_by_head(self, rules: list[Rule], query: Tensor, position: Tensor) -> Tensor:
        per_head = position.repeat_interleave(self.share, dim=1) if position.shape[1] > 1 else position
        shape = broadcast_shape(query.shape, per_head.shape)
        out = torch.zeros((shape[0], len(rules), *shape[2:]), dtype=torch.bool, device=query.device)
        for rule in dict.fromkeys(rules):
            heads = [i for i, own in enumerate(rules) if own == rule]
            some = per_head if per_head.shape[1] == 1 else per_head[:, heads]
            out[:, heads] = rule.visible(query, some).expand(-1, len(heads), -1, -1)
        return out


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Entries of (B, H, n, D) at index (B|1, H|1, slots); what lies outside is some entry or other, for a mask to hide."""
    index = index.clamp(0, rows.shape[2] - 1)
    if index.shape[0] == 1 and index.shape[1] == 1:
        return rows.index_select(2, index[0, 0])
    return rows.gather(2, index[..., None].expand(rows.shape[0], rows.shape[1], -1, rows.shape[3]))


def _scattered(store: Tensor, slot: Tensor, one: Tensor) -> Tensor:
    """`store` (B, H, slots, D) with `one` (B, H, 1, D) at slot (B, H|1, 1): in place, unless a gradient flows through either."""
    if torch.is_grad_enabled() and (store.requires_grad or one.requires_grad):
        store = store.clone()
    return store.scatter_(2, slot[..., None].expand(one.shape), one)


def _grown(old: Tensor, capacity: int) -> Tensor:
    new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
    new[:, :, : old.shape[2]] = old
    return new


def _written(store: Tensor, place: slice, new: Tensor) -> Tensor:
    """`store` with `new` at `place` of its slots: in place, unless a gradient flows through either."""
    if torch.is_grad_enabled() and (store.requires_grad or new.requires_grad):
        store = store.clone()
    store[:, :, place] = new
    return store
