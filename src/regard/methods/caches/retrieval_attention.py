"""RetrievalAttention: sinks and recent tokens on the device, the rest of the past in an index that each query searches.

Liu et al. 2024, arXiv 2409.10516. Numbers from microsoft/MInference (MIT), `minference/modules/retr_attn.py`, the authors' implementation
for Hugging Face models, which takes a flat or inverted-file index; the paper's graph of keys is not released (see `regard.ops.index`).

Differences: tokens leave the recent window in groups of `insert_every` (released: one by one, `insert_every=1`, or never); several tokens
at once (candidates of assisted decoding, a short question) see each other causally, where the release lets them see all; batches and
left padding work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require_int, require_name
from ...ops import masks, merge_lse
from ...ops.growing_store import GrowingStore
from ...ops.index.growing import Growing
from ...ops.index.quality import KINDS, make_index
from ...ops.reference import softmax_with_lse
from ..call import AttentionCall, Method
from .decoder import ragged_layers
from .layer import AttendingLayer, attention_over

_PROMPT = 32  # from so many tokens on a call is a piece of a prompt, and attended in full
_ASKED = 4096  # queries per kv head kept to build the index from


@dataclass
class RetrievalAttention(Method):
    """Attention in decoding over sinks, recent tokens and the `top_k` best keys of the rest, found by an index.

    Prompts are attended in full. What is neither sink nor recent is kept on the device `offload` and indexed when the first token is
    decoded. Each query head searches the index of its kv head; both parts are merged by their log-sum-exps, so that the outcome is
    softmax attention over the keys used. With `index="exact"` and `top_k` of at least the context it is dense attention.

    Attributes:
        sink, recent: tokens always attended, from the start (after left padding) and from the end.
        top_k: keys of the rest that a query head attends to (100: the paper's main runs; the released code's default is 2000).
        index: "graph" (`QueryGraph`, reads a few percent of the keys), "ivf" (needs faiss) or "exact" (reads all).
        index_options: arguments of the index's class.
        insert_every: when so many tokens are beyond the recent window they go into the index; None: generated tokens stay.
        offload: device of the index and of the values beside it; None: the model's own.
        from_layer: layers below keep an ordinary full cache.
    """

    sink: int = 128
    recent: int = 512
    top_k: int = 100
    index: str = "graph"
    index_options: dict[str, Any] = field(default_factory=dict)
    insert_every: int | None = 64
    offload: str | None = "cpu"
    from_layer: int = 0

    def __post_init__(self) -> None:
        require_int("sink", self.sink, 0)
        require_int("recent", self.recent, 1)
        require_int("top_k", self.top_k, 1)
        require_int("from_layer", self.from_layer, 0)
        require_name("index", self.index, KINDS)
        if self.insert_every is not None:
            require_int("insert_every", self.insert_every, 1)
        make_index(self.index, **self.index_options)  # says what is wrong with the options, or missing, now

    def check(self, model: nn.Module) -> None:
        self.cache(model)  # says why, where it cannot

    def cache(self, model: nn.Module) -> Any:
        from transformers.cache_utils import DynamicLayer

        def make(number: int) -> Any:
            return DynamicLayer() if number < self.from_layer else RetrievalLayer(self)

        return ragged_layers(model, make, type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        return call.cache.attend(call) if isinstance(call.cache, RetrievalLayer) else None


class RetrievalLayer(AttendingLayer):
    """The cache layer of `RetrievalAttention`. Keys carry the rotary phase they came with.

    Attributes:
        near: keys and values of the last tokens, on the device: those from position `edge` on. index: the keys before `edge`.
        far_values: the values beside them. read: keys that the searches of the last call read, (B, H, N), or None.
    """

    def __init__(self, method: RetrievalAttention) -> None:
        self.method = method
        super().__init__()

    def clear(self) -> None:
        self.near = GrowingStore()
        self.far_keys, self.far_values = Growing(), Growing()  # the keys only until the index is built
        self.index: Any = None
        self.asked: Tensor | None = None
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.sinks_at = -1  # the edge when the sinks were last looked up
        self.read: Tensor | None = None

    @property
    def edge(self) -> int:
        return self.far_values.size

    # Rows of the batch

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.near.map_rows(fn)
        for far in (self.far_keys, self.far_values):
            far.map(lambda t: self._away(fn(t)))
        if self.index is not None:
            self.index.map_rows(lambda t: self._away(fn(t)))
        self.asked = None if self.asked is None else self._away(fn(self.asked))
        self.sinks = None if self.sinks is None else (fn(self.sinks[0]), fn(self.sinks[1]))

    def drop_last(self, count: int) -> None:
        self.near.drop_last(min(count, self.near.length))
        left = self.edge - (self.seen - count)
        if left > 0:
            self.far_values.drop_last(left)
            if self.index is None:
                self.far_keys.drop_last(left)
            else:
                self.index.drop_last(left)
            self.sinks_at = -1

    def _away(self, x: Tensor) -> Tensor:
        return x if self.method.offload is None else x.to(self.method.offload)

    # The attention

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        prompt = before == 0 or keys.shape[2] >= _PROMPT
        out = self._attend_prompt(call, keys, values) if prompt else self._attend_few(call, keys, values)
        return out

    def _attend_prompt(self, call: AttentionCall, keys: Tensor, values: Tensor) -> Tensor:
        """Everything, in full; then what is no longer recent goes away."""
        near = self.near.append(keys, values)
        if self.edge:
            far = (self._all_far_keys().to(keys), self.far_values.view().to(values))
            near = (torch.cat([far[0], near[0]], 2), torch.cat([far[1], near[1]], 2))
        mask = masks.causal if call.mask is None else call.mask
        out = attention_over(call, call.q, near[0], near[1], mask)
        self._remember(call.q)
        if self.near.length > self.method.recent:
            self._send_away(self.near.length - self.method.recent)
        return out

    def _attend_few(self, call: AttentionCall, keys: Tensor, values: Tensor) -> Tensor:
        new, every = keys.shape[2], self.method.insert_every
        near = self.near.append(keys, values)
        self._remember(call.q)
        if self.index is None and self.edge:
            self._make_index()
        recent = max(self.method.recent, new)  # the queries of this call are to see all that is indexed
        if every is not None and self.near.length >= recent + every:
            self._send_away(self.near.length - recent)
            near = self.near.views()
        if self.index is None and self.edge:
            self._make_index()
        parts = [self._attend_near(call, *near)]
        if self.edge:
            parts.append(self._attend_found(call))
        return parts[0][0] if len(parts) == 1 else merge_lse(*map(list, zip(*parts)))[0]

    def _attend_near(self, call: AttentionCall, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks and recent tokens."""
        assert self.start is not None
        sink, edge, device = self.method.sink, self.edge, keys.device
        if edge and sink:
            sinks = self._sinks(keys)
            keys, values = torch.cat([sinks[0], keys], 2), torch.cat([sinks[1], values], 2)
        else:
            sink = 0
        settled = edge >= self.latest_start + sink
        if call.q_len == 1 and settled:
            return attention_over(call, call.q, keys, values, return_lse=True)
        start = self.start.to(device)[:, None]
        slots = start + torch.arange(sink, device=device)
        tokens = torch.arange(edge, self.seen, device=device).expand(len(start), -1)
        position = torch.cat([slots, tokens], 1)[:, None, None]
        real = torch.cat([slots < edge, tokens >= start], 1)[:, None, None]
        query = torch.arange(self.seen - call.q_len, self.seen, device=device)[:, None]
        return attention_over(call, call.q, keys, values, real & (position <= query), return_lse=True)

    def _attend_found(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The best keys of the index: softmax over them alone."""
        values = self.far_values.view()
        found = self.index.search(call.q, min(self.method.top_k, self.edge))
        self.read = found.scanned
        scores = found.scores * (call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
        if call.soft_cap is not None:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        weights, lse = softmax_with_lse(scores)
        batch, heads, rows, count = found.indices.shape
        kv_heads = values.shape[1]
        at = found.indices.clamp(min=0).view(batch, kv_heads, -1, 1).expand(-1, -1, -1, values.shape[3])
        picked = values.gather(2, at).view(batch, heads, rows, count, -1).to(weights.dtype)
        out = torch.matmul(weights[..., None, :], picked)[..., 0, :]
        return out.to(call.q), lse.to(call.q.device)

    # What lies where

    def _remember(self, q: Tensor) -> None:
        """Keep the last queries, from which the index is made or extended."""
        if self.method.index != "graph":
            return
        kept = max(1, _ASKED // max(1, q.shape[1] // self.near.views()[0].shape[1]))
        new = self._away(q[:, :, -kept:].detach())
        if self.asked is not None and new.shape[2] < kept:
            new = torch.cat([self.asked[:, :, new.shape[2] - kept :], new], 2)
        self.asked = new

    def _send_away(self, count: int) -> None:
        """The first `count` recent tokens leave the device."""
        keys, values = self.near.views()
        away = (self._away(keys[:, :, :count]), self._away(values[:, :, :count]))
        self.far_values.append(away[1])
        if self.index is None:
            self.far_keys.append(away[0])
        else:
            self.index.insert(away[0], None if self.asked is None else self.asked)
            self.asked = None if self.asked is None else self.asked[:, :, :0]
        rest = (keys[:, :, count:].clone(), values[:, :, count:].clone())
        self.near = GrowingStore()
        self.near.append(*rest)

    def _make_index(self) -> None:
        assert self.start is not None
        first = self.start + self.method.sink
        first_query = None
        if self.asked is not None:
            first_query = (self.start - (self.seen - self.asked.shape[2])).clamp(0, self.asked.shape[2])
        index = make_index(self.method.index, **self.method.index_options)
        self.index = index.build(self.far_keys.view(), self.asked, first, first_query)
        self.far_keys = Growing()
        self.asked = None if self.asked is None else self.asked[:, :, :0]

    def _all_far_keys(self) -> Tensor:
        return self.far_keys.view() if self.index is None else self.index.keys

    def _sinks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of each row's first tokens, (B, Hkv, sink, D); what is not yet beyond `edge` is anything."""
        assert self.start is not None
        complete = self.sinks_at >= self.latest_start + self.method.sink
        if self.sinks is None or not (complete or self.sinks_at == self.edge):
            keys, values = self._all_far_keys(), self.far_values.view()
            slot = (self.start[:, None] + torch.arange(self.method.sink, device=self.start.device)).clamp(
                max=self.edge - 1
            )
            at = slot.to(keys.device)[:, None, :, None]
            k, v = (x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])).to(like) for x in (keys, values))
            self.sinks, self.sinks_at = (k, v), self.edge
        return self.sinks
