"""`PagedStore`: what a cache layer keeps, each pair of a batch row and a kv head with its own length, in memory that follows.

A pair (row, kv head) is a *sequence*. Sequences of (nearly) equal length lie together in one rectangle of whole pages, `Pages`, so
that one matrix product serves all of them: with equal lengths everywhere there is a single rectangle and no loop. New tokens are
appended in place, or written over the one that leaves; evicting more than one copies what stays into fewer pages and frees the rest.

Order inside a sequence means nothing to a softmax; every entry carries its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.reference import accumulation_dtype, softmax_with_lse

PAGE = 16  # tokens; long sequences grow by 1/128 of their length, so that slack stays below 1 % and copying below 128 rows a token

Rows = dict[str, Tensor]
"""Named tensors of entries, "k", "v", "position" and whatever a policy keeps beside them; leading dimensions by context."""


def capacity(length: int) -> int:
    """Tokens allocated for `length` of them."""
    page = max(PAGE, length // 128 // PAGE * PAGE)
    return -(-length // page) * page


class Pages:
    """Sequences of about the same length, in one rectangle.

    Attributes:
        members: which sequences (row * kv heads + head), ascending, int64 (G,) on the CPU. length: entries of each, likewise.
        data: name -> (G, capacity, ...). longest, shortest: of the lengths. even: whether all are equal.
    """

    def __init__(self, members: Tensor, length: Tensor, data: Rows) -> None:
        self.members, self.data = members, data
        self._members: Tensor | None = None
        self.set_length(length)

    def set_length(self, length: Tensor) -> None:
        self.length = length
        self.longest, self.shortest = (int(length.max()), int(length.min())) if length.numel() else (0, 0)
        self.even = self.longest == self.shortest

    def __getitem__(self, name: str) -> Tensor:
        """(G, longest, ...): a view of what is stored, the unused end of shorter sequences included."""
        return self.data[name][:, : self.longest]

    def valid(self) -> Tensor | None:
        """Bool (G, longest): which entries exist; None when all do."""
        if self.even:
            return None
        slots = torch.arange(self.longest)
        return (slots < self.length[:, None]).to(self.data["k"].device)

    def members_on(self, device: torch.device) -> Tensor:
        """`members` on the device, copied there once."""
        if self._members is None or self._members.device != device:
            self._members = self.members.to(device)
        return self._members

    def ensure(self, tokens: int) -> None:
        """Room for `tokens` entries in every sequence."""
        have = self.data["k"].shape[1]
        if tokens <= have:
            return
        wanted = capacity(tokens)
        for name, old in self.data.items():
            self.data[name] = _sized(old, wanted)


class PagedStore:
    """Entries of all sequences of one layer. `batch` and `heads` are set by the first `fill`."""

    def __init__(self) -> None:
        self.batch = self.heads = 0
        self.parts: list[Pages] = []

    # Filling, appending, evicting

    def fill(self, rows: Rows, index: Tensor, count: Tensor) -> None:
        """Begin with some of `rows`.

        Args:
            rows: name -> (B, H, n, ...). index: (B, H, K) int64, which of the n a sequence takes; entries beyond its count are ignored.
            count: (B, H) int64 on the CPU, how many it takes.
        """
        self.batch, self.heads = index.shape[:2]
        flat = {name: tensor.flatten(0, 1) for name, tensor in rows.items()}
        self.parts = _packed(torch.arange(self.batch * self.heads), count.flatten(), index.flatten(0, 1), flat)

    def append(
        self, rows: Rows, victims: Sequence[tuple[Tensor, Tensor] | None] = (), skip: Tensor | None = None
    ) -> None:
        """Add n entries to every sequence.

        Args:
            rows: name -> (B, H, n, ...).
            victims: for each part None or, with n = 1, a slot for each of its sequences (G,) and, on the CPU, a bool (G,) saying
                which sequences write the new entry over that slot; the others grow.
            skip: (B,) int64 on the CPU: how many of the first entries a row leaves out (padding).
        """
        count = next(iter(rows.values())).shape[2]
        for number, part in enumerate(self.parts):
            new = {name: self.pick(tensor, part) for name, tensor in rows.items()}
            victim = victims[number] if number < len(victims) else None
            if skip is not None and bool(skip.any()):
                self._write_some(part, new, count, skip[part.members // self.heads].clamp(max=count))
            elif victim is not None:
                slot, over = victim
                self._write(part, new, slot, over)
            elif part.even:
                begin = part.longest
                part.ensure(begin + count)
                for name, tensor in new.items():
                    part.data[name][:, begin : begin + count] = tensor
                part.set_length(part.length + count)
            else:
                self._write_some(part, new, count, torch.zeros_like(part.length))
        if len(self.parts) > 1:
            self._join()

    def _join(self) -> None:
        """Rectangles whose lengths have come near each other (rows that reach the same budget one after another) become one."""
        order = sorted(range(len(self.parts)), key=lambda i: -self.parts[i].longest)
        for first, second in pairwise(order):
            one, other = self.parts[first], self.parts[second]
            if one.longest - min(one.shortest, other.shortest) > _near(one.longest):
                continue
            members = torch.cat([one.members, other.members])
            place = members.argsort()
            length = torch.cat([one.length, other.length])[place]
            size = capacity(one.longest)
            data = {}
            for name in one.data:
                tensors = (_sized(part.data[name], size) for part in (one, other))
                data[name] = torch.cat(list(tensors)).index_select(0, place.to(one.data[name].device))
            self.parts = [part for part in self.parts if part is not one and part is not other]
            self.parts.append(Pages(members[place], length, data))
            return  # one pair a step: the next one comes with the next token

    def _write(self, part: Pages, new: Rows, slot: Tensor, over: Tensor) -> None:
        """One entry a sequence, over the slot or at the end."""
        device = slot.device
        if not bool(over.all()):
            part.ensure(int((part.length + ~over).max()))
            slot = torch.where(over.to(device), slot, part.length.to(device))
            part.set_length(part.length + ~over)
        where = torch.arange(slot.shape[0], device=device)
        for name, tensor in new.items():
            part.data[name][where, slot] = tensor[:, 0]

    def _write_some(self, part: Pages, new: Rows, count: int, skip: Tensor) -> None:
        """Entries [skip, count) of each sequence, each behind its own end."""
        part.ensure(int((part.length + count - skip).max()))
        member, entry = (torch.arange(count) >= skip[:, None]).nonzero(as_tuple=True)
        slot = part.length[member] + entry - skip[member]
        device = part.data["k"].device
        member, entry, slot = member.to(device), entry.to(device), slot.to(device)
        for name, tensor in new.items():
            part.data[name][member, slot] = tensor[member, entry]
        part.set_length(part.length + count - skip)

    def keep(self, chosen: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Evict: of each part keep the slots `index` (G, K), of which the first `count` (G,), on the CPU, count; None: all of it."""
        parts: list[Pages] = []
        for part, choice in zip(self.parts, chosen):
            parts += [part] if choice is None else _packed(part.members, choice[1], choice[0], part.data)
        self.parts = parts

    def copy_of(self, other: PagedStore, chosen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hold copies of some entries of `other`: of each of its parts the slots `index` (G, K), the first `count` (G,) of them."""
        self.batch, self.heads, self.parts = other.batch, other.heads, []
        for part, (index, count) in zip(other.parts, chosen):
            self.parts += _packed(part.members, count, index, part.data)

    def subset(self, rows: Sequence[int]) -> PagedStore:
        """Some rows of the batch, numbered anew, as views: for looking only."""
        found = PagedStore()
        found.batch, found.heads = len(rows), self.heads
        for number, row in enumerate(rows):
            for part in self.parts:
                at = (part.members // self.heads == row).nonzero()[:, 0]
                if len(at):  # members are ascending, so those of a row lie side by side
                    members = part.members[at] - row * self.heads + number * self.heads
                    one = slice(int(at[0]), int(at[-1]) + 1)
                    found.parts.append(Pages(members, part.length[one], {n: t[one] for n, t in part.data.items()}))
        return found

    def replace(self, rows: Sequence[int], by: PagedStore) -> None:
        """Put the rows of `by`, in order, in the place of `rows`."""
        parts = []
        for part in self.parts:
            at = torch.tensor([i for i, m in enumerate(part.members.tolist()) if m // self.heads not in rows])
            if len(at):
                data = {name: tensor[at.to(tensor.device)] for name, tensor in part.data.items()}
                parts.append(Pages(part.members[at], part.length[at], data))
        row = torch.tensor(list(rows))
        for part in by.parts:
            members = row[part.members // self.heads] * self.heads + part.members % self.heads
            parts.append(Pages(members, part.length, part.data))
        self.parts = parts

    def drop_from(self, position: int) -> None:
        """Take back every entry at `position` or later."""
        chosen: list[tuple[Tensor, Tensor] | None] = []
        for part in self.parts:
            stays = part["position"] < position
            valid = part.valid()
            stays = stays if valid is None else stays & valid
            count = stays.sum(1).cpu()
            chosen.append(
                (
                    stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : max(1, int(count.max()))],
                    count,
                )
            )
        self.keep(chosen)

    # Looking

    def pick(self, tensor: Tensor, part: Pages) -> Tensor:
        """Of (B, H, ...) the sequences of a part, (G, ...)."""
        flat = tensor.flatten(0, 1)
        if len(self.parts) == 1 and part.members.shape[0] == flat.shape[0]:
            return flat
        return flat.index_select(0, part.members_on(tensor.device))

    def attend(
        self,
        q: Tensor,
        scale: float,
        soft_cap: float | None = None,
        keys: Callable[[Pages], Tensor] | None = None,
        backend: str = "auto",
        weights: bool = False,
        lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Softmax attention of every query over all entries of its sequence.

        Args:
            q: (B, H_q, n, D); query head h reads kv head h // (H_q // H). scale, soft_cap: as in `AttentionCall`.
            keys: the keys of a part, (G, longest, D), if they are not to be seen as stored. weights, lse: whether those are wanted.
        Returns:
            outputs (B, H_q, n, Dv), log-sum-exps (B, H_q, n) or None, and for each part the weights (G, H_q / H, n, longest), if asked for.
        """
        batch, q_heads, rows = q.shape[:3]
        grouped = q.reshape(batch, self.heads, q_heads // self.heads, rows, q.shape[3])
        outs, tops, kept = [], [], []
        for part in self.parts:
            k = part["k"] if keys is None else keys(part)
            out, top, weight = _attend(self.pick(grouped, part), k, part, scale, soft_cap, backend, weights, lse)
            outs.append(out)
            tops.append(top)
            kept += [] if weight is None else [weight]
        if len(self.parts) == 1:
            out, top = outs[0], tops[0]
        else:
            order = torch.cat([part.members for part in self.parts]).argsort().to(q.device)
            out = torch.cat(outs).index_select(0, order)
            top = torch.cat(tops).index_select(0, order) if lse else None  # type: ignore[arg-type]
        out = out.reshape(batch, q_heads, rows, -1)
        return out, None if top is None else top.reshape(batch, q_heads, rows), kept

    def gathered(self, name: str) -> tuple[Tensor, Tensor]:
        """All entries as one rectangle, (B, H, longest, ...), zeros where a sequence is shorter, and the lengths (B, H)."""
        longest = max((part.longest for part in self.parts), default=0)
        like = self.parts[0].data[name]
        whole = like.new_zeros((self.batch * self.heads, longest, *like.shape[2:]))
        length = torch.zeros(self.batch * self.heads, dtype=torch.long)
        for part in self.parts:
            whole[part.members_on(like.device), : part.longest] = part[name]
            length[part.members] = part.length
        slots = torch.arange(longest, device=like.device)
        valid = slots < length.to(like.device)[:, None]
        whole = whole.masked_fill(~valid[(...,) + (None,) * (whole.dim() - 2)], 0)
        shape = (self.batch, self.heads)
        return whole.unflatten(0, shape), length.view(shape)

    # Rows of the batch

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> list[int] | None:
        """Let `fn`, which maps tensors with a leading batch dimension, act on every sequence; returns which old row each new row is,
        or None where that did not need to be known."""
        if not self.parts:
            return None
        device = self.parts[0].data["k"].device
        rows = fn(torch.arange(self.batch, device=device))
        new_batch = rows.shape[0]
        only = self.parts[0]
        if len(self.parts) == 1 and only.even:
            for name, tensor in only.data.items():
                only.data[name] = fn(tensor.unflatten(0, (self.batch, self.heads))).flatten(0, 1)
            members = torch.arange(new_batch * self.heads)
            self.parts = [Pages(members, only.length[:1].expand(len(members)).clone(), only.data)]
            self.batch = new_batch
            return None
        old = rows.tolist()
        source = torch.tensor(old)[:, None] * self.heads + torch.arange(self.heads)
        source = source.flatten()
        parts = []
        for part in self.parts:
            where = torch.full((self.batch * self.heads,), -1)
            where[part.members] = torch.arange(len(part.members))
            members = (where[source] >= 0).nonzero()[:, 0]
            if len(members):
                inside = where[source[members]]
                index = inside.to(rows.device)
                data = {name: tensor.to(rows.device).index_select(0, index) for name, tensor in part.data.items()}
                parts.append(Pages(members, part.length[inside], data))
        self.parts, self.batch = parts, new_batch
        return old


def _near(longest: int) -> int:
    """By how many entries a sequence may be shorter than the longest one of its rectangle."""
    return max(PAGE // 2, longest // 64)


def _sized(tensor: Tensor, size: int) -> Tensor:
    """(G, size, ...) out of (G, n, ...)."""
    new = tensor.new_zeros((tensor.shape[0], size, *tensor.shape[2:]))
    kept = min(size, tensor.shape[1])
    new[:, :kept] = tensor[:, :kept]
    return new


def _packed(members: Tensor, count: Tensor, index: Tensor, flat: Rows) -> list[Pages]:
    """Rectangles for sequences that take the first `count` of `index` (G, K) from `flat` (G, n, ...); near lengths share one."""
    parts: list[Pages] = []
    left = count.argsort(descending=True, stable=True).tolist()
    counts = count.tolist()
    while left:
        longest = counts[left[0]]
        together = [at for at in left if counts[at] >= longest - _near(longest)]
        left = left[len(together) :]
        at = torch.tensor(sorted(together))
        whole = len(together) == len(counts)
        parts.append(_rectangle(members[at], count[at], index, flat, None if whole else at.to(index.device), longest))
    return parts


def _rectangle(members: Tensor, length: Tensor, index: Tensor, flat: Rows, at: Tensor | None, longest: int) -> Pages:
    data = {}
    chosen = (index if at is None else index.index_select(0, at))[:, :longest].clamp(min=0)
    every = torch.arange(index.shape[0], device=index.device) if at is None else at
    for name, tensor in flat.items():
        pages = tensor.new_zeros((len(members), capacity(max(1, longest)), *tensor.shape[2:]))
        pages[:, :longest] = tensor[every[:, None], chosen]
        data[name] = pages
    return Pages(members, length, data)


def _attend(
    q: Tensor, k: Tensor, part: Pages, scale: float, soft_cap: float | None, backend: str, weights: bool, lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q (G, g, n, D) over one rectangle: (G, g, n, Dv), (G, g, n) and the weights (G, g, n, L), the last two where asked for."""
    v, valid = part["v"], part.valid()
    if q.shape[2] > 1 and not weights:
        score_mod = None if soft_cap is None else ops.scores.soft_cap(soft_cap)
        mask = None if valid is None else valid[:, None, None]
        options: dict[str, Any] = {"mask": mask, "score_mod": score_mod, "scale": scale, "backend": backend}
        result = ops.attention(q, k[:, None], v[:, None], return_lse=lse, **options)
        return (*result, None) if lse else (result, None, None)
    dtype = accumulation_dtype(q.dtype)
    flat = q.flatten(1, 2)
    if dtype != q.dtype and soft_cap is None and not (weights or lse):
        mask = None if valid is None else valid[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(flat, k, v, attn_mask=mask, scale=scale)
        return (
            out.nan_to_num(0.0).view(*q.shape[:3], -1) if valid is not None else out.view(*q.shape[:3], -1),
            None,
            None,
        )
    scores = torch.matmul(flat.to(dtype) * scale, k.to(dtype).transpose(1, 2))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    top = None
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    if valid is None and not lse and scores.shape[-1]:
        weight = torch.softmax(scores, -1)
    else:
        weight, top = softmax_with_lse(scores)
    out = torch.matmul(weight, v.to(dtype)).to(q.dtype)
    shape = q.shape[:3]
    return out.view(*shape, -1), None if top is None else top.view(shape), weight.view(*shape, -1) if weights else None
