"""`EvictingLayer`: the cache layer under eviction by score (`policy.py`), over paged storage.

Chunks of a prompt and candidates of assisted decoding are attended exactly, as two parts merged by their log-sum-exps. What a call of
a few tokens would evict, and what its queries add to the scores, waits until the next call, so that a crop takes all of it back. After
a longer call memory comes first: it evicts at once, and of a crop of its last tokens (assisted decoding reads the prompt together with
the first candidates) only the votes of those remain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import bad_value
from ...ops import masks, merge_lse, scores
from ...ops.reference import accumulation_dtype
from ...ops.statistics import attention_column_sums
from ..call import AttentionCall
from .layer import AttendingLayer, attention_over
from .paged import PagedStore, Pages
from .policy import EvictingMethod, Limits, Look

_CANDIDATES = 64  # a call of at most so many tokens may be candidates of assisted decoding: nothing is evicted by them until the next


class _Late(NamedTuple):
    """Queries of a call whose attention is yet to be counted: they may still be taken back."""

    q: Tensor
    lse: Tensor
    first: int
    scale: float
    soft_cap: float | None


class EvictingLayer(AttendingLayer):
    """A cache layer that keeps, of each sequence, the entries with the highest scores of a policy.

    A decoded token joins first and is evicted for at the next step, so that a call reads `budget + 1` entries, as in the papers' code.

    Args:
        policy: the `EvictingMethod`. rotary: `find_rotary(model)`, to let keys be seen at the positions that they have IN THE CACHE
            (no distance is then greater than the cache is long); None: entries keep their positions.
    """

    def __init__(self, policy: EvictingMethod, rotary: Any = None) -> None:
        self.policy, self.rotary = policy, rotary
        super().__init__()

    def clear(self) -> None:
        self.store = PagedStore()
        self.limits: Limits | None = None
        self.evicted_at = 0  # tokens seen when something was last evicted: the past before that cannot be had again
        self.late: _Late | None = None

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        batch = self.store.batch
        old = self.store.map_rows(fn)
        if self.late is not None:
            self.late = self.late._replace(q=fn(self.late.q), lse=fn(self.late.lse))
        if self.limits is not None:
            even = bool(
                (self.limits.total == self.limits.total[0]).all()
                and (self.limits.recent == self.limits.recent[0]).all()
            )
            if old is None:
                old = [0] * self.store.batch if even else fn(torch.arange(batch, device=self.device)).tolist()
            self.limits = self.limits.rows(old)

    def drop_last(self, count: int) -> None:
        end = self.seen - count
        if self.evicted_at > end:
            raise bad_value(
                "crop", -count, f"at most {self.seen - self.evicted_at} tokens: earlier ones have led to evictions"
            )
        if end == 0:
            self.clear()
            return
        self.store.drop_from(end)
        if self.late is not None:
            left = max(0, end - self.late.first)
            late = self.late._replace(q=self.late.q[:, :, :left], lse=self.late.lse[:, :, :left])
            self.late = late if left else None

    # The attention over it

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        if before == 0:
            return self._prompt(call, keys, values)
        self._count_late()
        return (self._step if keys.shape[2] == 1 and before >= self.latest_start else self._chunk)(
            call, keys, values, before
        )

    def _prompt(self, call: AttentionCall, keys: Tensor, values: Tensor) -> Tensor:
        out = attention_over(call, call.q, keys, values, call.mask if call.mask is not None else masks.causal)
        tokens = keys.shape[2] - self.starts().clamp(max=keys.shape[2])
        self.limits = self.policy.limits(tokens)
        self.fill(call, keys, values, tokens)
        return out

    def fill(self, call: AttentionCall, keys: Tensor, values: Tensor, tokens: Tensor) -> None:
        """Take in the prompt, of which row i has `tokens[i]` real tokens, as far as the limits allow."""
        length, kv_heads = keys.shape[2], keys.shape[1]
        position = torch.arange(length, device=keys.device, dtype=torch.int32).expand(*keys.shape[:3])
        score = _zeros(keys)

        def sums(last: int | None, group: str) -> Tensor:
            return prompt_sums(call, keys, last, group)

        assert self.limits is not None
        over = tokens > self.limits.total
        if self.policy.reads or bool(over.any()):
            score = self.policy.rescore(Look(keys, position, length, sums), score)
        count = torch.minimum(tokens, self.limits.total)
        rows = {"k": keys, "v": values, "position": position, "score": score}
        if bool(over.any()):
            index = self._best(score, position, self.limits, count, self.starts())
            self.evicted_after(length)
        else:
            index = self.starts().to(keys.device)[:, None, None] + torch.arange(int(count.max()), device=keys.device)
            index = index.expand(-1, kv_heads, -1).clamp(max=length - 1)
        self.store.fill(rows, index, count[:, None].expand(-1, kv_heads))

    def _step(self, call: AttentionCall, keys: Tensor, values: Tensor, before: int) -> Tensor:
        """One decoded token."""
        victims = self.make_room(before, replace=True)
        self.store.append(self._rows(keys, values, before), victims)
        seen_keys = self._seen_keys(before)
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        options: dict[str, Any] = {"keys": seen_keys, "backend": call.backend, "weights": self.policy.reads}
        out, _, weights = self.store.attend(call.q, scale, call.soft_cap, **options)
        for part, weight in zip(self.store.parts, weights):
            self._rescore(part, 1, partial(_one_row, weight[:, :, 0]))
        if not self.policy.reads:
            for part in self.store.parts:
                self._rescore(part, 1, _unread)
        return out

    def _chunk(self, call: AttentionCall, keys: Tensor, values: Tensor, before: int) -> Tensor:
        """More of a prompt, or candidates to verify: exact attention over what is stored and, causally, the new tokens."""
        self.make_room(before)
        new = keys.shape[2]
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        seen_keys = self._seen_keys(before)
        stored, lse, _ = self.store.attend(call.q, scale, call.soft_cap, keys=seen_keys, backend=call.backend, lse=True)
        fresh, fresh_lse = attention_over(
            call, call.q, keys, values, new_mask(self, call, new, before), return_lse=True
        )
        out, lse = merge_lse([stored, fresh], [lse, fresh_lse])
        self.store.append(self._rows(keys, values, before), skip=(self.starts() - before).clamp(min=0))
        self.late = _Late(call.q, lse, before, scale, call.soft_cap)
        if new > _CANDIDATES:
            self._count_late()
            self.limits = self.policy.limits(self.seen - self.starts())
            self.make_room(self.seen)
            self.evicted_after(new)
        return out

    def _rows(self, keys: Tensor, values: Tensor, before: int) -> dict[str, Tensor]:
        position = torch.arange(before, before + keys.shape[2], device=keys.device, dtype=torch.int32).expand(
            *keys.shape[:3]
        )
        return {"k": keys, "v": values, "position": position, "score": _zeros(keys)}

    # Scores and evictions

    def _rescore(self, part: Pages, q_len: int, sums: Callable[[int | None, str], Tensor]) -> None:
        old = part["score"]
        old.copy_(self.policy.rescore(Look(part["k"], part["position"], q_len, sums), old))

    def _count_late(self) -> None:
        """Let the queries of the last call of several tokens count. Until now they could be taken back."""
        if self.late is None:
            return
        (q, lse, first, scale, soft_cap), self.late = self.late, None
        if not self.policy.reads:
            return
        heads = self.store.heads
        seen_keys = self._seen_keys(first)
        score_mod = None if soft_cap is None else scores.soft_cap(soft_cap)
        for part in self.store.parts:
            rows = self.store.pick(q.unflatten(1, (heads, -1)), part)
            tops = self.store.pick(lse.unflatten(1, (heads, -1)), part)
            position, valid = part["position"], part.valid()
            exists = position >= 0 if valid is None else valid
            sees = masks.from_function(lambda b, h, i, j, p=position, e=exists: (p[b, j] <= i) & e[b, j])
            keys = (part["k"] if seen_keys is None else seen_keys(part))[:, None]
            options: dict[str, Any] = {
                "mask": sees,
                "score_mod": score_mod,
                "scale": scale,
                "q_offset": first,
                "lse": tops,
            }
            self._rescore(part, q.shape[2], partial(_rows_summed, rows, keys, options))

    def evicted_after(self, tokens: int) -> None:
        """Note that something was evicted at the end of a call of so many tokens. The last of them may have been candidates, and can
        still be taken back: what left stays away, and their votes have counted among those of all the others."""
        self.evicted_at = self.seen - min(tokens, _CANDIDATES)

    def make_room(self, before: int, replace: bool = False) -> list[tuple[Tensor, Tensor] | None]:
        """Bring every sequence down to its limit. With `replace`, one too many is only named: a slot for the new token."""
        assert self.limits is not None
        victims: list[tuple[Tensor, Tensor] | None] = []
        chosen: list[tuple[Tensor, Tensor] | None] = []
        for part in self.store.parts:
            row = part.members // self.store.heads
            over = (part.length - self.limits.total[row]).clamp(min=0)
            most = int(over.max())
            victims.append(None)
            chosen.append(None)
            if most == 0:
                continue
            self.evicted_at = before
            limits = self.limits.rows(row.tolist())
            starts = self.starts()[row]
            if most == 1 and replace:
                victims[-1] = (self._guarded(part, limits, starts, before, torch.inf).argmin(-1), over > 0)
            else:
                count = part.length - over
                chosen[-1] = (_first_in_order(self._guarded(part, limits, starts, before, -torch.inf), count), count)
        if any(choice is not None for choice in chosen):
            self.store.keep(chosen)
        return victims

    def _guarded(self, part: Pages, limits: Limits, starts: Tensor, before: int, absent: float) -> Tensor:
        """Scores (G, L) with what must stay at +inf, and slots that hold nothing at `absent`."""
        score = _protect(part["score"], part["position"], limits, starts, before)
        valid = part.valid()
        return score if valid is None else score.masked_fill(~valid, absent)

    def _best(self, score: Tensor, position: Tensor, limits: Limits, count: Tensor, starts: Tensor) -> Tensor:
        """Indices (B, H, K) of the prompt's tokens that stay, in order."""
        score = _protect(score, position, limits, starts, position.shape[-1])
        padding = position < starts.to(position.device)[:, None, None]
        return _first_in_order(score.masked_fill(padding, -torch.inf), count[:, None].expand(*score.shape[:2]))

    # Positions

    def _seen_keys(self, before: int) -> Callable[[Pages], Tensor] | None:
        """Keys moved to the positions that they have in the cache, where the method asks for that: of the L entries older than
        `before`, number r is seen as if r were its position and L that of token `before`."""
        if self.rotary is None:
            return None

        def keys(part: Pages) -> Tensor:
            position, valid = part["position"].long(), part.valid()
            ordered = position if valid is None else position.masked_fill(~valid, 1 << 40)
            rank = ordered.argsort(-1).argsort(-1)
            shift = before - (ordered < before).sum(-1, keepdim=True)
            by = (shift - (position - rank)).clamp(min=0)
            return self.rotary(part["k"][:, None], by)[:, 0] if bool(by.any()) else part["k"]

        return keys


def _zeros(keys: Tensor) -> Tensor:
    """Scores of new entries, (B, Hkv, n)."""
    return keys.new_zeros(keys.shape[:3], dtype=accumulation_dtype(keys.dtype))


def new_mask(layer: AttendingLayer, call: AttentionCall, new: int, before: int) -> Any:
    """The mask among the last `new` tokens themselves, of which `before` came before."""
    if call.mask is not None and getattr(call.mask, "structure", None) is None:
        return call.mask[..., -new:]
    if before >= layer.latest_start:
        return masks.causal
    assert layer.start is not None
    start = (layer.start - before).clamp(0, new)
    return masks.causal & masks.padding(torch.full_like(layer.start, new), start=start)


def prompt_sums(call: AttentionCall, keys: Tensor, last: int | None, group: str) -> Tensor:
    """Column sums (B, Hkv, N) of the attention of a prompt, whose keys are `keys`."""
    mask: Any = call.mask
    if mask is not None:
        mask = getattr(mask, "structure", None) or mask
    elif call.q_len > 1:
        mask = masks.causal
    score_mod = None if call.soft_cap is None else scores.soft_cap(call.soft_cap)
    return attention_column_sums(call.q, keys, mask=mask, score_mod=score_mod, scale=call.scale, last=last, group=group)


def _one_row(weights: Tensor, last: int | None, group: str) -> Tensor:
    """The `sums` of a `Look` with one query: its weights (G, g, L) over the query heads."""
    return weights.amax(1) if group == "max" else weights.mean(1) if group == "mean" else weights.sum(1)


def _rows_summed(q: Tensor, keys: Tensor, options: dict[str, Any], last: int | None, group: str) -> Tensor:
    """The `sums` of a `Look` with several: q (G, g, n, D), keys (G, 1, L, D)."""
    return attention_column_sums(q, keys, last=last, group=group, **options)[:, 0]


def _unread(last: int | None, group: str) -> Tensor:
    raise RuntimeError("this policy says that it reads no attention (reads = False), and asked for it")


def _protect(score: Tensor, position: Tensor, limits: Limits, starts: Tensor, seen: int) -> Tensor:
    """Scores with the first `sink` and the last `recent` tokens at +inf, by leading dimension of (B or G, ..., L)."""
    shape = (-1,) + (1,) * (score.dim() - 1)
    sink = limits.total.clamp(max=limits.sink)
    recent = torch.minimum(limits.recent, limits.total - sink)
    device = score.device
    first_kept = (starts + sink).view(shape).to(device)
    last_kept = (seen - recent).view(shape).to(device)
    return score.masked_fill((position < first_kept) | (position >= last_kept), torch.inf)


def _first_in_order(score: Tensor, count: Tensor) -> Tensor:
    """Indices (..., K) of the `count` (...) highest along the last axis, ascending; K is the greatest count, the rest is filler."""
    most = max(1, int(count.max()))
    index = score.sort(dim=-1, descending=True, stable=True).indices[
        ..., :most
    ]  # ties: the earlier one, however rows are padded
    beyond = torch.arange(index.shape[-1], device=index.device) >= count.to(index.device)[..., None]
    return index.masked_fill(beyond, 1 << 40).sort(-1).values.clamp(max=score.shape[-1] - 1)
