"""Feature maps with weights: a linear layer a head, then a map of `regard.ops.state.feature_maps`.

The Hedgehog & the Porcupine (Zhang et al. 2024, arXiv 2402.04347): [exp(W x + b), exp(-W x - b)]. The paper has no repository; code read
for numbers: the authors' later HazyResearch/lolcats @ 375df84 (Apache-2.0), `src/model/feature_map.py`. T2R: Kasai et al. 2021, arXiv
2103.13076. What differs: a bias may be one number a feature, as in the papers (lolcats has one a head), and one map may serve all heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_name, require_tensor
from ...ops.state.feature_maps import FEATURE_MAPS, FeatureMap, resolve
from ..layers import rename_keys

__all__ = ["LEARNED_MAPS", "LearnedFeatureMap", "MapPair", "build_map_pair", "heads_for"]

INITS = ("identity", "kaiming", "normal")
BIASES = ("feature", "head")


class LearnedFeatureMap(nn.Module):
    """activation(W_h x + b): x (B, H, N, head_dim) -> (B, H, N, F), with weights of its own for each head.

    Args:
        num_heads: 1: one map for all heads. head_dim. feature_dim: rows of W, default head_dim. (F is what the activation makes of
            them: twice as many for pairs.)
        activation: a name in `FEATURE_MAPS` or a callable.
        bias: None; "feature": one a head and feature, as in the papers; "head": one number a head, as in lolcats.
        skip: x + W x (then feature_dim is head_dim). hidden: W is two layers with a relu between them, with biases, added to x: an
            adapter.
        init: "identity": W x is x at first (with `skip` or `hidden`: W x is nothing), "kaiming" or "normal", as in lolcats.
        eps: no feature is below it. None: as they come (for maps that may be negative).

    Parameters: weight (H, head_dim, feature_dim), bias; lolcats' `mlp.layer` by `regard.load_official`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        *,
        activation: str | FeatureMap = "symmetric_softmax",
        bias: str | None = None,
        skip: bool = False,
        hidden: int | None = None,
        init: str = "identity",
        eps: float | None = 1e-12,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = require_int("num_heads", num_heads, 1), require_int("head_dim", head_dim, 1)
        self.feature_dim = head_dim if feature_dim is None else require_int("feature_dim", feature_dim, 1)
        require_name("init", init, INITS)
        if bias is not None:
            require_name("bias", bias, BIASES)
        skip = skip or hidden is not None
        require(
            not skip or self.feature_dim == head_dim, "feature_dim", feature_dim, f"head_dim ({head_dim}) with skip"
        )
        require(eps is None or eps >= 0, "eps", eps, "a number >= 0, or None")
        self.activation, self.skip, self.eps = activation, skip, eps
        resolve(activation)
        self.bias: nn.Parameter | None = None
        self.weight_up: nn.Parameter | None = None
        if hidden is None:
            self.weight = nn.Parameter(torch.empty(num_heads, head_dim, self.feature_dim))
            if bias is not None:
                self.bias = nn.Parameter(torch.zeros((1, num_heads, 1, self.feature_dim if bias == "feature" else 1)))
        else:
            require(bias is None, "bias", bias, "None beside hidden, which has biases")
            self.weight = nn.Parameter(torch.empty(num_heads, head_dim, require_int("hidden", hidden, 1)))
            self.bias = nn.Parameter(torch.zeros(1, num_heads, 1, hidden))
            self.weight_up = nn.Parameter(torch.empty(num_heads, hidden, self.feature_dim))
            self.bias_up = nn.Parameter(torch.zeros(1, num_heads, 1, self.feature_dim))
        self._reset(init)

    @torch.no_grad()
    def _reset(self, init: str) -> None:
        for weight in (self.weight, self.weight_up):
            if weight is not None:
                nn.init.normal_(weight) if init == "normal" else nn.init.kaiming_uniform_(weight)
        if init == "identity":
            if self.weight_up is not None:
                self.weight_up.zero_()
            elif self.skip:
                self.weight.zero_()
            else:
                self.weight.copy_(torch.eye(*self.weight.shape[1:]).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        require_tensor("x", x, dims=4, floating=True)
        fits = x.shape[3] == self.head_dim and self.num_heads in (1, x.shape[1])
        require(fits, "x", f"shape {tuple(x.shape)}", f"(B, {self.num_heads}, N, {self.head_dim})")
        y = x @ self.weight.to(x.dtype)
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        if self.weight_up is not None:
            y = y.relu() @ self.weight_up.to(x.dtype) + self.bias_up.to(x.dtype)
        made = resolve(self.activation)[0](x + y if self.skip else y)
        return made if self.eps is None else made.clamp(min=self.eps)

    @staticmethod
    def official_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """lolcats' `mlp.layer`, `mlp.bias`, and its adapter's `mlp.layer0`, `bias0`, `layer1`, `bias1`."""
        return official_map_keys(dict(state))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, {self.head_dim} -> {self.feature_dim}, activation={self.activation!r}"


def official_map_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """lolcats' names of a feature map's parameters, anywhere in a state dict, in ours."""
    rules = (("layer1", "weight_up"), ("bias1", "bias_up"), ("layer0?", "weight"), ("bias0?", "bias"))
    return rename_keys(state, *((rf"(^|\.)mlp\.{theirs}$", rf"\g<1>{ours}") for theirs, ours in rules))


LEARNED_MAPS: dict[str, dict[str, Any]] = {
    "hedgehog": {"activation": "symmetric_softmax"},
    "hedgehog_exp": {"activation": "exp_pair", "bias": "feature"},
    "hedgehog_stable": {"activation": "stable_exp_pair"},
    "hedgehog_joint": {"activation": "joint_softmax"},
    "t2r": {"activation": "relu", "bias": "feature", "init": "kaiming"},
    "learned_elu": {"activation": "elu+1"},
}
"""Name -> options of `LearnedFeatureMap`: the softmax pair of lolcats (its `softmax_dim`), the paper's exponentials, those with the largest
taken off (`exp_dim`), flash-linear-attention's, T2R's relu, and a learned 1 + elu."""


class MapPair(nn.Module):
    """A map for queries (`q`) and one for keys (`k`): callables or modules."""

    def __init__(self, q: FeatureMap, k: FeatureMap) -> None:
        super().__init__()
        self.q, self.k = q, k

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(q), self.k(k)


def build_map_pair(
    feature_map: Any,
    num_heads: int,
    head_dim: int,
    *,
    feature_dim: int | None = None,
    num_kv_heads: int | None = None,
    tie: bool = False,
    **options: Any,
) -> MapPair:
    """What a layer's `feature_map` argument means, with fresh weights where the name is one of `LEARNED_MAPS`.

    Args:
        feature_map: a name in `LEARNED_MAPS` or `FEATURE_MAPS`, a callable or module, a pair of them, or None (identity).
        num_heads, head_dim: of the queries. feature_dim: of learned maps. num_kv_heads: heads of the learned map for keys, default
            num_heads (keys shared by several query heads are then repeated, as in lolcats).
        tie: one learned map for queries and keys. options: further ones of `LearnedFeatureMap`.
    """
    learned = isinstance(feature_map, str) and feature_map in LEARNED_MAPS
    if not learned:
        given = sorted(options) + ["feature_dim"] * (feature_dim is not None)
        require(
            not given, "feature_map", feature_map, f"one of {', '.join(LEARNED_MAPS)} to go with {', '.join(given)}"
        )
        if isinstance(feature_map, str):
            require_name("feature_map", feature_map, [*FEATURE_MAPS, *LEARNED_MAPS])
        return MapPair(*resolve(feature_map))
    made = LearnedFeatureMap(num_heads, head_dim, feature_dim, **{**LEARNED_MAPS[feature_map], **options})
    if num_kv_heads not in (None, num_heads):
        if tie:
            raise bad_value("num_kv_heads", num_kv_heads, f"num_heads ({num_heads}), or tie=False")
        other = LearnedFeatureMap(num_kv_heads, head_dim, feature_dim, **{**LEARNED_MAPS[feature_map], **options})
    else:
        other = made if tie else copy.deepcopy(made)
    return MapPair(made, other)


def heads_for(feature_map: FeatureMap, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (B, Hkv, M, .), repeated where the keys' map has more heads than they have."""
    heads = getattr(feature_map, "num_heads", None)
    if heads in (None, 1, k.shape[1]):
        return k, v
    fits = heads % k.shape[1] == 0 if k.shape[1] else False
    require(fits, "k", f"{k.shape[1]} heads", f"a number that divides the {heads} heads of the keys' map")
    return tuple(x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))  # type: ignore[return-value]
