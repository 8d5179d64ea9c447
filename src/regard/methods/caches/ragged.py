"""Ragged KV cache layers: per kv head either everything, or only sinks and recent entries. What is evicted is freed, not masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import bad_value
from ...ops import masks
from ...ops.growing_store import GrowingStore
from ..call import AttentionCall, Method
from .layer import AttendingLayer, attention_over


class StreamStore:
    """Keys and values of streaming heads: the first `sink` tokens of each row (its own, after left padding) and the last `recent`."""

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent
        self.sinks: tuple[Tensor, Tensor] | None = None
        self.tail: tuple[Tensor, Tensor] | None = None
        self.complete = False  # every row has all its sinks

    def add(self, keys: Tensor, values: Tensor, seen: int, start: Tensor) -> None:
        """Take in tokens at positions [seen, seen + n) and let go of what is neither sink nor recent any more."""
        self.sinks = self._with_sinks((keys, values), seen, start)
        new = keys.shape[2]
        kept = []
        for i, fresh in enumerate((keys, values)):
            if self.tail is None or new >= self.recent:
                kept.append(fresh[:, :, max(0, new - self.recent) :].clone())
            else:
                old = self.tail[i]
                room = self.recent - new
                kept.append(torch.cat([old[:, :, max(0, old.shape[2] - room) :], fresh], dim=2))
        self.tail = (kept[0], kept[1])

    def settled(self, seen: int, latest_start: int) -> bool:
        """Whether everything stored is real and nothing is held twice, in every row: no mask is needed then."""
        return self.tail is not None and seen - self.tail[0].shape[2] >= latest_start + self.sink

    def _with_sinks(self, fresh: tuple[Tensor, Tensor], seen: int, start: Tensor) -> tuple[Tensor, Tensor]:
        if self.sinks is not None and self.complete:
            return self.sinks
        self.complete = seen + fresh[0].shape[2] >= int(start.max()) + self.sink
        slot = start[:, None] + torch.arange(self.sink, device=start.device)
        new = fresh[0].shape[2]
        arrives = (slot >= seen) & (slot < seen + new)
        index = (slot - seen).clamp(0, new - 1)[:, None, :, None]
        out = []
        for i, part in enumerate(fresh):
            gathered = part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3]))
            held = self.sinks[i] if self.sinks is not None else torch.zeros_like(gathered)
            out.append(torch.where(arrives[:, None, :, None], gathered, held))
        return out[0], out[1]

    def visible(self, seen: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """For what is stored, sinks then tail: positions (B, S + r) and whether the entry is real and not held twice (B, S + r)."""
        assert self.tail is not None
        slots = start[:, None] + torch.arange(self.sink, device=start.device)
        tail = seen - self.tail[0].shape[2] + torch.arange(self.tail[0].shape[2], device=start.device)
        tail = tail.expand(start.shape[0], -1)
        return torch.cat([slots, tail], 1), torch.cat([slots < seen, tail >= start[:, None] + self.sink], 1)

    def map_rows(self, fn: Any) -> None:
        if self.sinks is not None and self.tail is not None:
            self.sinks, self.tail = tuple(map(fn, self.sinks)), tuple(map(fn, self.tail))  # type: ignore[assignment]


class RaggedLayer(AttendingLayer):
    """One layer's cache in which each kv head keeps everything or only `sink` + `recent` entries.

    `update` takes the new keys and values and hands them back; the attention over what is stored is `attend`, which the method
    that made the cache calls. Positions stay those of the model: entries carry the rotary phase they were made with.

    Args:
        streaming: bool (Hkv,), True for heads that keep only sinks and recent entries; None: to be set before the first `attend`.
        sink, recent: tokens that streaming heads keep, from the start (after left padding) and from the end.
        exact_window: False: a decoded token sees `recent` earlier tokens besides itself, and the first chunk is dense for all heads
            (DuoAttention's released code). True: a query sees keys with `q - kv < recent` and sinks, in every phase.
    """

    def __init__(self, streaming: Tensor | None, sink: int, recent: int, exact_window: bool = False) -> None:
        self.streaming, self.sink, self.recent, self.exact_window = streaming, sink, recent, exact_window
        super().__init__()

    def clear(self) -> None:
        self._head_numbers: list[tuple[Any, Any]] | None = None
        self.full = GrowingStore()
        self.stream = StreamStore(self.sink, max(0, self.recent - 1) if self.exact_window else self.recent)

    def drop_last(self, count: int) -> None:
        """Take back the last tokens, which only heads that keep everything can do."""
        if self.streaming is None or bool(self.streaming.any()):
            raise bad_value("crop", -count, "a cache without streaming heads: what they evicted cannot be taken back")
        self.full.drop_last(count)

    def map_rows(self, fn: Any) -> None:
        self._head_numbers = None
        self.full.map_rows(fn)
        self.stream.map_rows(fn)

    # The attention over it

    def attend(self, call: AttentionCall) -> Tensor:
        """Head outputs (B, H, N, Dv) of a call whose keys and values `update` has just taken in."""
        if self.streaming is None:
            raise RuntimeError("RaggedLayer.attend needs `streaming` set before it")
        keys, values, before = self.take(call)
        (full, q_full), (stream, q_stream) = self._heads(call.num_heads // keys.shape[1], keys.device)
        if stream is None:
            out = self._attend_full(call, call.q, keys, values, before)
        elif full is None:
            out = self._attend_stream(call, call.q, keys, values, before)
        else:
            out = call.q.new_empty((*call.q.shape[:3], values.shape[3]))
            for heads, q_heads, attend in ((full, q_full, self._attend_full), (stream, q_stream, self._attend_stream)):
                q, k, v = call.q.index_select(1, q_heads), keys.index_select(1, heads), values.index_select(1, heads)
                out.index_copy_(1, q_heads, attend(call, q, k, v, before))
        return out

    def _heads(self, group: int, device: torch.device) -> list[tuple[Any, Any]]:
        """Numbers of the kv heads that keep everything and of those that stream, with their query heads; None for no head."""
        if self._head_numbers is None:
            assert self.streaming is not None
            self._head_numbers = []
            for chosen in (~self.streaming, self.streaming):
                heads = chosen.to(device).nonzero()[:, 0]
                q_heads = (heads[:, None] * group + torch.arange(group, device=device)).flatten()
                self._head_numbers.append((heads, q_heads) if heads.numel() else (None, None))
        return self._head_numbers

    def _attend_full(self, call: AttentionCall, q: Tensor, keys: Tensor, values: Tensor, before: int) -> Tensor:
        keys, values = self.full.append(keys, values)
        return attention_over(call, q, keys, values, call.mask if call.mask is not None else masks.causal)

    def _attend_stream(self, call: AttentionCall, q: Tensor, keys: Tensor, values: Tensor, before: int) -> Tensor:
        assert self.start is not None
        if before == 0:
            mask: Any = call.mask if call.mask is not None else masks.causal
            if self.exact_window:
                sees = masks.sliding_window(self.recent) | _sinks(self.start, self.sink)
                mask = sees & (masks.causal if call.mask is None else call.mask)
            out = attention_over(call, q, keys, values, mask)
        else:
            out = self._attend_stored(call, q, keys, values, before)
        self.stream.add(keys, values, before, self.start)
        return out

    def _attend_stored(self, call: AttentionCall, q: Tensor, keys: Tensor, values: Tensor, before: int) -> Tensor:
        stream, start = self.stream, self.start
        assert stream.sinks is not None and stream.tail is not None and start is not None
        sinks = self._sink_keys(stream.sinks[0], before + keys.shape[2])
        all_keys = torch.cat([sinks, stream.tail[0], keys], dim=2)
        all_values = torch.cat([stream.sinks[1], stream.tail[1], values], dim=2)
        new = keys.shape[2]
        if new == 1 and stream.settled(before, self.latest_start):
            return attention_over(call, q, all_keys, all_values, None)
        position, keep = stream.visible(before, start)
        fresh = before + torch.arange(new, device=q.device)
        position = torch.cat([position, fresh.expand(position.shape[0], -1)], 1)[:, None, None, :]
        keep = torch.cat([keep, fresh >= start[:, None]], 1)[:, None, None, :]
        query = fresh[None, None, :, None]
        sees = keep & (position <= query)
        if self.exact_window:
            is_sink = position < (start + self.sink)[:, None, None, None]
            sees = sees & (is_sink | (query - position < self.recent))
        return attention_over(call, q, all_keys, all_values, sees)

    def _sink_keys(self, keys: Tensor, seen: int) -> Tensor:
        """Sink keys as the queries are to see them; a subclass may move them to other positions."""
        return keys


def _sinks(start: Tensor, sink: int) -> masks.Mask:
    if not bool(start.any()):
        return masks.sink(sink)
    return masks.padding(start + sink)


def kv_bytes(cache: Any) -> int:
    """Bytes of all tensor storages that a cache (or a cache layer) holds, each storage counted once, as allocated.

    What a cache only refers to does not count: modules, methods and whatever else is neither a cache nor a part of one.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [cache]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, (list, tuple, set)):
                waiting += value
            elif _part_of_a_cache(value):
                waiting += vars(value).values()
    return sum(storages.values())


def _part_of_a_cache(value: Any) -> bool:
    if isinstance(value, (type, torch.nn.Module, Method)) or not hasattr(value, "__dict__"):
        return False
    kind = type(value)
    known = kind.__module__.startswith(("regard.methods.", "regard.ops.", "transformers.cache_utils"))
    return known or any(base.__module__ == "transformers.cache_utils" for base in kind.__mro__)
