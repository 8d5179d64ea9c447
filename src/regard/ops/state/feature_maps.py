"""Feature maps: what takes the place of the softmax. A map takes (B, H, N, D) to (B, H, N, F) and keeps the dtype.

A name, a callable, or a pair of them (one for queries, one for keys). `register` adds a name. A map whose features depend on the place of
the token has a method `at(offset)` that gives the map for tokens from `offset` on (`at_offset`). Maps with weights are modules of
`regard.nn` (`LearnedFeatureMap`); these here are what such a map ends in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import bad_type, require, require_int, require_name

FeatureMap = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0 (Katharopoulos et al. 2020)."""
    return F.elu(x) + 1


def softmax(x: Tensor) -> Tensor:
    """Softmax over the features: positive, sums to one."""
    return x.softmax(dim=-1)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def symmetric_softmax(x: Tensor) -> Tensor:
    """[softmax(x), softmax(-x)]: twice the width, positive, and x and -x differ (the map of Hedgehog, without its linear layer)."""
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


def exp_pair(x: Tensor) -> Tensor:
    """[exp(x), exp(-x)]: phi(q) . phi(k) = sum_i 2 cosh(q_i + k_i) (Hedgehog's paper, without its linear layer). Overflows beyond 88."""
    return torch.cat([x.exp(), (-x).exp()], dim=-1)


def stable_exp_pair(x: Tensor) -> Tensor:
    """[exp(x - max x), exp(min x - x)], never above 1. Each half has a factor of its own, so the weights are not those of `exp_pair`."""
    return torch.cat([(x - x.amax(-1, keepdim=True)).exp(), (x.amin(-1, keepdim=True) - x).exp()], dim=-1)


def joint_softmax(x: Tensor) -> Tensor:
    """One softmax over [2 x, -2 x]: sums to 1 (flash-linear-attention's Hedgehog)."""
    return torch.cat([2 * x, -2 * x], dim=-1).softmax(dim=-1)


@dataclass(frozen=True)
class Focused:
    """relu(x), sharpened towards its largest channels: |y| y^p / |y^p| with y = relu(x) + eps; the norm of y is kept.

    From FLatten Transformer (Han et al. 2023, arXiv 2308.00442), without its learned scale. power: p > 0; 1: relu(x) + eps.
    """

    power: float = 3.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.power > 0, "power", self.power, "a number > 0")

    def __call__(self, x: Tensor) -> Tensor:
        y = F.relu(x) + self.eps
        sharp = (
            y / y.amax(-1, keepdim=True)
        ) ** self.power  # of the largest channel: small numbers to a power would vanish
        return sharp * (y.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))


def cosine_reweight(x: Tensor, length: int, offset: int = 0) -> Tensor:
    """[x sin a, x cos a], a = pi / 2 (offset + i + 1) / length for token i: products get the factor cos(pi / 2 (i - j) / length)."""
    place = torch.arange(1, x.shape[2] + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)) + offset
    angle = (math.pi / 2 * place / length)[:, None]
    return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], dim=-1)


@dataclass(frozen=True)
class CosineReweighting:
    """Features of another map, whose products fade with the distance: times cos(pi / 2 (i - j) / max_len). Twice the width.

    From cosFormer (Qin et al. 2022, arXiv 2202.08791), with a fixed length in place of that of the input, so that causal prefixes and
    decoding agree. max_len: no token may lie beyond it (an error), as far weights would turn negative. feature_map: name or callable.
    """

    max_len: int = 2048
    feature_map: str | FeatureMap = "relu"
    offset: int = 0

    def __post_init__(self) -> None:
        require_int("max_len", self.max_len, 1)
        require_int("offset", self.offset, 0)

    def at(self, offset: int) -> CosineReweighting:
        """The map for tokens from `offset` on."""
        return CosineReweighting(self.max_len, self.feature_map, offset)

    def __call__(self, x: Tensor) -> Tensor:
        end = self.offset + x.shape[2]
        require(end <= self.max_len, "max_len", self.max_len, f"at least as many as there are tokens ({end})")
        return cosine_reweight(resolve(self.feature_map)[0](x), self.max_len, self.offset)


def at_offset(feature_map: FeatureMap, offset: int) -> FeatureMap:
    """`feature_map` for tokens from `offset` on: itself, unless it depends on places."""
    move = getattr(feature_map, "at", None)
    return feature_map if move is None else move(offset)


@dataclass(frozen=True)
class TaylorExp:
    """phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = scale * q . k: the exponential to second order, never below 1/2.

    Features of x (..., D): 1, then sqrt(scale) x, then scale / sqrt(2) times all products of two channels: 1 + D + D^2.
    From Based (Arora et al. 2024, arXiv 2402.18668); order and factors as in HazyResearch/based @ 32c1bd4, `TaylorExp`.

    scale: > 0; None: 1 / sqrt(D), as softmax attention has it.
    compact: products of two different channels once (times sqrt(2)) and not twice: 1 + D + D (D + 1) / 2 features, so that a state is
        about half as large; the same weights.
    """

    scale: float | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        require(self.scale is None or self.scale > 0, "scale", self.scale, "a number > 0, or None")

    def width(self, dim: int) -> int:
        """Features of `dim` channels."""
        return 1 + dim + (dim * (dim + 1) // 2 if self.compact else dim * dim)

    def __call__(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        scale = dim**-0.5 if self.scale is None else self.scale
        x = x * scale**0.5
        if self.compact:
            row, column = torch.triu_indices(dim, dim, device=x.device)
            second = x[..., row] * x[..., column] * x.new_ones(len(row)).masked_fill(row == column, 0.5**0.5)
        else:
            second = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, second], dim=-1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": identity,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "elu+1": elu_plus_one,
    "silu": F.silu,
    "exp": torch.exp,
    "softmax": softmax,
    "symmetric_softmax": symmetric_softmax,
    "exp_pair": exp_pair,
    "stable_exp_pair": stable_exp_pair,
    "joint_softmax": joint_softmax,
    "focused": Focused(),
    "cosine": CosineReweighting(),
    "taylor": TaylorExp(),
}


def register(name: str, feature_map: FeatureMap) -> FeatureMap:
    """Make `feature_map` known by `name`. A name that is taken is an error, not replaced."""
    require(name not in FEATURE_MAPS, "name", name, "a name that is not taken yet")
    if not callable(feature_map):
        raise bad_type("feature_map", feature_map, "a callable from (B, H, N, D) to (B, H, N, F)")
    FEATURE_MAPS[name] = feature_map
    return feature_map


def resolve(
    feature_map: str | FeatureMap | tuple[str | FeatureMap, str | FeatureMap] | None,
) -> tuple[FeatureMap, FeatureMap]:
    """The maps for queries and for keys meant by the `feature_map` argument of `linear_attention`."""
    pair = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    require(len(pair) == 2, "feature_map", pair, "one map, or a pair (for queries, for keys)")

    def one(item: str | FeatureMap | None) -> FeatureMap:
        if item is None:
            return identity
        if isinstance(item, str):
            return FEATURE_MAPS[require_name("feature_map", item, FEATURE_MAPS)]
        if not callable(item):
            raise bad_type("feature_map", item, "a name, a callable, a pair of them, or None")
        return item

    return one(pair[0]), one(pair[1])
