"""Attaching a head or layer plan: its masks where a prompt is read or a model is trained, its caches where text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type
from ...ops import masks
from ...ops.masks import Mask
from ..call import AttentionCall, Method
from ..plans import Full, HeadPlan, Rule
from .layers import require_causal, text_config, windowed

_KEPT_MASKS = 64


@dataclass
class PlannedMethod(Method):
    """Base of methods whose heads follow rules of `regard.methods.plans`. A subclass says which: `rules_of(layer, ...)`.

    It claims the seams mask, cache and attend. Without a cache (scoring, training) the rules are masks and gradients flow; in
    `generate` each head's cache keeps what its rule will ever need, and decoding reads that alone. Positions count from each row's
    first real token. Layers whose own sliding window is shorter than the context are left as they are.
    """

    _masks: dict[tuple[Rule, ...], Mask | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def rules_of(self, layer: int, num_layers: int, num_heads: int, num_kv_heads: int) -> Sequence[Rule]:
        """The rules of a layer, one a query head, not settled."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        self.cache(model)  # says why, where it cannot
        config = text_config(model)
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        for layer in range(config.num_hidden_layers):
            self.rules_of(layer, config.num_hidden_layers, heads, kv)

    def applies(self, call: AttentionCall) -> bool:
        return super().applies(call) and not windowed(call)

    def cache(self, model: nn.Module) -> Any:
        from ..caches.decoder import ragged_layers
        from ..caches.planned import PlannedLayer

        layers = text_config(model).num_hidden_layers

        def make(layer: int) -> PlannedLayer:
            return PlannedLayer(lambda seen, heads, kv: self.rules_of(layer, layers, heads, kv))

        return ragged_layers(model, make, type(self).__name__)

    def mask(self, call: AttentionCall) -> Mask | None:
        if call.cache is not None and call.position > 0 and is_planned(call.cache):
            return None  # the cache itself knows
        rules = self.rules_of(call.layer, call.num_layers, call.num_heads, call.num_kv_heads)
        if call.mask is None or not bool(call.start.any()):
            return self._kept_mask(tuple(rule.at(call.seen) for rule in rules))
        # each row's rules are those of its own length, whatever it is batched with
        lengths, number = (call.seen - call.start).clamp(min=0).unique(return_inverse=True)
        settled = [tuple(rule.at(length) for rule in rules) for length in lengths.tolist()]
        kinds = list(dict.fromkeys(settled))
        made = [self._kept_mask(kind) for kind in kinds]
        if len(kinds) == 1:
            return None if made[0] is None else masks.shifted(made[0], call.start)
        which = torch.tensor([kinds.index(kind) for kind in settled], device=number.device)[number]
        return masks.shifted(masks.per_row([mask or masks.everything for mask in made], which), call.start)

    def _kept_mask(self, rules: tuple[Rule, ...]) -> Mask | None:
        if rules not in self._masks:
            if len(self._masks) >= _KEPT_MASKS:
                self._masks.clear()
            self._masks[rules] = self.mask_of(rules)
        return self._masks[rules]

    def mask_of(self, rules: tuple[Rule, ...]) -> Mask | None:
        """The mask of a layer's settled rules, one a query head; None = everything."""
        if all(isinstance(rule, Full) for rule in rules):
            return None
        known = {rule: rule.mask() or masks.everything for rule in rules}
        return known[rules[0]] if len(known) == 1 else masks.per_head([known[rule] for rule in rules])

    def attend(self, call: AttentionCall) -> Tensor | None:
        return call.cache.attend(call) if call.cache is not None and is_planned(call.cache) else None


def is_planned(cache: Any) -> bool:
    """Whether a cache layer keeps what the rules of a plan say."""
    from ..caches.planned import PlannedLayer

    return isinstance(cache, PlannedLayer)


@dataclass
class PlannedAttention(PlannedMethod):
    """Any head or layer plan, attached.

    Args:
        plan: a `regard.methods.HeadPlan`, or the path of one (ours, or one published by MoA's authors).

    Raises (from `attach`): `ValueError` when the plan has other layers or heads than the model; `UnsupportedModelError` for models
    without causal self-attention or a decoder cache.
    """

    plan: HeadPlan | str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.plan, (str, Path)):
            self.plan = HeadPlan.load(self.plan)
        if not isinstance(self.plan, HeadPlan):
            raise bad_type("plan", self.plan, "a HeadPlan, or the path of one")

    def rules_of(self, layer: int, num_layers: int, num_heads: int, num_kv_heads: int) -> Sequence[Rule]:
        assert isinstance(self.plan, HeadPlan)
        if len(self.plan) != num_layers:
            self.plan.check(num_layers, num_heads, num_kv_heads)
        return self.plan.rules(layer, num_heads, num_kv_heads)
