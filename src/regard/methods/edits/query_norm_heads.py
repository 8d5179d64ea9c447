"""Fewer heads in a pretrained model: each token keeps those whose queries are longest, as in MoH-LLaMA3.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842); code read for numbers: SkyworkAI/MoH @ 2cefd57,
`MoH-LLaMA3/Inference_code/modeling_llama.py`; the rule is `regard.ops.query_norm_routing`. What differs: any number of shared heads; heads
that are off can be left out; queries are taken after the rotation, which keeps lengths. The paper tunes the model on (gradients pass
`straight_through` in `regard.nn.QueryNormHeadAttention`); attached to a model as it is, the method costs quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..._checks import bad_type, require
from ...ops import masks
from ...ops.head_routing import HeadRouting, query_norm_routing, selected_rows_attention
from ..call import AttentionCall, Method

__all__ = ["QueryNormHeads"]


@dataclass
class QueryNormHeads(Method):
    """Of each token, all but `active` heads give zero; the first `shared` are always on.

    Args:
        shared, active: heads, as an int or as a share of the layer's heads; `active` includes the shared ones. Defaults: MoH-LLaMA3.
        skip: compute the attention of the heads in use alone, where the call has no mask, bias or sink of its own (long prompts without
            padding); the same numbers up to rounding.
        layers: layer numbers, negative from the end; None: all.
    """

    shared: int | float = 0.5
    active: int | float = 0.75
    skip: bool = False
    layers: Any = None

    def __post_init__(self) -> None:
        for name, value in (("shared", self.shared), ("active", self.active)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise bad_type(name, value, "a number of heads, or a share of them in [0, 1]")
            fits = value >= 0 if isinstance(value, int) else 0.0 <= value <= 1.0
            require(fits, name, value, "a number of heads >= 0, or a share of them in [0, 1]")

    def seams(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("attend", "edit") if self.skip else ("edit",)

    def routing(self, call: AttentionCall) -> HeadRouting:
        """Which heads the tokens of this call use."""
        heads = call.num_heads
        shared, active = (round(n * heads) if isinstance(n, float) else n for n in (self.shared, self.active))
        fits = shared <= active <= heads and (active > shared or shared == heads)
        require(fits, "shared, active", (shared, active), f"shared < active <= {heads} heads, or all shared")
        return query_norm_routing(self._queries(call), shared=shared, active=active)

    def _queries(self, call: AttentionCall) -> Tensor:
        return call.q

    def attend(self, call: AttentionCall) -> Tensor | None:
        own = (call.mask, call.soft_cap, call.sinks, call.extra_mask, call.score_mod, call.selection)
        if any(one is not None for one in own) or call.biases or call.weight_edits:
            return None
        if call.window is not None and call.window < call.kv_len:
            return None
        mask = masks.causal if call.causal and call.q_len > 1 else None
        routing = self.routing(call)
        shared = round(self.shared * call.num_heads) if isinstance(self.shared, float) else self.shared
        return selected_rows_attention(
            call.q, call.k, call.v, routing.selected, shared=shared, mask=mask, scale=call.scale, dropout=call.dropout
        )

    def edit(self, call: AttentionCall) -> None:
        gates = self.routing(call).gates.unsqueeze(-1)
        call.on_output(lambda out: out * gates.to(out.dtype))
