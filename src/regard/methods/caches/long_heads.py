"""LongHeads: each head reads its own chunks of a long text, at positions that the model was trained on.

Lu et al. 2024 (EMNLP Findings), arXiv 2402.10685. Numbers from LuLuLuyi/LongHeads (no licence, read only). The choice and the
attention are in `regard.ops.select.chunk_features`; this is the cache that decodes with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ... import ops
from ..._checks import bad_value, require, require_int, require_name, resolve_budget
from ...ops import masks
from ...ops.reference import accumulation_dtype, softmax_with_lse
from ...ops.select.chunk_features import attend_prompt, choose_chunks, chunk_features
from ..call import AttentionCall, Method
from ..rotary import RotaryOf, query_positions
from .decoder import ragged_layers
from .layer import AttendingLayer, attention_over

_FEW = 32  # a call of fewer tokens, after the prompt, is decoded token by token (candidates of assisted decoding)


@dataclass
class LongHeads(Method):
    """A query attends to at most `budget` tokens: the first chunk, the last ones, and those whose feature its head likes best.

    Keys and queries get new positions, as if the chosen chunks stood side by side, so that no position beyond `budget` occurs: a model
    reads texts longer than it was trained for. Nothing is trained, nothing is evicted. Texts up to `start` tokens are attended as usual.

    Attributes:
        chunk: tokens of a chunk. budget: tokens attended to, at least three chunks; int, or a share of the prompt (float in (0, 1]).
        start: position from which queries choose; None: the budget.
        variant: "released": tokens of the prompt from `start` on do not see their own key; "paper": they do. Decoded tokens do in both.
        offload: device that keys and values are kept on, of which the chosen chunks are fetched; None: the model's own.

    Needs rotary embeddings of constant frequencies (`UnsupportedModelError`).
    """

    chunk: int = 256
    budget: int | float = 4096
    start: int | None = None
    variant: str = "released"
    offload: str | None = None
    _rotary: WeakKeyDictionary[Any, RotaryOf] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        require_int("chunk", self.chunk, 1)
        require_name("variant", self.variant, ("released", "paper"))
        if self.start is not None:
            require_int("start", self.start, 0)
        resolve_budget("budget", self.budget, 1 << 20)
        if isinstance(self.budget, int):
            require(self.budget >= 3 * self.chunk, "budget", self.budget, f"at least three chunks, {3 * self.chunk}")

    def check(self, model: nn.Module) -> None:
        self.cache(model)  # says why, where it cannot

    def setup(self, session: Any) -> None:
        rotary = self._rotary[session] = RotaryOf(session.entry, type(self).__name__)
        rotary.watch(session)

    def cache(self, model: nn.Module) -> Any:
        rotary = RotaryOf(model, type(self).__name__)
        return ragged_layers(model, lambda _: LongHeadsLayer(self, rotary), type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if isinstance(call.cache, LongHeadsLayer):
            return call.cache.attend(call)
        if call.cache is not None or call.window is not None:
            return None
        layer = LongHeadsLayer(self, self._rotary[call.session])  # scoring without a cache: a prompt and no more
        layer.update(call.k, call.v)
        return layer.attend(call)


class LongHeadsLayer(AttendingLayer):
    """The cache layer of `LongHeads`. Each row's tokens stand at the left, without its padding; keys are turned inside their chunk.

    Attributes:
        lengths: tokens of each row. chunks: how many each row's queries choose. k, v: (B, Hkv, room, D), room a multiple of `chunk`.
        features: (B, Hkv, room / chunk, D), those of complete chunks. asked: (B, H, 2 * chunk, D), the last queries, turned inside
            their chunk, token t at slot t % (2 * chunk).
    """

    def __init__(self, method: LongHeads, rotary: RotaryOf) -> None:
        self.method, self.rotary = method, rotary
        super().__init__()

    def clear(self) -> None:
        self.lengths: list[int] = []
        self.chunks: list[int] = []
        self.k: Any = None
        self.v: Any = None
        self.features: Any = None
        self.asked: Any = None

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        rows = fn(torch.arange(len(self.lengths))).tolist()
        self.lengths, self.chunks = [self.lengths[r] for r in rows], [self.chunks[r] for r in rows]
        self.k, self.v = self._away(fn(self.k)), self._away(fn(self.v))
        self.features, self.asked = fn(self.features), fn(self.asked)

    def drop_last(self, count: int) -> None:
        chunk = self.method.chunk
        for length in self.lengths:
            left = max(0, length - count)
            # the queries of the chunk that is begun are wanted again when it is complete
            if left % chunk and length > (left // chunk + 2) * chunk:
                raise bad_value("crop", -count, f"at most about a chunk, {chunk} tokens: the queries before are gone")
        self.lengths = [max(0, length - count) for length in self.lengths]

    def _away(self, x: Tensor) -> Tensor:
        return x if self.method.offload is None else x.to(self.method.offload)

    # The attention

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        assert self.start is not None
        position = query_positions(call)
        q, k = self.rotary.undo(call.q, position), self.rotary.undo(keys, position)
        skip = (self.start - before).clamp(0, keys.shape[2]).tolist()  # padding among the new tokens, row by row
        if before == 0:
            self._begin(call, keys, values, skip)
        if before == 0 or keys.shape[2] >= _FEW:
            old = list(self.lengths)
            self._append(q, k, values, skip, call.scale)
            return self._attend_prompt(call, q, keys, values, old, skip)
        out = call.q.new_zeros((*call.q.shape[:3], values.shape[3]))
        for t in range(keys.shape[2]):
            now = slice(t, t + 1)
            self._append(q[:, :, now], k[:, :, now], values[:, :, now], [int(s > t) for s in skip], call.scale)
            out[:, :, now] = self._attend_last(call, q[:, :, now])
        return out

    def _begin(self, call: AttentionCall, keys: Tensor, values: Tensor, skip: list[int]) -> None:
        batch, heads, length, dim = keys.shape
        chunk = self.method.chunk
        require(
            values.shape[3] == dim, "v", f"head_dim {values.shape[3]}", f"k's, {dim}: LongHeads uses outputs as queries"
        )
        self.lengths = [0] * batch
        self.chunks = [max(3, resolve_budget("budget", self.method.budget, max(1, length - s)) // chunk) for s in skip]
        self.k = self._away(keys.new_zeros(batch, heads, 0, dim))
        self.v = self._away(keys.new_zeros(batch, heads, 0, dim))
        self.features = keys.new_zeros(batch, heads, 0, dim)
        self.asked = call.q.new_zeros(batch, call.q.shape[1], 2 * chunk, dim)

    def _begins(self, row: int) -> int:
        """The position from which the queries of a row choose."""
        return self.chunks[row] * self.method.chunk if self.method.start is None else self.method.start

    def _append(self, q: Tensor, k: Tensor, v: Tensor, skip: list[int], scale: float | None) -> None:
        """Take in new tokens, not turned, of which each row leaves out the first `skip`; features of the chunks they complete."""
        chunk, new = self.method.chunk, k.shape[2]
        self._make_room(max(length + new - s for length, s in zip(self.lengths, skip)) + 1)
        old = list(self.lengths)
        begin = torch.tensor([length - s for length, s in zip(old, skip)], device=k.device)
        slot = begin[:, None] + torch.arange(new, device=k.device)
        local = slot.clamp(min=0) % chunk
        k, q = self.rotary.turn(k, local), self.rotary.turn(q, local)
        for row, s in enumerate(skip):
            at = slice(old[row], old[row] + new - s)
            self.k[row, :, at], self.v[row, :, at] = self._away(k[row, :, s:]), self._away(v[row, :, s:])
            self.lengths[row] = at.stop
            done, whole = old[row] // chunk, at.stop // chunk
            if whole > done:
                since = old[row] % chunk  # tokens of the chunk that were here before
                held = self.asked[row, :, done % 2 * chunk : done % 2 * chunk + since]
                ours = torch.cat([held, q[row, :, s:]], 1)[None, :, : (whole - done) * chunk]
                piece = slice(done * chunk, whole * chunk)
                keys, values = (x[row : row + 1, :, piece].to(q) for x in (self.k, self.v))
                self.features[row, :, done:whole] = chunk_features(ours, keys, values, chunk, scale)[0][0]
            kept = min(new - s, 2 * chunk)
            if kept:
                self.asked[row, :, slot[row, new - kept :] % (2 * chunk)] = q[row, :, new - kept :]

    def _make_room(self, tokens: int) -> None:
        have, chunk = self.k.shape[2], self.method.chunk
        if tokens <= have:
            return
        more = -(-max(tokens, have + have // 8) // chunk) * chunk - have
        self.k, self.v = (nn.functional.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.features = nn.functional.pad(self.features, (0, 0, 0, more // chunk))

    def _attend_prompt(
        self, call: AttentionCall, q: Tensor, keys: Tensor, values: Tensor, old: list[int], skip: list[int]
    ) -> Tensor:
        """A piece of prompt, in store already; `old` tokens were there before it."""
        out = call.q.new_zeros((*call.q.shape[:3], values.shape[3]))
        fresh = self.seen == call.q_len
        if fresh:  # what is before `start` is attended as it came
            usual = min(keys.shape[2], max(self._begins(row) + s for row, s in enumerate(skip)))
            mask = masks.causal if call.mask is None else call.mask[..., :usual, :usual]
            q_cut, k_cut, v_cut = (x[:, :, :usual] for x in (call.q, keys, values))
            out[:, :, :usual] = attention_over(call, q_cut, k_cut, v_cut, mask)
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        score_mod = None if call.soft_cap is None else ops.scores.soft_cap(call.soft_cap)
        for row, length in enumerate(self.lengths):
            begin = self._begins(row) if fresh else old[row]
            if begin >= length:
                continue
            k, v = (x[row, :, :length].to(q) for x in (self.k, self.v))
            include = self.method.variant == "paper"
            out[row, :, q.shape[2] - (length - begin) :] = attend_prompt(
                q[row, :, q.shape[2] - (length - begin) :], k, v, self.features[row, :, : length // self.method.chunk], begin,
                self.method.chunk, self.chunks[row], self._begins(row), include, self.rotary.turn, scale, score_mod,
            )  # fmt: skip
        return out

    def _attend_last(self, call: AttentionCall, q: Tensor) -> Tensor:
        """The last token of every row, q (B, H, 1, D), not turned: complete chunks, and the one that is begun."""
        chunk, device, heads = self.method.chunk, q.device, q.shape[1]
        length = torch.tensor(self.lengths, device=device)
        begins = torch.tensor([self._begins(row) for row in range(len(self.lengths))], device=device)
        many = torch.tensor(self.chunks, device=device) - 1
        whole, tail = length // chunk, length % chunk
        count = torch.where(length < begins, whole, torch.minimum(many, whole))
        chosen = self._chosen(q, whole, count)
        rank = torch.arange(chosen.shape[-1], device=device)
        turn = torch.cat([(count[:, None] - rank) * chunk + tail[:, None] - 1, tail[:, None] - 1], 1).clamp(min=0)
        query = self.rotary.turn(q.expand(-1, -1, turn.shape[1], -1), turn)
        lists = torch.cat([chosen.clamp(min=0), whole[:, None, None].expand(-1, heads, 1)], -1)
        seen = torch.cat([(chosen >= 0) * chunk, tail[:, None, None].expand(-1, heads, 1)], -1)
        keys, values = self._gather(self.k, lists).to(query), self._gather(self.v, lists).to(query)
        scores = torch.matmul(keys, query[..., None])[..., 0].to(accumulation_dtype(q.dtype))
        scores = scores * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
        if call.soft_cap is not None:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        scores = scores.masked_fill(torch.arange(chunk, device=device) >= seen[..., None], -torch.inf)
        weights = softmax_with_lse(scores.flatten(2))[0].to(values.dtype)
        return torch.matmul(weights[:, :, None], values.flatten(2, 3))

    def _chosen(self, q: Tensor, whole: Tensor, count: Tensor) -> Tensor:
        """Complete chunks that each head of each row takes, ascending, (B, H, K), -1 behind the shorter lists."""
        batch, heads = q.shape[:2]
        most = int(whole.max())
        features = self.features[:, :, :most]
        grouped = q[:, :, 0].unflatten(1, (features.shape[1], -1))
        scores = torch.matmul(grouped, features.transpose(-1, -2)).flatten(1, 2).float()
        number = torch.arange(most, device=q.device)
        last = whole - 1
        forced = ((number == 0) | (number == last[:, None]))[:, None].expand(-1, heads, -1)
        return choose_chunks(scores, last[:, None].expand(batch, heads), forced, count[:, None].expand(batch, heads))

    def _gather(self, x: Tensor, lists: Tensor) -> Tensor:
        """Chunks of (B, Hkv, room, D) by number, (B, H, K) -> (B, H, K, chunk, D)."""
        batch, heads, _ = lists.shape
        row = torch.arange(batch, device=x.device)[:, None, None]
        head = (torch.arange(heads, device=x.device) // (heads // x.shape[1]))[:, None]
        return x.unflatten(2, (-1, self.method.chunk))[row, head, lists.to(x.device)]
