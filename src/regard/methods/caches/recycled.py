"""Recycled attention: between full steps, a decoded token reads only what the last full step read most.

Xu, Goyal, Choi 2024, arXiv 2411.05787; the authors' code could not be obtained, so what the paper leaves to it is our choice and a field:
how a group's query heads are joined ("max"), when the query says that it is time for a full step (the mean cosine over all heads
and layers, of the previous token), and which layers always read everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, resolve_budget
from ...ops import masks, merge_lse
from ...ops.recycled import recycled_attention
from ..call import AttentionCall, Method
from .decoder import decoder_config, ragged_layers
from .evicting import new_mask, prompt_sums
from .layer import AttendingLayer, attention_over
from .paged import PagedStore


@dataclass
class RecycledAttention(Method):
    """Decoding alternates full steps, which attend to everything, with recycled ones, which attend to a small cache.

    The small cache holds, for each kv head, the `budget` tokens that the last full step attended to most, and every token since. Nothing
    is thrown away: a token missed now can come back with the next full step. Memory is not reduced (the small cache comes on top);
    a token reads (N + (stride - 1) * budget) / stride entries on average instead of N. Prompts, chunks of them, and candidates of
    assisted decoding are attended in full; their last token chooses.

    Attributes:
        budget: tokens (int) or a fraction of the prompt (float in (0, 1]) in the small cache, per kv head.
        stride: every stride-th decoded token takes a full step; 1 = always. With trigger="similarity" the longest time without one.
        trigger: "stride" (fixed schedule), or "similarity": a full step when the queries have turned away from those of the last full step.
        threshold: for "similarity", the mean cosine below which that is so, in [-1, 1].
        scope: for "similarity", "model": one decision a token for all layers, from the previous token's queries; "layer": each layer
            decides by its own query now.
        group: how the attention of the query heads of one kv head is joined: "max", "mean" or "sum".
        choice: "attention", or "recent": 4 first tokens and recent ones in place of the most attended, the paper's comparison.
        dense_layers: layer numbers (negative from the end) that always take full steps.
        whole: also where there is no cache (training, scoring with use_cache=False): chunks of `stride` queries share what their first
            one reads most (`regard.ops.recycled_attention`), which is how the paper goes on pre-training; a fraction is then of the
            sequence. False: attention without a cache stays dense.

    With a batch, each row has its own small cache and, by similarity, its own full steps. `ValueError` on bad values.
    """

    budget: int | float = 4096
    stride: int = 50
    trigger: str = "stride"
    threshold: float = 0.8
    scope: str = "model"
    group: str = "max"
    choice: str = "attention"
    dense_layers: Sequence[int] = ()
    whole: bool = False

    def __post_init__(self) -> None:
        resolve_budget("budget", self.budget, 1)
        require_int("stride", self.stride, 1)
        require_name("trigger", self.trigger, ("stride", "similarity"))
        require_name("scope", self.scope, ("model", "layer"))
        require_name("group", self.group, ("max", "mean", "sum"))
        require_name("choice", self.choice, ("attention", "recent"))
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        require(number and -1.0 <= self.threshold <= 1.0, "threshold", self.threshold, "a cosine in [-1, 1]")

    def check(self, model: nn.Module) -> None:
        self.cache(model)  # says why, where it cannot

    def cache(self, model: nn.Module) -> Any:
        count = decoder_config(model, type(self).__name__).num_hidden_layers
        dense = {layer % count for layer in self.dense_layers if -count <= layer < count}
        require(
            len(dense) == len(set(self.dense_layers)), "dense_layers", list(self.dense_layers), f"layers of {count}"
        )
        together = _Together()

        def make(number: int) -> RecycledLayer:
            return RecycledLayer(self, together, dense=number in dense)

        return ragged_layers(model, make, type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if isinstance(call.cache, RecycledLayer):
            return call.cache.attend(call)
        if not self.whole or call.cache is not None or call.layer in self.dense_layers:
            return None
        if call.layer - call.num_layers in self.dense_layers:
            return None
        return self._over_whole(call)

    def _over_whole(self, call: AttentionCall) -> Tensor:
        """Rows with the same left padding together, without it: chunks begin at a row's own first token."""
        require(call.soft_cap is None, "whole", True, "False for a model that caps its scores")
        out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]))
        starts = call.start.cpu().clamp(max=call.q_len)
        for start in starts.unique().tolist():
            rows = (starts == start).nonzero()[:, 0].to(call.q.device)
            q, k, v = (t[rows, :, start:] for t in (call.q, call.k, call.v))
            budget = max(1, resolve_budget("budget", self.budget, q.shape[2]))
            options: dict[str, Any] = {"group": self.group, "scale": call.scale, "backend": call.backend}
            part = recycled_attention(q, k, v, budget=budget, stride=self.stride, **options)
            out = out.index_put((rows,), torch.nn.functional.pad(part, (0, 0, start, 0)))
        return out


class _Together:
    """The layers of a model that recycle, in order. (Not a plain list, so that the bytes of one layer are not those of all.)"""

    __slots__ = ("layers",)

    def __init__(self) -> None:
        self.layers: list[RecycledLayer] = []


class RecycledLayer(AttendingLayer):
    """The full cache and the recycled one of a layer.

    Args:
        method: its options. together: the layers of the model that decide together; None: this one alone. dense: full steps only.
    """

    def __init__(self, method: RecycledAttention, together: _Together | None = None, dense: bool = False) -> None:
        self.method, self.dense = method, dense
        self.together = _Together() if together is None else together
        if not dense:
            self.together.layers.append(self)
        super().__init__()

    def clear(self) -> None:
        self.full, self.recycled = PagedStore(), PagedStore()
        self.kept: Tensor | None = None  # size of the small cache of each row, (B,) on the CPU
        self.since: Tensor | None = None  # steps since the last full one, (B,) on the CPU
        self.asked: Tensor | None = None  # the queries of the last full step (B, H, D)
        self.similar: Tensor | None = None  # mean cosine of the last step's queries with those, (B,)
        self.due: list[int] | None = None  # rows whose next step is a full one; None: not decided yet

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        batch = self.full.batch
        self.full.map_rows(fn)
        self.recycled.map_rows(fn)
        self.asked, self.similar = (None if t is None else fn(t) for t in (self.asked, self.similar))
        if self.kept is not None and self.since is not None:
            if bool((self.kept == self.kept[0]).all() and (self.since == self.since[0]).all()):
                rows = [0] * self.full.batch
            else:
                rows = fn(torch.arange(batch, device=self.device)).tolist()
            self.kept, self.since = self.kept[rows], self.since[rows]

    def drop_last(self, count: int) -> None:
        """What the small cache was chosen by may be gone, so that the next step is a full one."""
        if self.seen == count:
            self.clear()
            return
        self.full.drop_from(self.seen - count)
        if self.since is not None:
            self.since = torch.full_like(self.since, self.method.stride)

    # The attention

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        if before == 0:
            return self._prompt(call, keys, values)
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        if keys.shape[2] > 1 or before < self.latest_start:
            return self._chunk(call, keys, values, before, scale)
        rows = _rows(keys, values, before)
        self.full.append(rows)
        batch = range(call.batch)
        due = list(batch) if self.dense else self._due(call)
        if len(due) == call.batch:
            return self._full_step(call, self.full, list(batch), call.q, scale)
        self.recycled.append(rows)
        out, _, _ = self.recycled.attend(call.q, scale, call.soft_cap, backend=call.backend)
        assert self.since is not None
        self.since = self.since + 1
        if due:
            at = torch.tensor(due, device=call.q.device)
            out[at] = self._full_step(call, self.full.subset(due), due, call.q[at], scale)
        return out

    def _prompt(self, call: AttentionCall, keys: Tensor, values: Tensor) -> Tensor:
        out = attention_over(call, call.q, keys, values, call.mask if call.mask is not None else masks.causal)
        self.begin(call, keys, values)
        return out

    def begin(self, call: AttentionCall, keys: Tensor, values: Tensor) -> None:
        """Take in a prompt, whose last query chooses."""
        batch, heads, length = keys.shape[:3]
        starts = self.starts().clamp(max=length)
        count = length - starts
        self.kept = torch.tensor([max(1, resolve_budget("budget", self.method.budget, n)) for n in count.tolist()])
        slots = torch.arange(max(1, int(count.max())), device=keys.device)
        index = (starts.to(keys.device)[:, None, None] + slots).clamp(max=max(0, length - 1)).expand(-1, heads, -1)
        self.full.fill(_rows(keys, values, 0), index, count[:, None].expand(-1, heads))
        if not self.dense:
            sums = prompt_sums(call, keys, 1, self.method.group).gather(2, index)
            by_part = [self.full.pick(sums, part)[:, : part.longest] for part in self.full.parts]
            self._choose(self.full, list(range(batch)), by_part)
        self._remember(call.q, list(range(batch)))

    def _chunk(self, call: AttentionCall, keys: Tensor, values: Tensor, before: int, scale: float) -> Tensor:
        """Several tokens at once: everything is attended to, and the last token chooses anew."""
        stored, lse, _ = self.full.attend(call.q, scale, call.soft_cap, backend=call.backend, lse=True)
        mask = new_mask(self, call, keys.shape[2], before)
        fresh, fresh_lse = attention_over(call, call.q, keys, values, mask, return_lse=True)
        out, _ = merge_lse([stored, fresh], [lse, fresh_lse])
        self.full.append(_rows(keys, values, before), skip=(self.starts() - before).clamp(min=0))
        self._full_step(call, self.full, list(range(call.batch)), call.q[:, :, -1:], scale)
        return out

    def _full_step(self, call: AttentionCall, store: PagedStore, rows: list[int], q: Tensor, scale: float) -> Tensor:
        """Attention of one query over all that `store` (these rows of the batch) holds; what it reads most is recycled from now on."""
        reads = not self.dense and self.method.choice == "attention"
        out, _, weights = store.attend(q, scale, call.soft_cap, backend=call.backend, weights=reads)
        if not self.dense:
            joined = [_joined(weight[:, :, 0], self.method.group) for weight in weights]
            self._choose(store, rows, joined if reads else [part["position"].float() for part in store.parts])
        self._remember(q, rows)
        return out

    # What to recycle, and when not to

    def _choose(self, store: PagedStore, rows: list[int], scores: list[Tensor]) -> None:
        """Fill the small cache of these rows with their `kept` entries of the highest score, scores (G, longest) by part."""
        assert self.kept is not None and self.start is not None
        chosen = []
        starts = self.starts()
        for part, score in zip(store.parts, scores):
            row = torch.tensor(rows)[part.members // store.heads]
            if self.method.choice == "recent":
                first = (starts[row] + 4).to(score.device)[:, None]
                score = part["position"].float().masked_fill(part["position"] < first, torch.inf)
            valid = part.valid()
            score = score if valid is None else score.masked_fill(~valid, -torch.inf)
            count = torch.minimum(self.kept[row], part.length)
            chosen.append((score.topk(min(int(count.max()), score.shape[1]), dim=1).indices, count))
        small = PagedStore()
        small.copy_of(store, chosen)
        if self.since is None or len(rows) == len(self.since):
            self.recycled, self.since = small, torch.zeros(len(self.start), dtype=torch.long)
        else:
            self.recycled.replace(rows, small)
            self.since[rows] = 0

    def _remember(self, q: Tensor, rows: list[int]) -> None:
        if self.method.trigger == "stride" or self.dense:
            return
        query = q[:, :, -1].clone()
        if self.asked is None or len(rows) == self.asked.shape[0]:
            self.asked, self.similar = query, torch.ones(query.shape[0], device=q.device)
        else:
            at = torch.tensor(rows, device=q.device)
            self.asked = self.asked.index_copy(0, at, query)
            if self.method.scope == "model" and self.similar is not None:
                self.similar = self.similar.index_fill(0, at, 1.0)

    def _due(self, call: AttentionCall) -> list[int]:
        """Rows of the batch whose step is to be a full one."""
        assert self.since is not None
        late = self.since + 1 >= self.method.stride
        if self.method.trigger == "similarity" and not bool(late.all()):
            assert self.asked is not None
            now = torch.cosine_similarity(call.q[:, :, 0].float(), self.asked.float(), dim=-1).mean(1)
            if self.method.scope == "layer":
                late = late | (now < self.method.threshold).cpu()
            else:
                first = self.together.layers[0]
                if first is self:
                    known = [
                        layer.similar.to(now.device) for layer in self.together.layers if layer.similar is not None
                    ]
                    first.due = (torch.stack(known).mean(0) < self.method.threshold).nonzero()[:, 0].tolist()
                late[first.due or []] = True
                self.similar = now
        return late.nonzero()[:, 0].tolist()


def _rows(keys: Tensor, values: Tensor, before: int) -> dict[str, Tensor]:
    position = torch.arange(before, before + keys.shape[2], device=keys.device, dtype=torch.int32)
    return {"k": keys, "v": values, "position": position.expand(*keys.shape[:3])}


def _joined(weights: Tensor, group: str) -> Tensor:
    """(G, g, L) -> (G, L)."""
    return weights.amax(1) if group == "max" else weights.mean(1) if group == "mean" else weights.sum(1)
