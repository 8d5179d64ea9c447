"""`AttendingLayer`: a cache layer that takes in keys and values through transformers and computes the attention over them itself.

The base of every regard cache. It does what transformers asks of a cache layer (lengths, beams, batches, crop, offload); a
subclass decides what it stores and how a call attends to it:

    class Mine(AttendingLayer):
        def clear(self): ...                     the empty store; called by the constructor and by reset()
        def attend(self, call):
            keys, values, before = self.take(call)   what `update` has just brought, and how many tokens came before it
            ...                                  store, evict, and return the head outputs (B, H, N, Dv)
        def map_rows(self, fn): ...              fn maps a tensor with a leading batch dimension (beams, devices)
        def drop_last(self, count): ...          take back the last tokens, where that can be done
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ... import ops
from ..._checks import bad_value
from ..call import AttentionCall


class AttendingLayer(CacheLayerMixin):
    """Base of cache layers whose attention is computed by `attend(call)`, which the method that made the cache calls.

    Positions stay those of the model: entries come with the rotary phase they were made with.

    Attributes:
        seen: tokens taken in so far, evicted ones included. start: absolute position of each row's first real token, int64 (B,)
            (how much left padding there is), known from the first `take`. latest_start: no row's is later, as a number.
        pending: keys and values that `update` has brought and no `attend` has used yet.

    Raises `RuntimeError` when the method that made the cache is no longer attached, and `ValueError` when the batch changes.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.start: Tensor | None = None
        self._starts: tuple[Tensor, Tensor] | None = None
        self.latest_start = 0
        self.pending: tuple[Tensor, Tensor] | None = None
        self.clear()

    # What a subclass fills in

    def clear(self) -> None:
        """Set up the empty store."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Head outputs (B, H, N, Dv) of a call whose keys and values `update` has just brought."""
        raise NotImplementedError

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor, batch dimension first, by `fn` of it; other devices come through here too."""
        raise NotImplementedError

    def drop_last(self, count: int) -> None:
        """Take back the last `count` tokens (count >= 1, at most `seen`); `ValueError` where it cannot be done."""
        raise bad_value(
            "crop",
            -count,
            f"a cache that can take tokens back, which a {type(self).__name__} cannot: it has evicted by them",
        )

    # For the subclass

    def take(self, call: AttentionCall) -> tuple[Tensor, Tensor, int]:
        """The new keys (B, Hkv, n, D) and values (B, Hkv, n, Dv), and how many tokens the cache had seen before them."""
        if self.pending is None:
            raise RuntimeError(f"{type(self).__name__}.attend needs an update before it")
        (keys, values), self.pending = self.pending, None
        before = self.seen - keys.shape[2]
        if self.start is None or self.latest_start >= before > 0:  # so far, some row may have been nothing but padding
            self.start = call.start.clone()
            self.latest_start = int(self.start.max()) if self.start.numel() else 0
        return keys, values, before

    def starts(self) -> Tensor:
        """`start` on the CPU, copied there once."""
        assert self.start is not None
        if self._starts is None or self._starts[0] is not self.start:
            none = torch.zeros(self.start.shape, dtype=torch.long)
            self._starts = self.start, self.start.cpu() if self.latest_start else none
        return self._starts[1]

    # What transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.pending is not None:
            raise RuntimeError(
                "this KV cache belongs to an attached regard method, and the method is no longer attached"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.start is not None and self.start.shape[0] != key_states.shape[0]:
            held = self.start.shape[0]
            raise bad_value("key_states", f"a batch of {key_states.shape[0]}", f"{held} rows, as the cache holds")
        if key_states.device != self.device:  # the model was moved in mid-generation: the past follows it
            self.device = key_states.device
            self._map(lambda t: t.to(self.device))
        self.pending = (key_states, value_states)
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self._forget()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: a negative number of them, or (positive) the length to keep."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if count <= 0 or self.seen == 0:
            return
        count = min(count, self.seen)
        self.drop_last(count)
        self.seen -= count
        if self.seen == 0:
            self.start = None

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.start is not None:
            self.map_rows(fn)
            self.start = fn(self.start)


def attention_over(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
    """`ops.attention` of these queries, keys and values with the call's own scale, soft cap, dropout and backend."""
    score_mod = None if call.soft_cap is None else ops.scores.soft_cap(call.soft_cap)
    return ops.attention(
        q, k, v, mask=mask, score_mod=score_mod, scale=call.scale, dropout=call.dropout, backend=call.backend, **options
    )
