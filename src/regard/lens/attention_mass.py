"""How much attention goes from one span of a prompt to another, head by head: tables of it, and a picture.

A span's mass for one query is the sum of its weights on the span's keys; masses of disjoint spans add up to at most 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_name, require_tensor
from ..integrations.spans import SpannedPrompt
from .head_scores import HeadScores
from .record import Record, record

__all__ = ["SpanMass", "row_mass", "span_mass"]

_ROWS = 256
Spans = Mapping[str, Tensor]


def row_mass(
    made: Record,
    layer: int,
    keys: Tensor,
    *,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Attention mass on `keys` (bool (B, M)) of every query row, float32 (B, heads, rows); weights are made a few rows at a time."""
    length = made.q(layer).shape[2]
    where = _fitted("keys", keys, made, layer).to(made.q(layer).device)
    numbers = torch.arange(length) if rows is None else torch.as_tensor(rows, dtype=torch.long).reshape(-1)
    parts = [
        (made.weights(layer, heads, numbers[i : i + _ROWS]) * where[:, None, None]).sum(-1)
        for i in range(0, len(numbers), _ROWS)
    ]
    require(bool(parts), "rows", "none", "at least one query row")
    return torch.cat(parts, dim=2)


@dataclass(eq=False)
class SpanMass:
    """Mean attention mass between spans.

    Attributes:
        mass: float32 (B, L, H, Q, K): of the queries of span Q, mean over its rows, on the keys of span K. NaN where a row of the
            batch has no query in Q.
        queries, keys: names of the spans, in that order. layers: the layer numbers.
    """

    mass: Tensor
    queries: list[str]
    keys: list[str]
    layers: list[int]

    def mean(self) -> Tensor:
        """(Q, K): mean over batch, layers and heads."""
        return self.mass.nanmean((0, 1, 2))

    def between(self, query: str, key: str) -> HeadScores:
        """Mass from one span to another, head by head."""
        q = self.queries.index(require_name("query", query, self.queries))
        k = self.keys.index(require_name("key", key, self.keys))
        info = {"from": query, "to": key, "layers": self.layers}
        return HeadScores(self.mass[..., q, k].nanmean(0), name=f"mass from {query} to {key}", info=info)

    def table(self, layer: int | None = None, head: int | None = None) -> dict[str, dict[str, float]]:
        """query span -> key span -> mass; of one layer (its number) or head, or the mean over all."""
        mass = self.mass
        if layer is not None:
            require(layer in self.layers, "layer", layer, f"one of {self.layers}")
            at = self.layers.index(layer)
            mass = mass[:, at : at + 1]
        if head is not None:
            require(0 <= head < mass.shape[2], "head", head, f"a head number below {mass.shape[2]}")
            mass = mass[:, :, head : head + 1]
        values = mass.nanmean((0, 1, 2))
        return {q: {k: float(values[i, j]) for j, k in enumerate(self.keys)} for i, q in enumerate(self.queries)}

    def __str__(self) -> str:
        """The mean table as text."""
        wide = max(9, *(len(name) for name in [*self.queries, *self.keys])) + 2
        lines = ["from \\ to".ljust(wide) + "".join(name.rjust(wide) for name in self.keys)]
        for query, row in self.table().items():
            lines.append(query.ljust(wide) + "".join(f"{value:.3f}".rjust(wide) for value in row.values()))
        return "\n".join(lines)

    def plot(self, path: str | Path, query: str | None = None) -> Path:
        """Draw, for one query span (None = the last), a heat map of heads and layers for every key span; written to `path`."""
        from .head_plot import plot_scores

        query = self.queries[-1] if query is None else query
        return plot_scores(
            {key: self.between(query, key) for key in self.keys}, path, title=f"attention from {query} to ..."
        )


@torch.no_grad()
def span_mass(
    model: nn.Module | Record,
    prompt: SpannedPrompt | Mapping[str, Any] | Tensor | None = None,
    spans: Spans | None = None,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> SpanMass:
    """Mean attention mass from the queries of spans to the keys of spans.

        prompt = regard.chat_spans(tokenizer, messages)
        print(regard.lens.span_mass(model, prompt))

    Args:
        model: a model (one forward is made, with whatever is attached to it), or a `Record` of one.
        prompt: what `chat_spans` or `text_spans` gave, or forward arguments. spans: name -> bool (B, T); None = those of the prompt.
        queries, keys: names of the spans to ask from and to; None = all. `queries=["last"]` is the last real token of each row.
        layers: layer numbers; None = all that there are (or that were recorded).

    Raises:
        ValueError: no spans, a name that is none of them, spans of another length than the prompt.
    """
    if spans is None:
        if not isinstance(prompt, SpannedPrompt):
            raise bad_type(
                "spans", spans, "name -> bool (B, T), or a prompt of chat_spans or text_spans that holds them"
            )
        spans = prompt.spans
    require(bool(spans), "spans", "none", "at least one span")
    if isinstance(model, Record):
        made = model
        wanted = made.layers if layers is None else list(layers)
    else:
        if prompt is None:
            raise bad_type("prompt", prompt, "a prompt, or forward arguments")
        made = record(model, _forward_arguments(model, prompt), layers=layers)
        wanted = made.layers
    require(bool(wanted), "layers", layers, f"some of {made.layers}")
    every = dict(spans)
    asked = list(every) if queries is None else list(queries)
    if "last" in asked and "last" not in every:
        every["last"] = _last(made, wanted[0])
    told = list(spans) if keys is None else list(keys)
    for name in asked:
        require_name("queries", name, every)
    for name in told:
        require_name("keys", name, every)
    per_layer = []
    for layer in wanted:
        at = torch.stack([_fitted(f"spans[{name!r}]", every[name], made, layer) for name in asked])
        to = torch.stack([_fitted(f"spans[{name!r}]", every[name], made, layer) for name in told])
        per_layer.append(_layer_mass(made, layer, at, to))
    return SpanMass(torch.stack(per_layer, dim=1), asked, told, list(wanted))


def _layer_mass(made: Record, layer: int, at: Tensor, to: Tensor) -> Tensor:
    """(B, H, Q, K) of one layer; at, to: bool (spans, B, N)."""
    device = made.q(layer).device
    at, to = at.to(device).float(), to.to(device).float()
    rows = at.amax((0, 1)).nonzero()[:, 0]  # no weights for rows that nobody asks about
    total: Tensor | None = None
    for part in _chunks(rows):
        weights = made.weights(layer, rows=part)
        mass = torch.einsum("bhnm,kbm->bhnk", weights, to.to(weights.dtype))
        found = torch.einsum("bhnk,qbn->bhqk", mass, at[:, :, part].to(weights.dtype))
        total = found if total is None else total + found
    require(total is not None, "queries", "no query row", "a span with at least one token")
    assert total is not None
    count = at.sum(-1).T[:, None, :, None].to(total.dtype)
    return (total / torch.where(count > 0, count, torch.nan)).float().cpu()


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), require_int("rows", _ROWS, 1)):
        yield rows[start : start + _ROWS]


def _fitted(name: str, span: Tensor, made: Record, layer: int) -> Tensor:
    require_tensor(name, span, dims=2)
    require(span.dtype == torch.bool, name, span.dtype, "a bool tensor (B, T)")
    batch, length = made.q(layer).shape[0], made.k(layer).shape[2]
    fits = span.shape[1] == length and batch % span.shape[0] == 0
    require(fits, name, f"shape {tuple(span.shape)}", f"(B, T) = {(batch, length)}")
    return span.cpu().repeat_interleave(batch // span.shape[0], dim=0)


def _last(made: Record, layer: int) -> Tensor:
    """The last real token of each row: padding is seen by no later query, the last token at least by itself."""
    call = made.call(layer)
    batch, length = made.q(layer).shape[0], made.k(layer).shape[2]
    real = None if call.mask is None else getattr(call.mask, "padding", None)
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real.cpu().expand(batch, -1)
    place = length - 1 - real.flip(1).to(torch.uint8).argmax(1)
    return torch.arange(length) == place[:, None]


def _forward_arguments(model: nn.Module, prompt: Any) -> Any:
    given = prompt.inputs if isinstance(prompt, SpannedPrompt) else prompt
    device = next(model.parameters()).device
    if isinstance(given, Tensor):
        return given.to(device)
    if not isinstance(given, Mapping):
        raise bad_type("prompt", given, "a prompt of chat_spans or text_spans, forward arguments, or ids (B, T)")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
