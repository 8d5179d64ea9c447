"""Gated softmax attention: each head's output is multiplied by a sigmoid of the token that asked.

Paper: "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free" (Qiu et al. 2025,
arXiv 2505.06708). Code read for numbers: qiuzh20/gated_attention @ 49645df (MIT), `modeling_qwen3.py`. That code has the gate after
attention (G1), headwise and elementwise; the paper's other places, the additive form, the activations and the shared and
input-independent gates are built from its text and were compared with no code of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_value, require, require_name
from .softmax_attention import SoftmaxAttention

__all__ = ["GatedAttention", "split_gated_query"]

PLACES = ("attention", "value", "key", "query", "output")
PAPER_NAMES = dict(zip(("G1", "G2", "G3", "G4", "G5"), PLACES))
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "half_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
}


def split_gated_query(tensor: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The authors' q_proj weight (R, dim) or bias (R,) -> (rows of the queries, rows of the gate).

    R is `num_heads * (head_dim + 1)` for a headwise gate, `2 * num_heads * head_dim` for an elementwise one. Their rows stand kv head
    by kv head, the queries of its group before the gates of its group, so the gate is not simply the last rows.
    """
    group = num_heads // num_kv_heads
    queries = group * head_dim
    known = (num_heads * (head_dim + 1), 2 * num_heads * head_dim)
    require(tensor.shape[0] in known, "tensor", f"shape {tuple(tensor.shape)}", f"{known[0]} or {known[1]} rows")
    grouped = tensor.unflatten(0, (num_kv_heads, -1))
    return grouped[:, :queries].flatten(0, 1), grouped[:, queries:].flatten(0, 1)


class GatedAttention(SoftmaxAttention):
    """Softmax attention with a gate: (B, N, dim) -> (B, N, dim).

    With the gate where the paper finds it best, `y = o_proj(sigmoid(gate_proj(x)) * attention(x))`.

    Args:
        dim, num_heads, causal, options (num_kv_heads, head_dim, window, rope_base, qk_norm, bias, dropout): as of `SoftmaxAttention`.
        gate: "elementwise", one factor a channel, "headwise", one a head, or None: plain attention.
        place: what is gated: "attention" (the heads' outputs; G1 of the paper), "value" (G2), "key" (G3), "query" (G4), each straight
            after its projection and so before `qk_norm`, or "output" (after the output projection; G5, elementwise only). The paper's
            names are taken too.
        combine: "multiply", or "add" the activation instead.
        activation: "sigmoid", "silu", or "half_sigmoid", which stays in [0.5, 1] and so can close nothing.
        shared: one gate for all heads. input_dependent: False makes the gate a learned constant, zero before the activation at first.
        norm_eps: of `qk_norm`.

    `qk_norm` undoes a headwise factor on keys or queries; that pair is refused where it multiplies. In decoding, gates need no state.
    `regard.load_official` takes the authors' `q_proj`, which holds queries and gates together.

    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        gate: str | None = "elementwise",
        place: str = "attention",
        combine: str = "multiply",
        activation: str = "sigmoid",
        shared: bool = False,
        input_dependent: bool = True,
        norm_eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **options)
        self.gate = gate if gate is None else require_name("gate", gate, ("elementwise", "headwise"))
        self.place = require_name("place", PAPER_NAMES.get(place, place), PLACES)
        self.combine = require_name("combine", combine, ("multiply", "add"))
        self.activation = require_name("activation", activation, ACTIVATIONS)
        need = "'elementwise', not shared, at place 'output', where heads are mixed"
        whole = gate != "headwise" and not shared
        require(self.place != "output" or whole, "gate, shared", (gate, shared), need)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.eps = norm_eps
                undone = gate == "headwise" and combine == "multiply" and self.place in ("key", "query")
                require(not undone, "gate", gate, f"'elementwise' or no qk_norm at place {self.place!r}")
        heads = {"attention": num_heads, "query": num_heads}.get(self.place, self.num_kv_heads)
        self.gate_heads = 1 if shared else heads
        width = dim if self.place == "output" else self.gate_heads * (1 if gate == "headwise" else self.head_dim)
        projected, constant = gate is not None and input_dependent, gate is not None and not input_dependent
        self.gate_proj = nn.Linear(dim, width, bias=options.get("bias", False)) if projected else None
        self.gate_logits = nn.Parameter(torch.zeros(width)) if constant else None

    def gates(self, x: Tensor) -> Tensor:
        """The gates of x (B, N, dim): (B, H or Hkv or 1, N, head_dim or 1), at place "output" (B, N, dim)."""
        if self.gate_proj is not None:
            logits = self.gate_proj(x)
        elif self.gate_logits is not None:
            logits = self.gate_logits.expand(*x.shape[:2], -1)
        else:
            raise bad_value("gate", None, "a layer with a gate")
        if self.place != "output":
            logits = rearrange(logits, "b n (h d) -> b h n d", h=self.gate_heads)
        return ACTIVATIONS[self.activation](logits)

    def _gated(self, place: str, value: Tensor, x: Tensor) -> Tensor:
        if place != self.place or self.gate is None:
            return value
        return value * self.gates(x) if self.combine == "multiply" else value + self.gates(x)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(x)
        return self._gated("query", q, x), self._gated("key", k, x), self._gated("value", v, x)

    def _combine(self, out: Tensor, x: Tensor) -> Tensor:
        return self._gated("output", super()._combine(self._gated("attention", out, x), x), x)

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The authors' `Qwen3Attention`: their q_proj is taken apart; a state dict with `gate_proj` or `gate_logits` is ours already."""
        if self.gate_proj is None or any(name.startswith("gate_proj.") for name in state):
            return dict(state)
        ours = dict(state)
        for kind in ("weight", "bias"):
            if f"q_proj.{kind}" in state:
                parts = split_gated_query(state[f"q_proj.{kind}"], self.num_heads, self.num_kv_heads, self.head_dim)
                ours[f"q_proj.{kind}"], ours[f"gate_proj.{kind}"] = parts
        return ours

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate={self.gate!r}, place={self.place!r}, combine={self.combine!r}"
