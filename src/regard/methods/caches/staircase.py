"""SAQ, staircase adaptive quantisation: the older a token of the cache, the fewer bits it is kept in.

Part of "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI", 2024, arXiv 2410.18441, a
position paper without code and without numbers; the steps are our choice (128 tokens each at 16, 8 and 4 bits, the rest at 2). As in
KIVI (arXiv 2402.02750), on which it stands, keys are quantised per channel over groups of tokens, values per token over groups of
channels, with the least entry as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require, require_int
from ...ops import masks, merge_lse
from ...ops.packed import Packed, cat_packed, quantise
from ...ops.reference import accumulation_dtype
from ..call import AttentionCall, Method
from .decoder import ragged_layers
from .evicting import new_mask
from .layer import AttendingLayer, attention_over

_CANDIDATES = (
    64  # as in the evicting cache: a call of so few tokens moves nothing until the next, so that it can be cropped
)
_BLOCK = 4096  # tokens unpacked at once while decoding

Steps = tuple[tuple[int | None, int], ...]


@dataclass
class StaircaseQuantCache(Method):
    """Keys and values in fewer bits with every step of age, packed for real, so that the bytes of the cache shrink.

    Attributes:
        steps: (tokens, bits) from the youngest to the oldest; bits 16 (meaning: unquantised), 8, 4 or 2, never rising; tokens a multiple
            of `group`, None for the last step, which takes all older ones.
        group: tokens that change bits together and share a scale in each channel of the keys; values share one in `group` channels
            (all of them, if `group` does not divide their number).

    A group that crosses a step is quantised anew from what is stored of it; a long prompt goes at once to the bits that it is to
    have. A step holds up to group - 1 tokens more than it says, and the youngest tokens stay unquantised until a group is full. Prompts
    are attended unquantised. Rows are grouped from their own first token, whatever the padding. `ValueError` on steps that do not
    make a staircase.
    """

    steps: Sequence[tuple[int | None, int]] = ((128, 16), (128, 8), (128, 4), (None, 2))
    group: int = 32

    def __post_init__(self) -> None:
        require_int("group", self.group, 1)
        try:
            self.steps = tuple((tokens, bits) for tokens, bits in self.steps)
        except (TypeError, ValueError):
            raise bad_type("steps", self.steps, "pairs (tokens, bits)") from None
        require(bool(self.steps) and self.steps[-1][0] is None, "steps", self.steps, "a last step of (None, bits)")
        for tokens, _ in self.steps[:-1]:
            good = isinstance(tokens, int) and tokens >= self.group and tokens % self.group == 0
            require(good, "steps", tokens, f"a multiple of group = {self.group} tokens before the last step")
        widths = [bits for _, bits in self.steps]
        require(all(bits in (2, 4, 8, 16) for bits in widths), "steps", widths, "bits of 16, 8, 4 or 2")
        require(widths == sorted(widths, reverse=True), "steps", widths, "bits that never rise with age")

    def check(self, model: nn.Module) -> None:
        self.cache(model)  # says why, where it cannot

    def cache(self, model: nn.Module) -> Any:
        return ragged_layers(model, lambda _: StaircaseLayer(self), type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        return call.cache.attend(call) if isinstance(call.cache, StaircaseLayer) else None


@dataclass
class Stair:
    """Rows of a batch with the same padding: the youngest tokens as they came, and the quantised steps, youngest first.

    Attributes:
        rows: numbers of the batch rows, int64 on the CPU. k, v: (b, H, n, D), unquantised.
        packed: keys and values of each quantised step, oldest token first.
    """

    rows: Tensor
    k: Tensor
    v: Tensor
    packed: list[tuple[Packed, Packed] | None] = field(default_factory=list)

    def add(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)

    def settle(self, steps: Steps, group: int) -> None:
        """Let every step hand its oldest groups on that it has no more room for."""
        quantised = [step for step in steps if step[1] < 16]
        if not quantised:
            return
        if any(tokens is None for tokens, bits in steps if bits == 16):
            return
        room = sum(tokens or 0 for tokens, bits in steps if bits == 16)
        surplus = (self.k.shape[2] - room) // group * group
        if surplus <= 0:
            return
        k, v = self.k[:, :, :surplus], self.v[:, :, :surplus]
        self.k, self.v = self.k[:, :, surplus:].clone(), self.v[:, :, surplus:].clone()
        self.packed = self.packed or [None] * len(quantised)
        channels = group if v.shape[-1] % group == 0 else v.shape[-1]
        for number, (tokens, bits) in enumerate(quantised):
            held = whole = self.packed[number]
            fresh_rows = k.shape[2]
            keep = held[0].rows + fresh_rows if held else fresh_rows
            extra = 0 if tokens is None else max(0, keep - tokens) // group * group
            passing = max(0, extra - (held[0].rows if held else 0))  # of the fresh ones, straight on to the next step
            older = k[:, :, :passing], v[:, :, :passing]
            if passing < fresh_rows:
                new_k = quantise(k[:, :, passing:], bits, group, "tokens")
                new_v = quantise(v[:, :, passing:], bits, channels, "channels")
                whole = (new_k, new_v) if held is None else (cat_packed(held[0], new_k), cat_packed(held[1], new_v))
            leaving = extra - passing
            if leaving:
                assert whole is not None
                gone = whole[0][:leaving].dequantise(), whole[1][:leaving].dequantise()
                whole = whole[0][leaving:].map(torch.clone), whole[1][leaving:].map(torch.clone)
                older = torch.cat([gone[0], older[0]], 2), torch.cat([gone[1], older[1]], 2)
            self.packed[number] = whole
            k, v = older
            if k.shape[2] == 0:
                break

    def pieces(self, block: int) -> list[tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
        """Functions that give the keys and the values of every stretch of at most about `block` tokens, oldest first."""
        found: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = []
        for held in reversed(self.packed):
            if held is None:
                continue
            block = max(held[0].group, block // held[0].group * held[0].group)
            for begin in range(0, held[0].rows, block):
                cut = slice(begin, begin + block)
                found.append((held[0][cut].dequantise, held[1][cut].dequantise))
        found.append((lambda: self.k, lambda: self.v))
        return found

    def select(self, rows: Tensor, index: Tensor) -> Stair:
        def pick(t: Tensor) -> Tensor:
            return t.to(index.device).index_select(0, index)

        packed = [None if held is None else (held[0].map(pick), held[1].map(pick)) for held in self.packed]
        return Stair(rows, pick(self.k), pick(self.v), packed)


class StaircaseLayer(AttendingLayer):
    """The cache layer of `StaircaseQuantCache`."""

    def __init__(self, method: StaircaseQuantCache) -> None:
        self.method = method
        super().__init__()

    def clear(self) -> None:
        self.stairs: list[Stair] = []

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        assert self.start is not None
        source = fn(torch.arange(self.start.shape[0], device=self.start.device))
        old, stairs = source.cpu(), []
        for stair in self.stairs:
            place = {row: i for i, row in enumerate(stair.rows.tolist())}
            new = [i for i, row in enumerate(old.tolist()) if row in place]
            if new:
                index = torch.tensor([place[int(old[i])] for i in new], device=source.device)
                stairs.append(stair.select(torch.tensor(new), index))
        self.stairs = stairs

    def drop_last(self, count: int) -> None:
        if count == self.seen:
            self.clear()
            return
        least = min(stair.k.shape[2] for stair in self.stairs)
        if count > least:
            raise bad_value("crop", -count, f"at most {least} tokens: older ones are quantised")
        for stair in self.stairs:
            stair.k, stair.v = stair.k[:, :, : stair.k.shape[2] - count], stair.v[:, :, : stair.v.shape[2] - count]

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        new = keys.shape[2]
        steps, group = tuple(self.method.steps), self.method.group
        if before == 0:
            out = attention_over(call, call.q, keys, values, call.mask if call.mask is not None else masks.causal)
            self.begin(call, keys, values)
        else:
            for stair in self.stairs:
                stair.settle(steps, group)
            decoding = new == 1 and before >= self.latest_start
            out = (self._step if decoding else self._chunk)(call, keys, values, before)
        if before == 0 or new > _CANDIDATES:
            for stair in self.stairs:
                stair.settle(steps, group)
        return out

    def begin(self, call: AttentionCall, keys: Tensor, values: Tensor) -> None:
        """Take in a prompt."""
        starts = self.starts().clamp(max=keys.shape[2])
        self.stairs = []
        for start in starts.unique().tolist():
            rows = (starts == start).nonzero()[:, 0]
            at = rows.to(keys.device)
            self.stairs.append(Stair(rows, keys[at, :, start:], values[at, :, start:]))

    def _step(self, call: AttentionCall, keys: Tensor, values: Tensor, before: int) -> Tensor:
        out = call.q.new_empty((*call.q.shape[:3], values.shape[3]))
        dtype = accumulation_dtype(call.q.dtype)
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        for stair in self.stairs:
            at = stair.rows.to(keys.device)
            stair.add(keys[at], values[at])
            q = (call.q[at].to(dtype) * scale).unflatten(1, (keys.shape[1], -1))[:, :, :, 0]
            pieces = stair.pieces(_BLOCK)
            scores = torch.cat([q @ k().to(dtype).transpose(-1, -2) for k, _ in pieces], -1)
            if call.soft_cap is not None:
                scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
            weights, done, total = torch.softmax(scores, -1), 0, None
            for _, v in pieces:
                values_here = v().to(dtype)
                part = weights[..., done : done + values_here.shape[2]] @ values_here
                total, done = part if total is None else total + part, done + values_here.shape[2]
            assert total is not None
            out[at] = total.flatten(1, 2)[:, :, None].to(out.dtype)
        return out

    def _chunk(self, call: AttentionCall, keys: Tensor, values: Tensor, before: int) -> Tensor:
        """Several tokens: what is stored, unpacked, and among themselves causally, merged."""
        new = keys.shape[2]
        fresh, fresh_lse = attention_over(
            call, call.q, keys, values, new_mask(self, call, new, before), return_lse=True
        )
        stored, lse = torch.zeros_like(fresh), torch.full_like(fresh_lse, -torch.inf)
        for stair in self.stairs:
            at = stair.rows.to(keys.device)
            pieces = stair.pieces(1 << 40)
            k, v = torch.cat([k() for k, _ in pieces], 2), torch.cat([v() for _, v in pieces], 2)
            if k.shape[2]:
                stored[at], lse[at] = attention_over(call, call.q[at], k, v, return_lse=True)
            start = int(self.starts()[stair.rows[0]])
            stair.add(keys[at, :, max(0, start - before) :], values[at, :, max(0, start - before) :])
        return merge_lse([stored, fresh], [lse, fresh_lse])[0]
