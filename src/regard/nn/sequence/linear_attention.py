"""Linear attention as a mixer with a state, for any feature map; and with a learned normaliser.

Feature maps and the ratio of sums: Katharopoulos et al. (2020, arXiv 2006.16236). `NormalizedLinearAttention`, and a width of its own for
queries and keys: Understanding the differences in Foundation Models (Sieber et al. 2024, NeurIPS, arXiv 2405.15731); code read for numbers:
IntelligentControlSystems/dsf-mqar @ 7c5aff8 (Apache-2.0), `zoology/mixers/attention.py` (`MHA(lin_att=True)`, `MHNA`). What differs: a
state, decay, fewer heads of keys, other feature maps, learned ones among them; the authors divide without an epsilon (`eps=0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_name, require_tensor
from ...ops.state.feature_maps import FeatureMap, at_offset
from ...ops.state.linear import linear_attention
from ...ops.state.linear_state import LinearState
from ..layers import split_joint_qk
from .learned_maps import build_map_pair, heads_for
from .rotary import rotary_table, rotate

__all__ = ["LinearAttention", "LinearAttentionState", "NormalizedLinearAttention"]

DECAYS = ("none", "token")


@dataclass
class LinearAttentionState:
    """What the layer carries while decoding: `memory`, whose size is fixed, and the tokens seen so far."""

    memory: LinearState
    position: int


class LinearAttention(nn.Module):
    """phi(q) (sum phi(k)^T v) / phi(q) (sum phi(k)), causal or over everything: (B, N, dim) -> (B, N, dim).

    Args:
        dim, num_heads. key_dim: channels of all queries (and of all keys) together, default dim. head_dim: of the values, default
            dim / num_heads. num_kv_heads: of keys and values, a divisor of num_heads (query head h reads kv head
            h // (num_heads // num_kv_heads)); default num_heads.
        feature_map: as in `regard.ops.linear_attention`, or a name in `LEARNED_MAPS` ("hedgehog", "t2r", ...); phi of the projected
            queries and keys. map_options: of a learned one (`feature_dim`, `tie`, `init`, ...; see `build_map_pair`).
        normalize: divide by the sum of the weights + eps. Wants a map that is not negative.
        decay: "none", or "token": each head forgets at a rate that it computes from the token, exp(-softplus(w x + b)) in (0, 1); at first
            one half is forgotten over 2 to 100 tokens, by head. Causal only.
        out_norm: RMSNorm of each head's output (for layers that do not normalise). rope_base: rotary positions, before the map; None: none.
        bias: of the projections; out_bias: of the last one, if not as `bias`. scale: factor on phi(q) phi(k); None is 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        key_dim: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        feature_map: str | FeatureMap | tuple[str | FeatureMap, str | FeatureMap] | None = "elu+1",
        map_options: Mapping[str, Any] | None = None,
        normalize: bool = True,
        decay: str = "none",
        out_norm: bool = False,
        rope_base: float | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.causal = (
            require_int("dim", dim, 1),
            require_int("num_heads", num_heads, 1),
            bool(causal),
        )
        key_dim = dim if key_dim is None else require_int("key_dim", key_dim, 1)
        value_dim = dim if head_dim is None else num_heads * require_int("head_dim", head_dim, 1)
        for name, width in (("dim", value_dim), ("key_dim", key_dim)):
            require(width % num_heads == 0, name, width, f"a multiple of num_heads ({num_heads})")
        require_name("decay", decay, DECAYS)
        require(causal or decay == "none", "decay", decay, "'none' where not causal")
        require(
            rope_base is None or key_dim // num_heads % 2 == 0,
            "key_dim",
            key_dim,
            "an even number a head for rotary positions",
        )
        kv_heads = num_heads if num_kv_heads is None else require_int("num_kv_heads", num_kv_heads, 1)
        require(num_heads % kv_heads == 0, "num_kv_heads", num_kv_heads, f"a divisor of num_heads ({num_heads})")
        self.num_kv_heads = kv_heads
        self.maps = build_map_pair(feature_map, num_heads, key_dim // num_heads, **(map_options or {}))
        self.normalize, self.rope_base, self.scale, self.eps = normalize, rope_base, scale, eps
        self._map_name = feature_map if isinstance(feature_map, str) else type(self.maps.k).__name__
        self.q_proj = nn.Linear(dim, key_dim, bias=bias)
        self.k_proj = nn.Linear(dim, key_dim // num_heads * kv_heads, bias=bias)
        self.v_proj = nn.Linear(dim, value_dim // num_heads * kv_heads, bias=bias)
        self.out_proj = nn.Linear(value_dim, dim, bias=bias if out_bias is None else out_bias)
        self.decay_proj = nn.Linear(dim, num_heads) if decay == "token" else None
        if self.decay_proj is not None:
            rates = 0.693 / torch.logspace(0.3, 2, num_heads)
            nn.init.zeros_(self.decay_proj.weight)
            with torch.no_grad():
                self.decay_proj.bias.copy_(rates.expm1().log())
        self.norm = nn.RMSNorm(value_dim // num_heads) if out_norm else None

    @property
    def feature_map(self) -> tuple[FeatureMap, FeatureMap]:
        """The maps of queries and of keys."""
        return self.maps.q, self.maps.k

    def forward(
        self,
        x: Tensor,
        *,
        state: LinearAttentionState | None = None,
        return_state: bool = False,
        padding_mask: Tensor | None = None,
        form: str = "auto",
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, LinearAttentionState) with `return_state`; `state`: what an earlier call returned.

        padding_mask: (B, N), nonzero for tokens, zero for padding anywhere in the row, which nobody reads then (a decay goes on over it).
        form: "auto", "parallel", "chunk" or "recurrent", as `regard.ops.linear_attention`.
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, LinearAttentionState):
            raise bad_type("state", state, "a LinearAttentionState")
        require(self.causal or (state is None and not return_state), "state", "wanted", "a causal layer")
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.num_kv_heads) for to in (self.k_proj, self.v_proj))
        past = 0 if state is None else state.position
        if self.rope_base is not None:
            table = rotary_table(torch.arange(past, past + x.shape[1], device=x.device), q.shape[-1], self.rope_base)
            q, k = rotate(q, table), rotate(k, table)
        map_q, map_k = (at_offset(one, past) for one in self.feature_map)
        k, v = heads_for(map_k, k, v)
        if padding_mask is not None:
            require_tensor("padding_mask", padding_mask)
            need = f"{tuple(x.shape[:2])}"
            require(padding_mask.shape == x.shape[:2], "padding_mask", f"shape {tuple(padding_mask.shape)}", need)
            gone = ~padding_mask.bool()[:, None, :, None]
            v, map_k = v.masked_fill(gone, 0), _without(map_k, gone)
        log_decay = None
        if self.decay_proj is not None:
            log_decay = -F.softplus(self.decay_proj(x).to(torch.promote_types(x.dtype, torch.float32))).transpose(1, 2)
        out = linear_attention(
            q, k, v, log_decay=log_decay, feature_map=(map_q, map_k), normalize=self.normalize, causal=self.causal, scale=self.scale,
            state=None if state is None else state.memory, return_state=return_state, form=form, eps=self.eps,
        )  # fmt: skip
        mixed, memory = out if isinstance(out, tuple) else (out, None)
        mixed = mixed if self.norm is None else self.norm(mixed)
        y = self.out_proj(rearrange(self._finish(mixed, x), "b h n d -> b n (h d)"))
        return y if memory is None else (y, LinearAttentionState(memory, past + x.shape[1]))

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        return out

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """dsf-mqar keeps queries and keys in one matrix `Wqk`; `Wv` is `v_proj`, `Wn` is `normaliser`."""
        return split_joint_qk(state, "Wqk", {"Wv": "v_proj", "Wn": "normaliser"})

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, feature_map={self._map_name!r}, normalize={self.normalize}"


def _without(feature_map: FeatureMap, gone: Tensor) -> FeatureMap:
    """The same map with features of zero where `gone`: a map need not keep zero, so padding is wiped behind it."""
    return lambda x: feature_map(x).masked_fill(gone, 0)


class NormalizedLinearAttention(LinearAttention):
    """Linear attention divided by exp(w x + b), a number a head learned from the query's token, in place of the sum of weights.

    Feature map: none (the identity) by default, so weights may be negative and do not sum to one. Other arguments as `LinearAttention`.
    """

    def __init__(self, dim: int, num_heads: int, causal: bool = True, *, bias: bool = True, **options: Any) -> None:
        require(
            "normalize" not in options,
            "normalize",
            options.get("normalize"),
            "no such option: the normaliser is learned",
        )
        super().__init__(dim, num_heads, causal, bias=bias, normalize=False, **{"feature_map": None, **options})
        self.normaliser = nn.Linear(dim, num_heads, bias=bias)

    def eta(self, x: Tensor) -> Tensor:
        """The normaliser of each token and head: x (B, N, dim) -> (B, H, N)."""
        return self.normaliser(x).transpose(1, 2).exp()

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        return out / self.eta(x)[..., None]
