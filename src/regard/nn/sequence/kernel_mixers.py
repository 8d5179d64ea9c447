"""Attention as a product of feature maps: Performer (random features) and cosFormer (re-weighted by distance).

Performer (Choromanski et al. 2021, arXiv 2009.14794); cosFormer (Qin et al. 2022, arXiv 2202.08791). Code read for numbers: CAB's package
efficient_attention (Shark-NLP/CAB @ 0e49696, MIT).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import require_int, require_name
from ...ops.state.favor import orthogonal_projection, softmax_features
from ...ops.state.feature_maps import cosine_reweight, elu_plus_one
from .pattern_attention import ProjectedAttention

__all__ = ["CosformerAttention", "PerformerAttention"]


def _without_padding(features: Tensor, keys: Tensor | None) -> Tensor:
    return features if keys is None else features * keys[:, None, :, None].to(features.dtype)


class PerformerAttention(ProjectedAttention):
    """FAVOR+ attention with `features` random features a head: non-causal self, and cross (also in a causal decoder).

    Orthogonal directions are drawn once, kept in the buffer `projection` and used in eval mode; in training, plain Gaussian ones are
    drawn at every call. The authors keep the normaliser from falling below 0.1, which biases rows of little weight; `floor` is that
    bound, and `eps` is added to every feature: with many features both have to be smaller. Padding keys have no weight, but still
    count in the maximum that scales the keys. Causal self-attention is left out as in CAB, because of that maximum over all keys. The
    authors' checkpoints lack the directions (their `eval_proj` is no buffer), so they change with every load; load them with
    `load_official(..., strict=False)`.
    """

    patterns = frozenset({"NS", "NC", "CC"})
    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        features: int = 16,
        floor: float = 0.1,
        eps: float = 1e-4,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.features, self.floor, self.eps = require_int("features", features, 1), floor, eps
        self.register_buffer(
            "projection", orthogonal_projection(features, self.head_dim, num_heads, generator=generator)
        )

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New orthogonal directions for eval mode."""
        fresh = orthogonal_projection(self.features, self.head_dim, self.num_heads, generator=generator)
        self.projection.copy_(fresh)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        directions = self.projection
        if self.training:
            directions = torch.randn(self.num_heads, self.features, self.head_dim, device=q.device)
        q = softmax_features(q, directions, query=True, eps=self.eps)
        k = _without_padding(softmax_features(k, directions, query=False, eps=self.eps), keys)
        weight = q @ k.sum(2)[..., None]
        return (q @ (k.transpose(-1, -2) @ v)) / weight.clamp(min=self.floor)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`eval_proj`, where somebody kept it, is our `projection`."""
        return {"projection" if name == "eval_proj" else name: tensor for name, tensor in state.items()}


class CosformerAttention(ProjectedAttention):
    """relu features weighed by cos(pi/2 (i - j) / M), M the longer of the two lengths. Non-causal self and cross.

    M follows the length: the outputs on a prefix are not the prefix of the outputs, which is why causal patterns are refused.
    activation: "relu" or "elu" (1 + elu). The denominator is at least 1e-6.
    """

    patterns = frozenset({"NS", "NC"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        activation: str = "relu",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.activation = require_name("activation", activation, ("relu", "elu"))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        longest = max(q.shape[2], k.shape[2])
        q, k = self._features(q, longest), _without_padding(self._features(k, longest), keys)
        weight = q @ k.sum(2)[..., None]
        return (q @ (k.transpose(-1, -2) @ v)) / weight.clamp(min=1e-6)

    def _features(self, x: Tensor, longest: int) -> Tensor:
        return cosine_reweight(x.relu() if self.activation == "relu" else elu_plus_one(x), longest)
