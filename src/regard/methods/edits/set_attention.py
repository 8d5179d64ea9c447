"""Deciding for single heads what the last token looks at.

The intervention of Merullo et al. 2023, "Circuit Component Reuse Across Tasks in Transformer Language Models" (ICLR 2024, arXiv
2310.08744): heads that inhibit wrong answers in one task, but look elsewhere in another, are made to look at the wrong answers there,
which repairs the other task. Their code (jmerullo/circuit_reuse) does not hold this experiment; how the weight is split over several
tokens is our reading: alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._checks import bad_type, bad_value, require, require_fraction, require_name
from ..call import AttentionCall, Method
from .zero_tuning import check_layers

__all__ = ["SetAttention"]

Target = str | Tensor


@dataclass
class SetAttention(Method):
    """Replace the attention weights of chosen heads in the last row, or a part of them.

        repair = SetAttention({(19, 1): "distractors", (20, 4): "distractors"})
        with regard.attach(model, repair, spans=batch.spans):
            model(**batch.clean)

    Args:
        targets: (layer, head) -> what it is to look at: the name of a span given to `attach(spans=...)`, whose tokens get the same weight
            each; or weights (B, M) or (M,) over the prompt's tokens, >= 0, normalised here. Layers may be negative, from the end. A row
            of the batch whose span is empty stays as it is.
        strength: share of the head's attention that goes there; the rest stays as it was. 0 changes nothing.
        phase: "prompt": the last token of the prompt only. "all": each decoded token too.

    Weights on keys that the model's mask forbids are not refused: a span belongs to the prompt, which the last token sees.
    """

    targets: Mapping[tuple[int, int], Target]
    strength: float = 1.0
    phase: str = "prompt"

    def __post_init__(self) -> None:
        require_fraction("strength", self.strength)
        require_name("phase", self.phase, ("prompt", "all"))
        if not isinstance(self.targets, Mapping):
            raise bad_type("targets", self.targets, "a mapping (layer, head) -> span name or weights")
        self._table: dict[int, list[int]] = {}
        for pair, target in self.targets.items():
            fits = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
            require(fits, "targets", pair, "(layer, head) pairs")
            if isinstance(target, Tensor):
                fits = target.dim() in (1, 2) and bool((target >= 0).all()) and bool((target.sum(-1) > 0).all())
                require(
                    fits, "targets", f"weights of shape {tuple(target.shape)}", "(M,) or (B, M), >= 0, some above 0"
                )
            elif not isinstance(target, str):
                raise bad_type("targets", target, "the name of a span, or a tensor of weights")
            self._table.setdefault(pair[0], []).append(pair[1])

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        if self.strength == 0 or (self.phase == "prompt" and call.phase == "decode"):
            return
        for layer in {call.layer, call.layer - call.num_layers}:
            for head in self._table.get(layer, ()):
                require(0 <= head < call.num_heads, "targets", (layer, head), f"heads in [0, {call.num_heads})")
                wanted = self._weights(call, self.targets[layer, head])
                call.on_weights(partial(self._put, wanted), heads=[head])

    def _weights(self, call: AttentionCall, target: Target) -> Tensor:
        """(B, M) weights, rows of zeros where there is nothing to look at."""
        if isinstance(target, str):
            if target not in call.spans:
                raise bad_value("targets", target, f"a span given to attach(spans=...), one of {sorted(call.spans)}")
            target = call.spans[target].float()
        else:
            target = target.to(call.q.device, torch.float32)
            target = target[None] if target.dim() == 1 else target
            require(
                target.shape[-1] <= call.kv_len,
                "targets",
                f"weights on {target.shape[-1]} tokens",
                f"at most {call.kv_len}",
            )
            target = torch.nn.functional.pad(target, (0, call.kv_len - target.shape[-1]))
        total = target.sum(-1, keepdim=True)
        rows = torch.where(total > 0, target / total.clamp(min=1e-30), 0.0)
        require(len(rows) in (1, call.batch), "targets", f"{len(rows)} rows", f"1 or {call.batch}, the batch")
        return rows.expand(call.batch, -1)

    def _put(self, wanted: Tensor, weights: Tensor) -> Tensor:
        out = weights.clone()
        mixed = (1 - self.strength) * weights[:, :, -1] + self.strength * wanted[:, None].to(weights.dtype)
        out[:, :, -1] = torch.where(wanted.sum(-1)[:, None, None] > 0, mixed, weights[:, :, -1])
        return out
