"""167 RetrievalAttention: a graph made from queries finds the keys that matter and reads few of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers import attach
from ...methods.caches import RetrievalAttention, RetrievalLayer
from ...methods.call import AttentionCall, Method
from ...ops.attention import attention
from ..indexes import BLIND, CELLS, GRAPH, compare_indexes
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "167", "retrieval-attention"
SAYS = (
    "RetrievalAttention: queries are so unlike keys that an inverted-file index must scan about 30 % of them for a recall of 0.95 and "
    "an index made from queries 1-3 %; decoding then costs a fraction of full attention."
)
EXACT = "exact"
MASS, READ = "top-100 mass found", "share of keys read"
_TESTED = 32


def measure(scale: Scale) -> Outcome:
    context, many, decode = scale.pick(8192, 700), scale.pick(65536, 3000), scale.pick(32768, 3000)
    out = Outcome(
        f"SmolLM2 queries and keys at {context} tokens, {many} synthetic keys with out-of-distribution queries, decoding at {decode}",
        "layer (or seed), mean over heads and queries",
    )
    real = _captured(scale, context)
    last = context - _TESTED
    for where, low, high in (
        ("all keys", 0, last),
        ("sinks and window aside", scale.pick(128, 16), last - scale.pick(512, 64)),
    ):
        cases = [(k[:, :, low:high], q[:, :, :last], q[:, :, last:]) for q, k in real]
        _rows(out, f"SmolLM2, {where}", cases, scale)
    cases = [_foreign(many, seed) for seed in range(scale.pick(2, 1))]
    _rows(out, "synthetic", cases, scale)
    for name in ("SmolLM2, all keys", "SmolLM2, sinks and window aside", "synthetic"):
        graph = out.row(f"{name}: {GRAPH}", MASS)
        out.check(f"{name}, mass found", graph.mean, at_least=0.95 if "aside" not in name else 0.9, digits=3)
        out.check(f"{name}, share read", out.row(f"{name}: {GRAPH}", READ).mean, at_most=0.05, digits=3)
        lead = graph.mean - out.row(f"{name}: {CELLS}", MASS).mean
        out.check(f"{name}, lead over the inverted file", lead, at_least=0.0, digits=3)
    _decoding(out, decode, scale)
    masses = "; ".join(
        f"{name}: {out.row(f'{name}: {CELLS}', MASS).mean:.2f} and {out.row(f'{name}: {BLIND}', MASS).mean:.2f}"
        for name in ("SmolLM2, all keys", "SmolLM2, sinks and window aside", "synthetic")
    )
    out.note = f"At the same reading, an inverted file and a graph of near keys find {masses}."
    return out


def _rows(out: Outcome, name: str, cases: list[tuple[Tensor, Tensor, Tensor]], scale: Scale) -> None:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for keys, build, test in cases:
        for figures in compare_indexes(keys, build, test, top=scale.pick(100, 10)):
            mass, read = found.setdefault(figures.label, ([], []))
            mass.append(figures.mass)
            read.append(figures.read)
    for label, (mass, read) in found.items():
        out.add(f"{name}: {label}", MASS, "share", mass)
        out.add(f"{name}: {label}", READ, "share", read)


@dataclass
class _Capture(Method):
    """Keeps queries and keys of some layers."""

    wanted: tuple[int, ...] = ()
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def edit(self, call: AttentionCall) -> None:
        if call.layer in self.wanted:
            self.found[call.layer] = (call.q.clone(), call.k.clone())


@torch.no_grad()
def _captured(scale: Scale, context: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of five layers (two at quick scale), spread over the model."""
    model, tokenizer = scale.language_model()
    layers = model.config.get_text_config().num_hidden_layers
    count = scale.pick(5, 2)
    capture = _Capture(
        wanted=tuple(sorted({round((i + 0.5) * layers / count) for i in range(count)} & set(range(layers))))
    )
    ids = torch.tensor([token_windows(tokenizer, context, 1)[0]], device=model.device)
    with attach(model, capture):
        model(ids, use_cache=False, logits_to_keep=1)
    return [(q.float(), k.float()) for q, k in capture.found.values()]


def _foreign(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in clusters, (1, 3, n, 64), and queries from a few directions of their own, away from all keys: to build from, and to test."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, group, dim, clusters, latent = 1, 3, 64, 256, 8
    member = torch.randint(clusters, (heads, count), generator=generator)
    keys = torch.stack([normal(clusters, dim)[one] for one in member]) + 0.7 * normal(heads, count, dim)
    keys = keys * (1 + 0.2 * normal(heads, count, 1).abs())
    away = torch.nn.functional.normalize(normal(heads, 1, dim), dim=-1) * 2 * dim**0.5
    queries = 4 / latent**0.5 * normal(heads, group * 1400, latent) @ normal(heads, latent, dim)
    queries = (queries + away + 0.5 * normal(heads, group * 1400, dim)).view(1, heads * group, 1400, dim)
    return keys[None], queries[:, :, :-_TESTED], queries[:, :, -_TESTED:]


def _decoding(out: Outcome, context: int, scale: Scale) -> None:
    """Attention of one decoded token: dense, and over sinks, window and 100 retrieved keys; heads as SmolLM2 has them."""
    parts = [_foreign(context, seed) for seed in range(3)]
    keys = torch.cat([part[0] for part in parts], 1)
    asked = torch.cat([part[1] for part in parts], 1)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(9))
    query = asked[:, :, -1:]
    every: list[tuple[str, dict[str, Any]]] = [
        (EXACT, {"index": "exact"}),
        (GRAPH, {"index": "graph"}),
        (f"{GRAPH}, 1.5 % read", {"index": "graph", "index_options": {"reads": 0.015}}),
        (CELLS, {"index": "ivf"}),
    ]
    work: dict[str, Any] = {"dense": lambda: attention(query, keys, values)}
    for label, options in every:
        method = RetrievalAttention(
            sink=scale.pick(128, 16), recent=scale.pick(512, 64), top_k=scale.pick(100, 10), **options
        )
        layer = RetrievalLayer(method)
        _fill(method, layer, keys, values, asked)
        work[label] = partial(_decode, layer, query, keys, values)
    for label, seconds in times(work, rounds=scale.pick(5, 2), inner=3).items():
        out.add(label, "attention of a decoded token", "s", seconds, against=None if label == "dense" else "dense")
    row = out.row(GRAPH, "attention of a decoded token")
    out.check(
        f"attention time of a decoded token at {context}, of dense", row.ratio or 0.0, at_most=0.5, spread=row.spread
    )


def _fill(method: RetrievalAttention, layer: RetrievalLayer, keys: Tensor, values: Tensor, asked: Tensor) -> None:
    """The state after a prompt of these keys, without attending over it: as `_attend_prompt` leaves it."""
    layer.update(keys, values)
    layer.take(AttentionCall(nn.Identity(), 0, asked[:, :, -1:], keys, values, cache=layer))
    layer.near.append(keys, values)
    layer._remember(asked)
    layer._send_away(layer.near.length - method.recent)


def _decode(layer: RetrievalLayer, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return layer._attend_few(*_step(layer, query, keys, values))


def _step(layer: RetrievalLayer, query: Tensor, keys: Tensor, values: Tensor) -> tuple[AttentionCall, Tensor, Tensor]:
    new = (keys[:, :, :1], values[:, :, :1])
    layer.update(*new)
    call = AttentionCall(nn.Identity(), 0, query, *new, cache=layer)
    layer.take(call)
    return call, *new
