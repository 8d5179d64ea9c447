"""The kinds of masks: by position, by what the tokens are, by head. Made through the functions in `masks.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from .._shapes import broadcast_shape
from .mask_base import Mask, inherit
from .range_extremes import range_extremes, range_table


class Everything(Mask):
    frozen = relative = True

    def keep(self, b, h, q_idx, kv_idx):
        return torch.ones(broadcast_shape(q_idx.shape, kv_idx.shape), dtype=torch.bool, device=q_idx.device)

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        every = self.keep(b, h, q_lo, kv_lo)
        return every, every

    def __repr__(self) -> str:
        return "everything"


class Causal(Mask):
    frozen = relative = True

    def keep(self, b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        return q_hi >= kv_lo, q_lo >= kv_hi

    def __repr__(self) -> str:
        return "causal"


class SlidingWindow(Mask):
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


class Sink(Mask):
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


class Dilated(Mask):
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
            some = torch.ones(broadcast_shape(q_lo.shape, kv_lo.shape), dtype=torch.bool, device=q_lo.device)
            every = some
        else:
            some, every = SlidingWindow(self.window * self.dilation).bounds(b, h, q_lo, q_hi, kv_lo, kv_hi)
        return some, every if self.dilation == 1 else torch.zeros_like(every)

    def __repr__(self) -> str:
        return f"dilated({self.dilation}, window={self.window})"


class Prefix(Mask):
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


class Padding(Mask):
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


class Document(Mask):
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
        ranges = range_table(self.ids).to(q_lo.device)  # made anew each time: `ids` may have changed
        row = b if self.varies_batch else torch.zeros_like(b)
        q_min, q_max = range_extremes(ranges, row, q_lo, q_hi)
        kv_min, kv_max = range_extremes(ranges, row, kv_lo, kv_hi)
        some = (q_min <= kv_max) & (kv_min <= q_max)
        return some, (q_min == q_max) & (kv_min == kv_max) & (q_min == kv_min)

    def __repr__(self) -> str:
        return f"document({tuple(self.ids.shape)})"


class Block(Mask):
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


class PerHead(Mask):
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
        inherit(self, *self.unique)
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


class HeadSharded(Mask):
    frozen = True

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
        dense = (head >= self.num_heads - self.dense_heads) & (self.dense_heads > 0)
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


class Shifted(Mask):
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
