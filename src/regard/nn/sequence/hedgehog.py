"""Hedgehog: linear attention whose learned feature maps are spiky and monotone like the softmax.

The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (Zhang et al. 2024, ICLR, arXiv 2402.04347). The paper
has no repository; code read for numbers: the authors' later HazyResearch/lolcats @ 375df84 (Apache-2.0),
`src/model/linear_attention/linear_attention.py`, and `HedgehogFeatureMap` of fla-org/flash-linear-attention @ bc3b101d (MIT). The map
comes in three forms that are not equal; `mode` names them. What differs from lolcats: the state, padding inside a batch that is being
decoded, decoding several tokens at once, its epsilon also there, and chunks in place of its cumulative sum.

Three uses: a layer to train with (here, the mixer "hedgehog"), and the conversion of finetuned and of pretrained models:
`regard.Linearized`, `regard.losses.fit_linear_maps`, `regard.losses.fit_lora`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._checks import require_name
from ..layers import rename_keys
from .learned_maps import official_map_keys
from .linear_attention import LinearAttention

__all__ = ["HedgehogAttention"]

MODES = {
    "softmax": "hedgehog",
    "exp": "hedgehog_exp",
    "stable_exp": "hedgehog_stable",
    "joint_softmax": "hedgehog_joint",
}


class HedgehogAttention(LinearAttention):
    """Normalised linear attention with phi(x) = [softmax(W x), softmax(-W x)], W learned for each head: (B, N, dim) -> (B, N, dim).

    Args:
        dim, num_heads, causal. num_kv_heads: default num_heads; keys and values are repeated before the map.
        mode: "softmax" (lolcats, its default `softmax_dim`); "exp": [exp(W x + b), exp(-W x - b)], the paper's, which overflows where W x
            goes beyond 88; "stable_exp": with the largest entry taken off each half (lolcats `exp_dim`); "joint_softmax": one softmax
            over both halves, doubled (flash-linear-attention).
        feature_dim: rows of W, default head_dim; a state has twice as many. tie: one map for queries and keys.
        rope_base: rotary positions, before the map; None: none. map_options: further ones of `LearnedFeatureMap` (`init`, `bias`, ...).
        options: of `LinearAttention` (`head_dim`, `key_dim`, `bias`, `out_norm`, ...).

    Maps start as the identity (queries and keys alike). State dicts of lolcats' layers load by `regard.load_official`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        num_kv_heads: int | None = None,
        mode: str = "softmax",
        feature_dim: int | None = None,
        tie: bool = False,
        rope_base: float | None = 10000.0,
        eps: float = 1e-12,
        map_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        require_name("mode", mode, MODES)
        super().__init__(
            dim,
            num_heads,
            causal,
            num_kv_heads=num_kv_heads,
            feature_map=MODES[mode],
            map_options={"feature_dim": feature_dim, "tie": tie, **(map_options or {})},
            rope_base=rope_base,
            eps=eps,
            **options,
        )
        self.mode = mode

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """lolcats' layers: `o_proj` is our `out_proj`, `feature_map_q.mlp.layer` our `maps.q.weight`."""
        state = {name: tensor for name, tensor in state.items() if "rotary_emb" not in name}
        return official_map_keys(
            rename_keys(state, (r"^o_proj\.", "out_proj."), (r"^feature_map_([qk])\.", r"maps.\1."))
        )
