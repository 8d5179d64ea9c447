"""`ChoosingMethod`: base of the methods that choose keys by content, a `regard.ops.select.Choice` for each attention call.

Such a method must not let padding into its choice: blocks would begin elsewhere, and averages would contain it. So rows of a
batch are handed to it without their left padding, rows with equal padding together; what it chooses then is what it would choose
for the sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops import masks
from ...ops.masks import Mask
from ...ops.select.choice import Choice
from ...ops.select.membership import InSelection
from ...ops.selection import Selection
from ..call import AttentionCall, Method
from .memory import memory_of


@dataclass
class Stretch:
    """Rows of a call's batch that have the same left padding, without it.

    Attributes:
        call: the whole call. rows: numbers of the batch rows, int64 (b,), or None for all of them.
        start: padding cut off the keys; position p here is key `start + p` of the call.
        cut: padding rows cut off the queries.
        q: (b, H, n, D). k: (b, Hkv, m, D): keys that exist. q_offset: position of query row 0, m - n.
        memory: storage of this layer and these rows that lasts as long as the call's cache.
    """

    call: AttentionCall
    rows: Tensor | None
    start: int
    cut: int
    q: Tensor
    k: Tensor
    memory: dict[str, Any]

    @property
    def q_offset(self) -> int:
        return self.k.shape[2] - self.q.shape[2]


@dataclass
class ChoosingMethod(Method):
    """A method that says, by `choose`, which keys a call looks at. It claims the seams mask, score, select and attend."""

    honours_edits: ClassVar[bool] = True

    @classmethod
    def seams(cls) -> tuple[str, ...]:
        own = super().seams()
        return (
            "mask",
            "score",
            "select",
            "attend",
            *(s for s in own if s not in ("mask", "score", "select", "attend")),
        )

    def choose(self, stretch: Stretch) -> Choice | None:
        """What the stretch looks at, in its own positions; None: everything that the model allows."""
        raise TypeError(f"{type(self).__name__} does not define choose()")

    def attend(self, call: AttentionCall) -> Tensor | None:
        stretches = list(stretches_of(call, type(self).__name__))
        choices = [self.choose(stretch) for stretch in stretches]
        if all(choice is None for choice in choices):
            return None
        if stretches[0].rows is None:
            choice = choices[0]
            assert choice is not None
            call.selection, call.extra_mask, call.score_mod = (
                _for_keys(choice.selection, call.kv_len),
                choice.mask,
                choice.score_mod,
            )
            return None
        # For whoever asks for the weights, and for edits of weights: the same in the call's own positions, as a mask.
        together = _Together(call, stretches, choices)
        call.extra_mask = together
        if any(choice is not None and choice.score_mod is not None for choice in choices):
            call.score_mod = together.score_mod
        if call.weight_edits:
            return None
        out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]))
        for stretch, choice in zip(stretches, choices):
            out[stretch.rows, :, stretch.cut :] = _part(stretch, choice).attention()
        return out


def stretches_of(call: AttentionCall, name: str) -> Iterator[Stretch]:
    """Rows of the batch that have equal left padding, without it; rows of nothing but padding are left out."""
    end = call.q_offset + call.q_len  # keys from here on are the unfilled part of a static cache
    starts = [0] * call.batch if call.mask is None else call.start.tolist()
    memory = _memory(call, name)
    if not any(starts):
        yield Stretch(call, None, 0, 0, call.q, call.k[:, :, :end], memory.setdefault(None, {}))
        return
    for start in sorted(set(starts)):
        rows = torch.tensor([row for row, other in enumerate(starts) if other == start], device=call.q.device)
        cut = min(max(0, start - call.q_offset), call.q_len)
        if cut < call.q_len:
            q, k = call.q[rows, :, cut:], call.k[rows, :, start:end]
            yield Stretch(call, rows, start, cut, q, k, memory.setdefault((start, len(rows)), {}))


def _memory(call: AttentionCall, name: str) -> dict[Any, dict[str, Any]]:
    if call.cache is None:
        return {}
    kept = memory_of(call.cache)
    if (
        call.phase != "decode"
    ):  # a prompt, or more of it: what was remembered belongs to an earlier sequence or is out of date
        kept.pop(name, None)
    return kept.setdefault(name, {})


def _for_keys(selection: Selection, kv_len: int) -> Selection:
    """The same selection for a longer row of keys."""
    if selection.kv_len == kv_len:
        return selection
    return Selection(
        selection.indices, block_q=selection.block_q, block_k=selection.block_k, q_len=selection.q_len, kv_len=kv_len
    )


def _part(stretch: Stretch, choice: Choice | None) -> AttentionCall:
    """The call of a stretch alone, with the model's own mask and biases for it."""
    call, rows = stretch.call, stretch.rows
    end = stretch.start + stretch.k.shape[2]

    def cut(x: Tensor) -> Tensor:
        x = x[rows] if x.shape[0] > 1 else x
        x = x[:, :, stretch.cut :] if x.shape[2] > 1 else x
        return x[..., stretch.start : end] if x.shape[3] > 1 else x

    own = None if call.mask is None else cut(call.mask)
    n, m = stretch.q.shape[2], stretch.k.shape[2]
    is_causal = own is not None and is_plain_causal(own, n, m)
    return replace(
        call,
        q=stretch.q,
        k=stretch.k,
        v=call.v[rows, :, stretch.start : end],
        mask=None if is_causal else own,
        causal=is_causal,
        cache=None,
        biases=[cut(bias) for bias in call.biases],
        selection=None if choice is None else choice.selection,
        extra_mask=None if choice is None else choice.mask,
        score_mod=None if choice is None else choice.score_mod,
        weight_edits=[],
        output_edits=[],
    )


def is_plain_causal(mask: Tensor, n: int, m: int) -> bool:
    """Whether a bool mask (B|1, H|1, n, m) is the plain causal one: fast kernels can then do without it."""
    wanted = masks.causal.materialize(n, m, device=mask.device)
    return mask.shape[2:] == wanted.shape[2:] and bool((mask == wanted).all())


def plainly_causal(mask: Tensor, stretches: list[Stretch]) -> bool:
    """Whether the model's mask is the plain causal one in every stretch: nothing but left padding and the future is hidden.

    Compared entry by entry, once for the layers of a forward that share the mask.
    """
    found = getattr(mask, "plainly_causal", None)
    if found is None:
        found = all(_sees_its_past(mask, stretch) for stretch in stretches)
        mask.plainly_causal = found  # type: ignore[attr-defined]
    return found


def _sees_its_past(mask: Tensor, stretch: Stretch) -> bool:
    rows = mask if stretch.rows is None or mask.shape[0] == 1 else mask[stretch.rows]
    end = stretch.start + stretch.k.shape[2]
    own = rows.expand(-1, -1, stretch.call.q_len, -1)[:, :, stretch.cut :, stretch.start : end]
    return is_plain_causal(own, stretch.q.shape[2], stretch.k.shape[2])


class _Together(Mask):
    """The choices of all stretches as one mask over the whole call."""

    varies_batch = varies_head = True

    def __init__(self, call: AttentionCall, stretches: list[Stretch], choices: list[Choice | None]) -> None:
        self.places: list[tuple[Tensor, Tensor, int, Choice | None, Mask | None]] = []
        for stretch, choice in zip(stretches, choices):
            assert stretch.rows is not None
            number = torch.full((call.batch,), -1, device=call.q.device)
            number[stretch.rows] = torch.arange(len(stretch.rows), device=call.q.device)
            mask: Mask | None = None
            if choice is not None:
                heads = {"num_heads": call.num_heads, "num_kv_heads": call.num_kv_heads}
                mask = InSelection(choice.selection, **heads, q_offset=stretch.q_offset)
                mask = mask if choice.mask is None else mask & choice.mask
            self.places.append((number >= 0, number.clamp(min=0), stretch.start, choice, mask))

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        out = (q_idx == q_idx) & (kv_idx == kv_idx)
        for mine, number, start, _, mask in self.places:
            if mask is not None:
                kept = mask.keep(number.to(b.device)[b], h, q_idx - start, kv_idx - start)
                out = out & (kept | ~mine.to(b.device)[b])
        return out

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mine, number, start, choice, _ in self.places:
            if choice is not None and choice.score_mod is not None:
                local = number.to(b.device)[b]
                bent = choice.score_mod(score, local, h, q_idx - start, (kv_idx - start).clamp(min=0))
                score = torch.where(mine.to(b.device)[b], bent, score)
        return score
