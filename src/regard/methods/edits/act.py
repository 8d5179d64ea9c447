"""ACT: attention calibration at inference, for chosen heads.

Paper: Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration" (ICML 2024, arXiv 2406.15765). Authors' code, read for numbers: GATECH-EIC/ACT (`models/llama_modelling_aug.py`).

The arithmetic, and what differs from the authors' code, are in `ops/sink_calibration.py`. Which heads gain is found by trying them one by
one on labelled prompts: `regard.lens.search_heads(model, lambda heads: regard.ACT(heads), measure)`, then those with a gain above 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import require, require_fraction, require_name
from ...ops.sink_calibration import calibrate_sinks
from ..call import AttentionCall, Method
from .zero_tuning import check_layers, heads_by_layer

__all__ = ["ACT"]


@dataclass
class ACT(Method):
    """Take weight from all attention sinks of the chosen heads but the first, and give it to what else the row looks at.

        gains = regard.lens.search_heads(model, lambda heads: regard.ACT(heads), measure, layers=range(2, 28))
        with regard.attach(model, regard.ACT(gains.above(0.0))):
            model(**inputs)

    Args:
        heads: (layer, head) pairs, or {layer: head numbers}; layers may be negative, from the end. Weights are made for these alone.
        beta: share of its weight that a sink keeps; 0.4 in the authors' scripts, 1 changes nothing.
        threshold: mean weight above which a key is a sink (0.1). relative: it is divided by the number of keys (the paper's alpha / N,
            alpha = 5).
        phase: "all", or "prefill" to leave decode steps alone: there a "sink" is whatever the one query weighs above the threshold.
        variant: "paper" (default) or "released". In a decode step the released code makes the row sum to more than 1; no published
            figure of theirs decodes more than one token, and a user's text would, so the default is not it.
    """

    heads: Any
    beta: float = 0.4
    threshold: float = 0.1
    relative: bool = False
    phase: str = "all"
    variant: str = "paper"

    def __post_init__(self) -> None:
        require_fraction("beta", self.beta)
        require(self.threshold >= 0, "threshold", self.threshold, "a number >= 0")
        require_name("phase", self.phase, ("all", "prefill"))
        require_name("variant", self.variant, ("paper", "released"))
        table = heads_by_layer(self.heads)
        require(
            table is not None or (self.heads is not None and not list(self.heads)),
            "heads",
            self.heads,
            "(layer, head) pairs or {layer: head numbers}",
        )
        self._table = table or {}

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        heads = sorted({*self._table.get(call.layer, ()), *self._table.get(call.layer - call.num_layers, ())})
        if not heads or (self.phase == "prefill" and call.phase == "decode"):
            return
        require(heads[0] >= 0 and heads[-1] < call.num_heads, "heads", heads, f"head numbers in [0, {call.num_heads})")
        call.on_weights(lambda weights: self._calibrated(weights, call, heads), heads)

    def _calibrated(self, weights: Tensor, call: AttentionCall, heads: list[int]) -> Tensor:
        return calibrate_sinks(
            weights,
            self.beta,
            self.threshold,
            relative=self.relative,
            visible=_visible(call, heads),
            variant=self.variant,
        )


def _visible(call: AttentionCall, heads: list[int]) -> Tensor | None:
    """Which query counts for which key, bool (B|1, h|1, N, M): padding rows and keys do not. None: plainly causal."""
    mask = call.full_mask()
    if mask is None:
        return torch.ones(call.q_len, call.kv_len, dtype=torch.bool, device=call.q.device)
    if not isinstance(mask, Tensor):
        table = mask.materialize(
            call.q_len,
            call.kv_len,
            batch=call.batch,
            num_heads=call.num_heads,
            q_offset=call.q_offset,
            device=call.q.device,
        )
    else:
        table = mask[(None,) * (4 - mask.dim())]
    if table.shape[1] > 1:
        table = table[:, heads]
    real = getattr(call.mask, "padding", None)
    if real is not None:
        rows = real[:, call.position : call.position + call.q_len].bool()
        table = table & rows[:, None, :, None]
    return table
