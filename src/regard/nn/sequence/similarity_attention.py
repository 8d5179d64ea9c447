"""Attention layers of the attention-sink study: other similarities and normalisers, kernels, and keys and values that no token stands for.

When Attention Sink Emerges in Language Models: An Empirical View (Gu et al. 2024, ICLR 2025, arXiv 2410.10781); code read for numbers:
sail-sg/Attention-Sink @ af49727 (MIT), `lit_gpt/inference/model_{attn_sim,attn_kernel,kv_bias,window,prefix}_infer.py`. The metric is in
`regard.lens.sink_rate`.

What differs: decoding with a state; the attention weights of a layer leave out the row of a dummy query that the authors put before the
first token for the slot's sake; several slots; a slot that is one learned score a head (`slot="score"`), as gpt-oss has it, and the
normaliser "sum+1", which are not in the authors' code. Their masks of 0 and 1 are built in bfloat16, here they are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_name
from ...ops import masks
from ...ops.similarity import EPS, NORMALIZERS, SIMILARITIES, similarity_attention, similarity_weights
from ...ops.state.feature_maps import FeatureMap, resolve
from ..layers import split_grouped_qkv
from .softmax_attention import SoftmaxAttention

__all__ = ["SimilarityAttention"]

SLOTS = ("kv", "k", "score")
MLP = "mlp"


class SimilarityAttention(SoftmaxAttention):
    """Attention whose weights are `f(q k / sqrt(d))`, divided by a normaliser of choice: (B, N, dim) -> (B, N, dim).

    With its defaults it is `SoftmaxAttention`.

    Args:
        dim, num_heads, causal, options (num_kv_heads, head_dim, window, rope_base, qk_norm, bias, dropout): as of `SoftmaxAttention`.
        similarity: f: "exp", "sigmoid", "elu+1". Left out with a kernel.
        kernel: weights phi(q) phi(k) / sqrt(d) instead, phi after the rotation: "identity", "mlp" (two linear maps with a ReLU
            between, head_dim wide, the same for all heads, queries and keys), or a map of `regard.ops.linear_attention` ("elu+1", ...).
        normalize: "sum", "sum+1", "clamp" or "none", as in `regard.ops.similarity_attention`. Default "sum"; the authors' kernels of
            either sign ("identity", "mlp") want "clamp", which is their default here.
        slot: keys before the first token that every query sees, learned: "kv", key and value ("KV biases"); "k", a key whose value stays
            zero ("K biases"); "score", no key but a score, value zero. None: no slot.
        num_slots: how many. shared: the same for all heads.
        value_bias: a learned vector added to each head's output ("V biases"), the same for all heads with `shared`.
        prefix: the first tokens, this many, are seen by all (prefix LM). A first call with a state must bring them whole.

    `attention_weights(x, normalized=True, slots=False)`: who looks at whom, (B, H, N, N). normalized: divided by the sum of their
    magnitudes, as the study's metric takes them; False: as they meet the values, which need not sum to 1 and may be negative. slots:
    (B, H, N, S + N), the slots first; they share in the sum either way.

    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        similarity: str | None = None,
        kernel: str | None = None,
        normalize: str | None = None,
        slot: str | None = None,
        num_slots: int = 1,
        shared: bool = False,
        value_bias: bool = False,
        prefix: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **options)
        require(kernel is None or similarity is None, "similarity", similarity, "None beside a kernel")
        names = [name for name in SIMILARITIES if name != "linear"]
        self.similarity = "linear" if kernel else require_name("similarity", similarity or "exp", names)
        self.kernel = kernel
        if kernel is not None and kernel != MLP:
            resolve(kernel)
        usual = "clamp" if kernel in (MLP, "identity") else "sum"
        self.normalize = require_name("normalize", normalize or usual, NORMALIZERS)
        self.slot = slot if slot is None else require_name("slot", slot, SLOTS)
        felt = slot in (None, "kv") or self.normalize != "none"
        require(felt, "slot", slot, "'kv' without a normaliser: a slot without a value acts through that alone")
        count = require_int("num_slots", num_slots, 1)
        require(slot is not None or count == 1, "num_slots", num_slots, "1 without a slot")
        self.prefix = require_int("prefix", prefix, 0)
        require(causal or not prefix, "prefix", prefix, "0 where not causal")
        heads, size = 1 if shared else num_heads, self.head_dim
        bias = options.get("bias", False)
        self.kernel_mlp1 = nn.Linear(size, size, bias=bias) if kernel == MLP else None
        self.kernel_mlp2 = nn.Linear(size, size, bias=bias) if kernel == MLP else None
        self.slot_k = nn.Parameter(0.02 * torch.randn(heads, count, size)) if slot in ("kv", "k") else None
        self.slot_v = nn.Parameter(0.02 * torch.randn(heads, count, size)) if slot == "kv" else None
        self.slot_score = nn.Parameter(torch.zeros(heads, 1, count)) if slot == "score" else None
        self.value_bias = nn.Parameter(0.02 * torch.randn(heads, 1, size)) if value_bias else None

    def _map(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        of_queries, of_keys = self._maps()
        return of_queries(q), of_keys(k)

    def _maps(self) -> tuple[FeatureMap, FeatureMap]:
        first, second = self.kernel_mlp1, self.kernel_mlp2
        if first is not None and second is not None:
            return (lambda x: second(first(x).relu()),) * 2
        return resolve(self.kernel)

    def _mask(self) -> masks.Mask | None:
        mask = super()._mask()
        return mask | masks.prefix(self.prefix) if self.prefix and mask is not None else mask

    def _slots(self, q: Tensor) -> tuple[Tensor, Tensor | None] | None:
        if self.slot_score is not None:
            return self.slot_score[None], None
        if self.slot_k is None:
            return None
        keys = self._maps()[1](self.slot_k.to(q.dtype)[None])[0]
        return self.head_dim**-0.5 * (q @ keys.mT), self.slot_v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask | None, dropout: float) -> Tensor:
        out = similarity_attention(
            q, k, v, similarity=self.similarity, normalize=self.normalize, mask=mask, slots=self._slots(q), dropout=dropout,
            scale=self.head_dim**-0.5,
        )  # fmt: skip
        return out if self.value_bias is None else out + self.value_bias.to(out.dtype)

    def _weights(
        self, q: Tensor, k: Tensor, seen: Tensor | None, normalized: bool = True, slots: bool = False
    ) -> Tensor:
        weights = similarity_weights(
            q, k, similarity=self.similarity, normalize=self.normalize, mask=seen, slots=self._slots(q), scale=self.head_dim**-0.5,
            keep_slots=True,
        )  # fmt: skip
        if normalized and (self.similarity, self.normalize) != ("exp", "sum"):
            weights = weights.abs() / (weights.abs().sum(-1, keepdim=True) + EPS)
        return weights if slots else weights[..., weights.shape[-1] - k.shape[2] :]

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """lit-gpt's layer: `attn` (group by group: queries, key, value), `proj`, `k_bias` and `v_bias`; ours pass unchanged."""
        ours: dict[str, Tensor] = {}
        for name, tensor in state.items():
            head, _, kind = name.rpartition(".")
            if head == "attn":
                parts = split_grouped_qkv(tensor, self.num_heads, self.num_kv_heads, self.head_dim)
                ours |= {f"{side}_proj.{kind}": part for side, part in zip("qkv", parts)}
            elif head == "proj":
                ours[f"o_proj.{kind}"] = tensor
            elif name in ("k_bias", "v_bias"):
                where = "slot_k" if name == "k_bias" else "value_bias" if self.slot is None else "slot_v"
                ours[where] = tensor.reshape(-1, 1, tensor.shape[-1])
            else:
                ours[name] = tensor
        return ours

    def extra_repr(self) -> str:
        how = (
            f"similarity={self.similarity!r}, kernel={self.kernel!r}, normalize={self.normalize!r}, slot={self.slot!r}"
        )
        return f"{super().extra_repr()}, {how}"
