"""Masks: who may look at whom, fixed in advance.

A mask is a callable `mask(b, h, q_idx, kv_idx) -> bool` over index tensors that broadcast together (FlexAttention's
`mask_mod`), where `q_idx` and `kv_idx` are absolute positions. Masks compose with `&`, `|` and `~`:

    local = sliding_window(512) & causal | sink(4) & causal

A mask can also bound itself over rectangles of positions (`bounds`), which is how the block backends learn which tiles
are empty, full or mixed without ever making the N x M matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, require, require_int, require_name, require_tensor

__all__ = [
    "Mask",
    "as_mask",
    "block",
    "causal",
    "dense",
    "dilated",
    "document",
    "everything",
    "from_function",
    "head_sharded",
    "padding",
    "per_head",
    "prefix",
    "shifted",
    "sink",
    "sliding_window",
]

Bounds = tuple[Tensor, Tensor]


class Mask:
    """A predicate over (batch, head, query position, key position).

    Subclasses define `keep` and, when they can, `bounds`. `varies_batch` / `varies_head` tell whether the answer depends on
    `b` / `h`: a plan for a mask that does not is computed once and shared. `frozen`: the answer can never change (no tensors or
    user functions inside), so a plan may be kept. `relative`: it depends on `q_idx - kv_idx` alone, so equal offsets share a tile.
    """

    varies_batch: bool = False
    varies_head: bool = False
    frozen: bool = False
    relative: bool = False

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define keep()")

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        """(may keep something, surely keeps everything) over the inclusive rectangle [q_lo, q_hi] x [kv_lo, kv_hi].

        Both answers may err on the unsure side: the first towards True, the second towards False.
        """
        shape = torch.broadcast_shapes(b.shape, h.shape, q_lo.shape, kv_lo.shape)
        device = q_lo.device
        return torch.ones(shape, dtype=torch.bool, device=device), torch.zeros(shape, dtype=torch.bool, device=device)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.keep(b, h, q_idx, kv_idx)

    def __and__(self, other: Any) -> Mask:
        return _And(self, as_mask(other))

    def __rand__(self, other: Any) -> Mask:
        return _And(as_mask(other), self)

    def __or__(self, other: Any) -> Mask:
        return _Or(self, as_mask(other))

    def __ror__(self, other: Any) -> Mask:
        return _Or(as_mask(other), self)

    def __invert__(self) -> Mask:
        return _Not(self)

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        num_heads: int = 1,
        q_offset: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The boolean matrix, (batch or 1, num_heads or 1, q_len, kv_len): True where the query may look."""
        offset = kv_len - q_len if q_offset is None else q_offset
        b, h, q, kv = index_grid(
            batch if self.varies_batch else 1, num_heads if self.varies_head else 1, q_len, kv_len, offset, device
        )
        shape = (b.shape[0], h.shape[1], q_len, kv_len)
        return torch.broadcast_to(self.keep(b, h, q, kv), shape)


def index_grid(
    batch: int, num_heads: int, q_len: int, kv_len: int, q_offset: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tensors (B,1,1,1), (1,H,1,1), (1,1,N,1), (1,1,1,M) for evaluating masks and score mods densely."""
    return (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(num_heads, device=device).view(1, -1, 1, 1),
        torch.arange(q_len, device=device).view(1, 1, -1, 1) + q_offset,
        torch.arange(kv_len, device=device).view(1, 1, 1, -1),
    )


def _inherit(mask: Mask, *parts: Mask) -> None:
    """What a composition varies with, and what it may promise."""
    mask.varies_batch = any(part.varies_batch for part in parts)
    mask.varies_head = any(part.varies_head for part in parts)
    mask.frozen = all(part.frozen for part in parts)
    mask.relative = all(part.relative for part in parts)


class _And(Mask):
    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right
        _inherit(self, left, right)

    def keep(self, b, h, q_idx, kv_idx):
        return self.left.keep(b, h, q_idx, kv_idx) & self.right.keep(b, h, q_idx, kv_idx)

    def bounds(self, *args):
        some_l, all_l = self.left.bounds(*args)
        some_r, all_r = self.right.bounds(*args)
        return some_l & some_r, all_l & all_r

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class _Or(Mask):
    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right
        _inherit(self, left, right)

    def keep(self, b, h, q_idx, kv_idx):
        return self.left.keep(b, h, q_idx, kv_idx) | self.right.keep(b, h, q_idx, kv_idx)

    def bounds(self, *args):
        some_l, all_l = self.left.bounds(*args)
        some_r, all_r = self.right.bounds(*args)
        return some_l | some_r, all_l | all_r

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class _Not(Mask):
    def __init__(self, inner: Mask) -> None:
        self.inner = inner
        _inherit(self, inner)

    def keep(self, b, h, q_idx, kv_idx):
        return ~self.inner.keep(b, h, q_idx, kv_idx)

    def bounds(self, *args):
        some, every = self.inner.bounds(*args)
        return ~every, ~some

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


class _Function(Mask):
    def __init__(self, function: Callable[..., Tensor], varies_batch: bool, varies_head: bool) -> None:
        self.function = function
        self.varies_batch, self.varies_head = varies_batch, varies_head

    def keep(self, b, h, q_idx, kv_idx):
        out = self.function(b, h, q_idx, kv_idx)
        if not isinstance(out, Tensor) or out.dtype != torch.bool:
            raise bad_type("mask", getattr(out, "dtype", out), "a mask_mod that returns a bool tensor")
        return out

    def __repr__(self) -> str:
        return f"from_function({getattr(self.function, '__name__', self.function)!r})"


class _Everything(Mask):
    frozen = relative = True

    def keep(self, b, h, q_idx, kv_idx):
        return torch.ones(torch.broadcast_shapes(q_idx.shape, kv_idx.shape), dtype=torch.bool, device=q_idx.device)

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        every = self.keep(b, h, q_lo, kv_lo)
        return every, every

    def __repr__(self) -> str:
        return "everything"


class _Causal(Mask):
    frozen = relative = True

    def keep(self, b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        return q_hi >= kv_lo, q_lo >= kv_hi

    def __repr__(self) -> str:
        return "causal"


class _SlidingWindow(Mask):
    frozen = relative = True

    def __init__(self, window: int) -> None:
        self.window = require_int("window", window, 0)

    def keep(self, b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() < self.window

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        nearest = torch.maximum(torch.maximum(q_lo - kv_hi, kv_lo - q_hi), torch.zeros_like(q_lo - kv_hi))
        farthest = torch.maximum(q_hi - kv_lo, kv_hi - q_lo)
        return nearest < self.window, farthest < self.window

    def __repr__(self) -> str:
        return f"sliding_window({self.window})"


class _Sink(Mask):
    frozen = True

    def __init__(self, sink: int) -> None:
        self.sink = require_int("sink", sink, 0)

    def keep(self, b, h, q_idx, kv_idx):
        return (kv_idx < self.sink) & (q_idx == q_idx)

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        always = q_lo == q_lo
        return (kv_lo < self.sink) & always, (kv_hi < self.sink) & always

    def __repr__(self) -> str:
        return f"sink({self.sink})"


class _Dilated(Mask):
    frozen = relative = True

    def __init__(self, dilation: int, window: int | None) -> None:
        self.dilation = require_int("dilation", dilation, 1)
        self.window = None if window is None else require_int("window", window, 0)

    def keep(self, b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        kept = distance % self.dilation == 0
        if self.window is not None:
            kept = kept & (distance.abs() < self.window * self.dilation)
        return kept

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        if self.window is None:
            some = torch.ones(torch.broadcast_shapes(q_lo.shape, kv_lo.shape), dtype=torch.bool, device=q_lo.device)
            every = some
        else:
            some, every = _SlidingWindow(self.window * self.dilation).bounds(b, h, q_lo, q_hi, kv_lo, kv_hi)
        return some, every if self.dilation == 1 else torch.zeros_like(every)

    def __repr__(self) -> str:
        return f"dilated({self.dilation}, window={self.window})"


class _Prefix(Mask):
    """Everybody sees the first `lengths` tokens (one number, or one a batch row)."""

    def __init__(self, lengths: int | Tensor) -> None:
        if isinstance(lengths, Tensor):
            require(
                lengths.dim() == 1 and not lengths.is_floating_point(), "lengths", tuple(lengths.shape), "(B,) integers"
            )
            self.lengths, self.varies_batch = lengths, True
        else:
            self.lengths = torch.tensor([require_int("lengths", lengths, 0)])
            self.varies_batch, self.frozen = False, True

    def _limit(self, b: Tensor) -> Tensor:
        return self.lengths.to(b.device)[b if self.varies_batch else torch.zeros_like(b)]

    def keep(self, b, h, q_idx, kv_idx):
        return (kv_idx < self._limit(b)) & (q_idx == q_idx)

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        limit, always = self._limit(b), q_lo == q_lo
        return (kv_lo < limit) & always, (kv_hi < limit) & always

    def __repr__(self) -> str:
        return f"prefix({self.lengths.tolist()})"


class _Padding(Mask):
    varies_batch = True

    def __init__(self, lengths: Tensor | None, start: Tensor | None) -> None:
        for name, value in (("lengths", lengths), ("start", start)):
            if value is not None:
                require_tensor(name, value, dims=1)
                require(not value.is_floating_point(), name, value.dtype, "integers, one a batch row")
                require(bool((value >= 0).all()), name, value.tolist(), "integers >= 0")
        if lengths is None and start is None:
            raise ValueError("lengths: got None and start is None too, need at least one of them")
        self.lengths, self.start = lengths, start

    def keep(self, b, h, q_idx, kv_idx):
        kept = q_idx == q_idx
        if self.lengths is not None:
            kept = kept & (kv_idx < self.lengths.to(b.device)[b])
        if self.start is not None:
            kept = kept & (kv_idx >= self.start.to(b.device)[b])
        return kept

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        some = every = q_lo == q_lo
        if self.lengths is not None:
            length = self.lengths.to(b.device)[b]
            some, every = some & (kv_lo < length), every & (kv_hi < length)
        if self.start is not None:
            start = self.start.to(b.device)[b]
            some, every = some & (kv_hi >= start), every & (kv_lo >= start)
        return some, every

    def __repr__(self) -> str:
        ends = [None if t is None else t.tolist() for t in (self.lengths, self.start)]
        return f"padding(lengths={ends[0]}, start={ends[1]})"


class _Document(Mask):
    def __init__(self, ids: Tensor) -> None:
        require_tensor("ids", ids)
        require(ids.dim() in (1, 2), "ids", f"shape {tuple(ids.shape)}", "(N,) or (B, N) document numbers by position")
        require(not ids.is_floating_point(), "ids", ids.dtype, "integers")
        self.ids = ids if ids.dim() == 2 else ids[None]
        self.varies_batch = ids.dim() == 2

    def _of(self, b: Tensor, position: Tensor) -> Tensor:
        ids = self.ids.to(position.device)
        position = position.clamp(0, ids.shape[1] - 1)
        return ids[b if self.varies_batch else torch.zeros_like(b), position]

    def keep(self, b, h, q_idx, kv_idx):
        return self._of(b, q_idx) == self._of(b, kv_idx)

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        ranges = self._ranges().to(q_lo.device)
        row = b if self.varies_batch else torch.zeros_like(b)
        q_min, q_max = _range_extremes(ranges, row, q_lo, q_hi)
        kv_min, kv_max = _range_extremes(ranges, row, kv_lo, kv_hi)
        some = (q_min <= kv_max) & (kv_min <= q_max)
        return some, (q_min == q_max) & (kv_min == kv_max) & (q_min == kv_min)

    def _ranges(self) -> Tensor:
        """(2, levels, B, N): smallest and largest number within [i, i + 2^level). Made anew each time: `ids` may have changed."""
        low = high = self.ids
        levels = [torch.stack([low, high])]
        step = 1
        while 2 * step <= self.ids.shape[1]:
            later = (torch.arange(self.ids.shape[1], device=low.device) + step).clamp(max=self.ids.shape[1] - 1)
            low, high = torch.minimum(low, low[:, later]), torch.maximum(high, high[:, later])
            levels.append(torch.stack([low, high]))
            step *= 2
        return torch.stack(levels, dim=1)

    def __repr__(self) -> str:
        return f"document({tuple(self.ids.shape)})"


def _range_extremes(ranges: Tensor, row: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number within the inclusive range [lo, hi], from two overlapping powers of two."""
    last = ranges.shape[3] - 1
    lo, hi = lo.clamp(0, last), hi.clamp(0, last)
    span = (hi - lo + 1).clamp(min=1)
    level = (torch.frexp(span.double()).exponent - 1).long()
    second = hi - (1 << level) + 1
    low = torch.minimum(ranges[0][level, row, lo], ranges[0][level, row, second])
    high = torch.maximum(ranges[1][level, row, lo], ranges[1][level, row, second])
    return low, high


class _Block(Mask):
    frozen = True

    def __init__(self, size: int) -> None:
        self.size = require_int("size", size, 1)

    def keep(self, b, h, q_idx, kv_idx):
        return q_idx // self.size == kv_idx // self.size

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        q_first, q_last = q_lo // self.size, q_hi // self.size
        k_first, k_last = kv_lo // self.size, kv_hi // self.size
        return (q_first <= k_last) & (k_first <= q_last), (q_first == q_last) & (k_first == k_last) & (
            q_first == k_first
        )

    def __repr__(self) -> str:
        return f"block({self.size})"


class _Dense(Mask):
    def __init__(self, tensor: Tensor, q_offset: int | None) -> None:
        require_tensor("mask", tensor)
        require(tensor.dtype == torch.bool, "mask", tensor.dtype, "a bool tensor, True where a query may look")
        require(tensor.dim() in (2, 4), "mask", f"shape {tuple(tensor.shape)}", "(N, M) or (B|1, H|1, N|1, M)")
        self.tensor = tensor if tensor.dim() == 4 else tensor[None, None]
        self.varies_batch, self.varies_head = self.tensor.shape[0] > 1, self.tensor.shape[1] > 1
        self.q_offset = q_offset

    def keep(self, b, h, q_idx, kv_idx):
        tensor = self.tensor.to(q_idx.device)
        rows, columns = tensor.shape[2:]
        row = q_idx - (columns - rows if self.q_offset is None else self.q_offset)
        row = row.clamp(0, rows - 1) if rows > 1 else torch.zeros_like(q_idx)
        zero_b, zero_h = torch.zeros_like(b), torch.zeros_like(h)
        return tensor[
            b if self.varies_batch else zero_b, h if self.varies_head else zero_h, row, kv_idx.clamp(max=columns - 1)
        ]

    def __repr__(self) -> str:
        return f"dense({tuple(self.tensor.shape)})"


class _PerHead(Mask):
    varies_head = True

    def __init__(self, masks: list[Mask]) -> None:
        require(len(masks) > 0, "masks", masks, "one mask a head")
        self.masks = masks
        self.unique: list[Mask] = []
        numbers = []
        for mask in masks:
            if not any(mask is seen for seen in self.unique):
                self.unique.append(mask)
            numbers.append(next(i for i, seen in enumerate(self.unique) if seen is mask))
        self.number = torch.tensor(numbers)
        _inherit(self, *self.unique)
        self.varies_head, self.relative = True, False

    def _pick(self, h: Tensor, values: list[Tensor]) -> Tensor:
        number = self.number.to(h.device)[h]
        out = torch.zeros((), dtype=torch.bool, device=h.device)
        for i, value in enumerate(values):
            out = out | ((number == i) & value)
        return out

    def keep(self, b, h, q_idx, kv_idx):
        return self._pick(h, [mask.keep(b, h, q_idx, kv_idx) for mask in self.unique])

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        pairs = [mask.bounds(b, h, q_lo, q_hi, kv_lo, kv_hi) for mask in self.unique]
        return self._pick(h, [some for some, _ in pairs]), self._pick(h, [every for _, every in pairs])

    def __repr__(self) -> str:
        return f"per_head({len(self.masks)} heads, {len(self.unique)} kinds)"


class _HeadSharded(Mask):
    def __init__(
        self,
        num_heads: int,
        block_size: int,
        local_blocks: int | tuple[int, int],
        stride: int,
        dense_heads: int,
        homogeneous: bool,
        group: int,
        step: int | None,
        offset: int,
        causal: bool,
        position: str | None,
    ) -> None:
        self.num_heads = require_int("num_heads", num_heads, 1)
        self.block_size = require_int("block_size", block_size, 1)
        self.stride = require_int("stride", stride, 1)
        self.dense_heads = require_int("dense_heads", dense_heads, 0)
        self.group = require_int("group", group, 1)
        require(dense_heads <= num_heads, "dense_heads", dense_heads, f"at most num_heads = {num_heads}")
        both = local_blocks if isinstance(local_blocks, tuple) else (local_blocks, 1 if causal else local_blocks)
        require(len(both) == 2, "local_blocks", local_blocks, "an int, or (left, right)")
        self.left, self.right = (require_int("local_blocks", side, 0) for side in both)
        self.causal, self.homogeneous = bool(causal), bool(homogeneous)
        self.step = max(1, stride // (num_heads * group)) if step is None else require_int("step", step, 0)
        self.offset = require_int("offset", offset, -(1 << 62))
        self.position = require_name(
            "position", position or ("absolute" if causal else "relative"), ("absolute", "relative")
        )
        self.varies_head = dense_heads > 0 or (self.position == "absolute" and not self.homogeneous)

    def _phase(self, h: Tensor) -> tuple[Tensor, Tensor]:
        head = h // self.group
        dense = head >= self.num_heads - self.dense_heads
        phase = torch.zeros_like(head) if self.homogeneous else head * self.step
        return phase + self.offset, dense

    def _blocks(self, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query block i keeps key block j, causality aside."""
        phase, dense = self._phase(h)
        if self.position == "absolute":
            local = (i - j < self.left) & (j - i < self.right)
            return local | ((j + phase) % self.stride == 0) | dense
        beyond = (i - j - self.left + 1).clamp(min=0) + (j - i - self.right + 1).clamp(min=0)
        return (beyond % self.stride == 0) | dense

    def keep(self, b, h, q_idx, kv_idx):
        kept = self._blocks(h, q_idx // self.block_size, kv_idx // self.block_size)
        return kept & (q_idx >= kv_idx) if self.causal else kept

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        i_lo, i_hi = q_lo // self.block_size, q_hi // self.block_size
        j_lo, j_hi = kv_lo // self.block_size, kv_hi // self.block_size
        phase, dense = self._phase(h)
        # within one block the answer is exact; over several, bounds of the band and of the strided columns
        band = (i_hi - j_lo < self.left) & (j_hi - i_lo < self.right)
        if self.position == "absolute":
            first = -(-(j_lo + phase) // self.stride) * self.stride
            some = (i_lo - j_hi < self.left) & (j_lo - i_hi < self.right) | (first <= j_hi + phase) | dense
        else:
            some = (i_lo == i_lo) | dense
        one = (i_lo == i_hi) & (j_lo == j_hi)
        exact = self._blocks(h, i_lo, j_lo)
        some = torch.where(one, exact, some)
        every = torch.where(one, exact, band | dense | (self.stride == 1))
        if self.causal:
            some, every = some & (q_hi >= kv_lo), every & (q_lo >= kv_hi)
        return some, every

    def __repr__(self) -> str:
        local = self.left if self.causal else (self.left, self.right)
        return (
            f"head_sharded({self.num_heads}, block_size={self.block_size}, local_blocks={local}, stride={self.stride})"
        )


class _Shifted(Mask):
    def __init__(self, inner: Mask, start: Tensor) -> None:
        require_tensor("start", start, dims=1)
        require(not start.is_floating_point(), "start", start.dtype, "integers, one a batch row")
        self.inner, self.start = inner, start
        self.varies_batch, self.varies_head = True, inner.varies_head

    def _args(self, b: Tensor, h: Tensor, positions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        start = self.start.to(b.device)[b]
        return (b, h, *(position - start for position in positions))

    def keep(self, b, h, q_idx, kv_idx):
        return self.inner.keep(*self._args(b, h, (q_idx, kv_idx)))

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        return self.inner.bounds(*self._args(b, h, (q_lo, q_hi, kv_lo, kv_hi)))

    def __repr__(self) -> str:
        return f"shifted({self.inner!r}, {self.start.tolist()})"


everything: Mask = _Everything()
"""Every query sees every key."""

causal: Mask = _Causal()
"""A query at position p sees keys at positions <= p."""


def sliding_window(window: int) -> Mask:
    """Keys nearer than `window` tokens, on either side: `|q - kv| < window`. With `& causal`: `window` keys, own one included."""
    return _SlidingWindow(window)


def sink(sink: int) -> Mask:
    """The first `sink` keys, for everybody (combine: `(sliding_window(w) | sink(s)) & causal`)."""
    return _Sink(sink)


def dilated(dilation: int, window: int | None = None) -> Mask:
    """Keys at distances divisible by `dilation`, at most `window` of them on each side (None: no limit)."""
    return _Dilated(dilation, window)


def prefix(lengths: int | Tensor) -> Mask:
    """The first `lengths` keys, for everybody: `prefix(n) | causal` is a prefix language model. An int, or (B,) integers."""
    return _Prefix(lengths)


def padding(lengths: Tensor | None = None, *, start: Tensor | None = None) -> Mask:
    """Real keys only: `start[b] <= kv < lengths[b]`, each (B,) integers; `lengths` for right padding, `start` for left padding."""
    return _Padding(lengths, start)


def document(ids: Tensor) -> Mask:
    """Packed sequences: a query sees keys with its own document number. `ids` (N,) or (B, N) by absolute position."""
    return _Document(ids)


def block(size: int) -> Mask:
    """Block-diagonal: a query sees its own block of `size` positions."""
    return _Block(size)


def dense(tensor: Tensor, *, q_offset: int | None = None) -> Mask:
    """A mask from a bool tensor, (N, M) or (B|1, H|1, N|1, M). Row r is the query at position `r + q_offset` (default M - N)."""
    return _Dense(tensor, q_offset)


def per_head(masks: list[Mask]) -> Mask:
    """A mask of its own for each query head, in order."""
    return _PerHead([as_mask(mask) for mask in masks])


def head_sharded(
    num_heads: int,
    block_size: int = 64,
    local_blocks: int | tuple[int, int] = 16,
    stride: int = 8,
    *,
    dense_heads: int = 0,
    homogeneous: bool = False,
    group: int = 1,
    step: int | None = None,
    offset: int = 0,
    causal: bool = True,
    position: str | None = None,
) -> Mask:
    """S2-Attention's heterogeneous context sharding: local blocks plus every `stride`-th block, shifted by head.

    Block (i, j) of kv head h is kept iff j <= i and (i - j < local_blocks or (j + h * step + offset) % stride == 0); inside the
    diagonal block the token-level causal mask applies. Together the heads cover everything when num_heads >= stride. Blocks are
    counted from position 0, so decoding with a cache sees what prefill sees, and a strided column serves all later rows.

    Args:
        num_heads: kv heads. With GQA give `group` = query heads per kv head: the group shares its kv head's pattern.
        block_size: tokens a block. local_blocks: blocks of the local band on the left, own block included (with `causal=False`
            also on the right, or a pair (left, right)).
        stride: blocks between kept columns; 1 is dense.
        dense_heads: the LAST this many kv heads are dense (causal).
        homogeneous: every head uses head 0's columns (the paper's ablation).
        step: shift between neighbouring kv heads. None: max(1, stride // query heads), as released.
        offset: shifts the columns of all heads: head h of a tensor-parallel shard beginning at kv head f has offset f * step.
        causal: False for the bidirectional form.
        position: where strided blocks are counted: "absolute" (from the start; default when causal: few columns have to stay in a
            cache) or "relative" (from the edge of the local band, on both sides; default otherwise, the same for all heads).

    Source: Lin et al. 2024 (arXiv 2407.17678); pattern as in linxihui/dkernel.
    """
    return _HeadSharded(
        num_heads, block_size, local_blocks, stride, dense_heads, homogeneous, group, step, offset, causal, position
    )


def shifted(mask: Mask, start: Tensor) -> Mask:
    """`mask` with positions counted from `start[b]` in batch row b, (B,) integers: what left padding needs. Combine with `padding`."""
    return _Shifted(as_mask(mask), start)


def from_function(mask_mod: Callable[..., Tensor], *, varies_batch: bool = True, varies_head: bool = True) -> Mask:
    """Any `mask_mod(b, h, q_idx, kv_idx) -> bool tensor`. Correct everywhere, but backends must evaluate it to find empty blocks.

    Say `varies_batch=False` / `varies_head=False` when the answer does not depend on b / h: it is then evaluated once for all.
    """
    if not callable(mask_mod):
        raise bad_type("mask_mod", mask_mod, "a callable (b, h, q_idx, kv_idx) -> bool tensor")
    return _Function(mask_mod, varies_batch, varies_head)


def as_mask(mask: Any) -> Mask:
    """A `Mask` from a `Mask`, a bool tensor, or a `mask_mod` callable."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return dense(mask)
    if callable(mask):
        return from_function(mask)
    raise bad_type("mask", mask, "a regard.masks.Mask, a bool tensor, or a callable mask_mod")
