"""`record`: one forward of a model, keeping what is needed to say what every head looked at, and no N x M matrix before it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_name
from ..integrations.session import Session
from ..integrations.transformers import attach, session_of
from ..methods.call import AttentionCall

KEEP = ("qk", "qkv")
_BLOCK = 64 << 20  # bytes
Key = tuple[str, str, int]


class Record:
    """What a model looked at in one forward.

    Attributes:
        tokens: the input ids (B, N) on the CPU, or None (images, audio).
        logits: the model's logits, with `logits=True`; else None.
        tower: the part of the model that `layer` numbers speak of unless another is named.
        calls: (tower, kind, layer) -> the kept `AttentionCall`, restricted to the wanted heads.

    Weights are made on demand, for what is looked at alone: `weights(layer, heads, rows)`.
    """

    def __init__(self, tower: str, heads: list[int] | None) -> None:
        self.tower = tower
        self.tokens: Tensor | None = None
        self.logits: Tensor | None = None
        self.calls: dict[Key, AttentionCall] = {}
        self._heads = heads
        self._num_heads: dict[Key, int] = {}

    def __repr__(self) -> str:
        shape = None if self.tokens is None else tuple(self.tokens.shape)
        return f"<Record of {len(self.calls)} attention layers, tokens {shape}>"

    @property
    def layers(self) -> list[int]:
        """The recorded self-attention layers of `tower`, ascending."""
        return self.layers_of()

    def layers_of(self, kind: str = "self", tower: str | None = None) -> list[int]:
        """The recorded layers of one kind ("self", "cross") and tower, ascending."""
        return sorted(layer for t, k, layer in self.calls if (t, k) == (tower or self.tower, kind))

    @property
    def num_heads(self) -> int:
        """Query heads of the model in each layer of `tower` (recorded or not)."""
        return next(number for (t, _, _), number in self._num_heads.items() if t == self.tower)

    def heads(self, layer: int, kind: str = "self", tower: str | None = None) -> list[int]:
        """The query heads that were recorded in a layer, by their number in the model."""
        key = self._key(layer, kind, tower)
        return list(range(self._num_heads[key])) if self._heads is None else self._heads

    def call(self, layer: int, kind: str = "self", tower: str | None = None) -> AttentionCall:
        """The kept call of a layer: `q (B, h, N, D)` and `k (B, h or Hkv, M, D)` after rotary embedding, mask, scale and the rest."""
        return self.calls[self._key(layer, kind, tower)]

    def q(self, layer: int, kind: str = "self", tower: str | None = None) -> Tensor:
        """Queries of the recorded heads, (B, h, N, D), after rotary embedding, in the model's dtype."""
        return self.call(layer, kind, tower).q

    def k(self, layer: int, kind: str = "self", tower: str | None = None) -> Tensor:
        """Keys, after rotary embedding: (B, Hkv, M, D), or (B, h, M, D), one for each recorded head, where only some heads were."""
        return self.call(layer, kind, tower).k

    def weights(
        self,
        layer: int,
        heads: int | Sequence[int] | None = None,
        rows: int | slice | Sequence[int] | Tensor | None = None,
        *,
        kind: str = "self",
        tower: str | None = None,
    ) -> Tensor:
        """Attention weights, float32 (float64 stays), made now: (B, len(heads), len(rows), M).

        Args:
            layer: layer number; negative counts from the last recorded one.
            heads: query head(s), by their number in the model; None = all recorded.
            rows: query row(s); negative from the end; None = all.
            kind: "self" or "cross". tower: "text", "vision", "encoder", ...; None = the record's main tower.

        Raises:
            ValueError: what was not recorded, or is out of range.
        """
        call, recorded = self.call(layer, kind, tower), self.heads(layer, kind, tower)
        wanted = recorded if heads is None else [heads] if isinstance(heads, int) else [int(head) for head in heads]
        missing = [head for head in wanted if head not in recorded]
        require(not missing, "heads", missing, f"recorded heads, {recorded}")
        if isinstance(rows, int):
            rows = [rows]
        numbers = [recorded.index(head) for head in wanted]
        weights = call.weights(sorted(set(numbers)), rows)
        order = [sorted(set(numbers)).index(number) for number in numbers]
        return weights if order == list(range(weights.shape[1])) else weights[:, order]

    def _key(self, layer: int, kind: str, tower: str | None) -> Key:
        require_name("kind", kind, ("self", "cross"))
        tower = self.tower if tower is None else require_name("tower", tower, {t for t, _, _ in self.calls})
        known = self.layers_of(kind, tower)
        if layer < 0 and known:
            layer += known[-1] + 1
        if layer not in known:
            raise bad_value(
                "layer", layer, f"one of the recorded {kind}-attention layers of the {tower} tower, {known}"
            )
        return tower, kind, layer


@torch.no_grad()
def record(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    keep: str = "qk",
    *,
    towers: Iterable[str] | None = None,
    logits: bool = False,
) -> Record:
    """Run one forward and keep the queries and keys of the wanted layers and heads.

    What is attached to the model at the time takes part, and its masks, biases and score mods are in the weights.

    Args:
        model: a transformers model that `attach` can join.
        inputs: keyword arguments of its forward (a tokenizer's output, say), or input ids (B, N).
        layers: layer numbers to keep, negative from the end; None = all.
        heads: query heads to keep; None = all.
        keep: "qk", or "qkv" to keep the values too.
        towers: "text", "vision", "encoder", "decoder", ...; None = all, or the main one alone where `heads` are named.
        logits: keep the model's logits, (B, N, vocabulary). Without, a language model is not asked for more than the last row.

    Returns:
        a `Record`. Memory: q and k of what was asked for, 4 * tokens * (H + Hkv) * head_dim bytes a layer in float32. Of a layer
        that runs several times in a forward (weights shared by depth, images one by one) the last run is kept.

    Raises:
        ValueError: layers or heads that the model does not have, or a model that cannot be joined. TypeError: `inputs` of another kind.
    """
    if not isinstance(inputs, (Mapping, Tensor)):
        raise bad_type("inputs", inputs, "a mapping of forward arguments, or a tensor of input ids (B, N)")
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    require_name("keep", keep, KEEP)
    wanted_layers = None if layers is None else set(layers)
    wanted_heads = None if heads is None else sorted(set(heads))
    session = session_of(model)
    passing = session is None
    session = attach(model) if session is None else session
    wanted_towers = set(towers) if towers is not None else {session.main_tower} if wanted_heads is not None else None
    made, shelf = Record(session.main_tower, wanted_heads), _Shelf()

    def observe(call: AttentionCall) -> None:
        if wanted_towers is not None and call.tower not in wanted_towers:
            return
        if wanted_layers is not None and not {call.layer, call.layer - call.num_layers} & wanted_layers:
            return
        key = (call.tower, call.kind, call.layer)
        made._num_heads[key] = call.num_heads
        made.calls[key] = _kept(call, wanted_heads, keep == "qkv", shelf)

    session.observers.append(observe)
    try:
        output = model(**_thrifty(session, given, logits))
    finally:
        session.observers.remove(observe)
        if passing:
            session.detach()
    ids = given.get("input_ids")
    made.tokens = ids.detach().cpu() if isinstance(ids, Tensor) else None
    made.logits = getattr(output, "logits", None) if logits else None
    if not made.calls:
        raise bad_value(
            "layers",
            sorted(wanted_layers or []),
            f"layers of the model: it has {session.num_layers} in its {made.tower} tower",
        )
    return made


class _Shelf:
    """Puts tensors side by side in large blocks. Kept where they are, among the activations that a forward makes and frees, they
    would keep the pages around them alive too: a fifth of a gigabyte for 4k tokens of a 135M model."""

    def __init__(self) -> None:
        self.block = torch.empty(0)
        self.used = 0

    def put(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cpu":
            return tensor
        if tensor.dtype != self.block.dtype or self.used + tensor.numel() > self.block.numel():
            size = max(tensor.numel(), _BLOCK // tensor.element_size())
            self.block, self.used = torch.empty(size, dtype=tensor.dtype), 0
        place = self.block[self.used : self.used + tensor.numel()].view(tensor.shape)
        self.used += tensor.numel()
        return place.copy_(tensor)


def _kept(call: AttentionCall, heads: list[int] | None, with_values: bool, shelf: _Shelf) -> AttentionCall:
    """What the weights can be made from again: the call for the wanted heads, without cache and session."""
    kept = replace(call, num_seen=call.seen, cache=None, session=None, dropout=0.0, weight_edits=[], output_edits=[])
    if heads is not None:
        kept = kept.narrowed(heads)
    kept.q, kept.k, kept.biases = shelf.put(kept.q), shelf.put(kept.k), [bias.detach() for bias in kept.biases]
    kept.v = shelf.put(kept.v) if with_values else kept.v.new_empty(*kept.v.shape[:2], 0, kept.v.shape[3])
    return kept


def _thrifty(session: Session, given: dict[str, Any], logits: bool) -> dict[str, Any]:
    """Forward arguments that spare what nobody asked for: the cache, and the vocabulary-wide logits of every row."""
    known = inspect.signature(session.entry.forward).parameters
    if "use_cache" in known and session.claimant("cache") is None:
        given = {"use_cache": False} | given
    return {"logits_to_keep": 1} | given if "logits_to_keep" in known and not logits else given
