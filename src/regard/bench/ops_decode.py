"""Decoding from a long context: attention time per token of caches with a small budget, beside dense SDPA, and the bytes they hold.

One layer of SmolLM2's shape (9 query heads, 3 kv heads, 64 channels). Each run goes through several such layers, each with a cache of its
own, as a model does: a cache that had just been read would still lie in the processor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods import H2O, KeyNorm, RecycledAttention, StaircaseQuantCache
from ..methods.caches import AttendingLayer, PagedStore, RaggedLayer, RecycledLayer, kv_bytes
from ..methods.caches.staircase import StaircaseLayer
from ..methods.call import AttentionCall
from ..ops.select import BlockSummaries, Choice
from ..ops.select.block_topk import block_topk
from .ops import Row, Say, Setting
from .timing import Ratio, interleaved

HEADS, KV_HEADS, DIM = 9, 3, 64
TARGET = 0.12  # of the dense time, at a budget of 1/16
_LAYERS, _STRIDE = 4, 50
DENSE = "dense SDPA"


@dataclass
class _Contender:
    """A way to decode: `run` takes `steps` tokens through `_LAYERS` layers. holds: one layer's cache. budget: tokens read, if fixed."""

    name: str
    run: Callable[[], Any]
    holds: Any
    budget: int | None = None
    steps: int = 1


@torch.no_grad()
def measure(setting: Setting, say: Say) -> list[Row]:
    """Context: 32k tokens where other parts take 8k (four times `setting.seq_len`; on the GPU the same); budget: 1/16 of it."""
    context = setting.seq_len if setting.device.startswith("cuda") else 4 * setting.seq_len
    generator = torch.Generator().manual_seed(setting.seed)
    q, k, v = (
        torch.randn((1, heads, context, DIM), generator=generator).to(setting.device, setting.dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    say(f"filling caches, {context} tokens")
    contenders = {one.name: one for one in _contenders(context // 16, q, k, v)}
    times = interleaved({name: one.run for name, one in contenders.items()}, setting.rounds, calls=50, progress=say)
    rows = []
    for name, one in contenders.items():
        seconds = [second / _LAYERS / one.steps for second in times[name]]
        row = Row(name, "forward", Ratio.of(seconds, [1.0] * len(seconds)).median, extra_bytes=kv_bytes(one.holds))
        rows.append(row)
        if name == DENSE:
            row.note = f"{context} tokens"
            continue
        row.beside, row.ratio = DENSE, Ratio.of([second / _LAYERS for second in times[DENSE]], seconds)
        if name.startswith("block top-k"):
            row.target_ratio = 1 / TARGET
            row.note = f"{context // 16} tokens read, choice included"
        if one.budget is None:
            continue
        budgeted = 2 * KV_HEADS * DIM * one.budget * k.element_size()
        row.ideal, row.target_ratio = context / one.budget, 1 / TARGET
        row.share = Ratio(*(x / row.ideal for x in (row.ratio.median, row.ratio.low, row.ratio.high)))
        off = f"{kv_bytes(one.holds) / budgeted - 1:+.1%}"
        row.note = f"{one.budget} tokens a kv head; bytes held, those of the budget {off}"
    return rows


def _contenders(budget: int, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Contender]:
    """Caches that evict are filled from a prompt a little longer than the budget: what they have let go of leaves no trace in them."""
    dense = [(k.clone(), v.clone()) for _ in range(_LAYERS)]

    def over_everything() -> None:
        for keys, values in dense:
            F.scaled_dot_product_attention(q[:, :, -1:], keys, values, enable_gqa=True)

    yield _Contender(DENSE, over_everything, dense[0])
    streams = torch.ones(KV_HEADS, dtype=torch.bool)
    evicting: dict[str, Callable[[], AttendingLayer]] = {
        "H2O, evicts a token a step": lambda: H2O(budget).make_layer(None),
        "key norms, evicts a token a step": lambda: KeyNorm(budget, sink=0, recent=1).make_layer(None),
        "sinks and window": lambda: RaggedLayer(streams, min(4, budget // 2), budget - min(4, budget // 2), True),
    }
    for name, make in evicting.items():
        layers = [make() for _ in range(_LAYERS)]
        for layer in layers:
            layer.update(*(t[:, :, : budget + 64] for t in (k, v)))
            layer.attend(_call(layer, *(t[:, :, : budget + 64] for t in (q, k, v))))
        yield _Contender(name, _decoder(layers, q, k, v, 1), layers[0], budget)
    stores = [_uneven(budget, k, v) for _ in range(_LAYERS)]
    lengths = ", ".join(str(part * budget // 2) for part in (1, 2, 3))
    yield _Contender(f"paged, heads of {lengths} tokens", _uneven_decoder(stores, q, k, v), stores[0], budget)
    yield _Contender("block top-k, min-max summaries (keeps everything)", _retriever(dense, q, budget), dense[0])
    recycled = [RecycledLayer(RecycledAttention(budget, _STRIDE)) for _ in range(_LAYERS)]
    quantised = [StaircaseLayer(StaircaseQuantCache()) for _ in range(_LAYERS)]
    for layer in (*recycled, *quantised):
        layer.update(k, v)
        call = _call(layer, q, k, v)
        keys, values, _ = layer.take(call)
        layer.begin(call, keys, values)
    name = f"recycled, {budget} tokens, every {_STRIDE}th step full (keeps everything)"
    yield _Contender(name, _decoder(recycled, q, k, v, _STRIDE), recycled[0], None, _STRIDE)
    yield _Contender("staircase of 16, 8, 4 and 2 bits, everything read", _decoder(quantised, q, k, v, 1), quantised[0])


def _retriever(caches: list[tuple[Tensor, Tensor]], q: Tensor, budget: int) -> Callable[[], None]:
    """Chooses blocks of keys by their summaries and reads these, the choice included; the summaries of old blocks stand."""
    block = max(1, min(64, budget // 8))
    summaries = [BlockSummaries(block=block, kind="minmax").update(keys) for keys, _ in caches]
    rule = {"block_q": 1, "block_k": block, "summary": "minmax", "budget": budget, "sink": block, "recent": 1}

    def run() -> None:
        for (keys, values), known in zip(caches, summaries):
            chosen = block_topk(q[:, :, -1:], keys, summaries=known, **rule)  # type: ignore[arg-type]
            Choice(chosen).attention(q[:, :, -1:], keys, values)

    return run


def _decoder(layers: list[Any], q: Tensor, k: Tensor, v: Tensor, steps: int) -> Callable[[], None]:
    token = [t[:, :, :1] for t in (q, k, v)]

    def run() -> None:
        with torch.no_grad():
            for _ in range(steps):
                for layer in layers:
                    layer.update(*token[1:])
                    layer.attend(_call(layer, *token))

    return run


def _uneven(budget: int, k: Tensor, v: Tensor) -> PagedStore:
    """Heads that keep half the budget, all of it, and half as much again."""
    most = 3 * budget // 2
    index = torch.arange(most, device=k.device).expand(1, KV_HEADS, -1)
    store = PagedStore()
    rows = {"k": k[:, :, :most], "v": v[:, :, :most], "position": index.to(torch.int32)}
    store.fill(rows, index, torch.tensor([[budget // 2, budget, most]]))
    return store


def _uneven_decoder(stores: list[PagedStore], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """Writes the new token over the first one of every head, and attends."""
    rows = {
        "k": k[:, :, :1],
        "v": v[:, :, :1],
        "position": torch.zeros(1, KV_HEADS, 1, dtype=torch.int32, device=k.device),
    }
    device = k.device

    def run() -> None:
        with torch.no_grad():
            for store in stores:
                sizes = [len(part.members) for part in store.parts]
                victims = [
                    (torch.zeros(n, dtype=torch.long, device=device), torch.ones(n, dtype=torch.bool)) for n in sizes
                ]
                store.append(rows, victims)
                store.attend(q[:, :, :1], DIM**-0.5)

    return run


def _call(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
    return AttentionCall(nn.Identity(), 0, q, k, v, causal=True, cache=layer, num_layers=1)
