"""Six numbers of an attention map: how spread, how concentrated, how different between heads, how much at the first token and nearby.

Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (Xue, Moosavi and Aletras 2025, arXiv
2510.11602), the paper's indicators; no code found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import require, require_int, require_tensor
from .sink import column_importance

__all__ = ["attention_indicators", "compare_indicators"]

_SCALED = ("entropy", "concentration", "head_diversity")


def attention_indicators(weights: Tensor, offsets: int = 4) -> dict[str, float]:
    """weights (B, H, N, N), causal, rows summing to 1 -> means over batch (and heads) of

    - entropy: -sum a log a over a head's whole map, in nats; concentration: the map's Frobenius norm, from sqrt(1 + 1/2 + ... + 1/N)
      for uniform maps to sqrt(N) for maps of zeros and ones;
    - head_diversity: standard deviation over heads of each visible entry, their mean; 0 with one head;
    - sink: mean weight of the first token; local_0 ... local_(offsets - 1): mean weight of the token that many places back.
    """
    require_tensor("weights", weights, dims=4, floating=True)
    length = weights.shape[-1]
    square = weights.shape[-2] == length and weights.shape[0] > 0 and weights.shape[1] > 0
    require(square and length > 0, "weights", f"shape {tuple(weights.shape)}", "(B, H, N, N), none of them 0")
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    require(not bool(wide.triu(1).any()), "weights", "weight above the diagonal", "causal maps")
    require(0 <= require_int("offsets", offsets) <= length, "offsets", offsets, f"at most {length}, the tokens")
    found = {
        "entropy": torch.special.entr(wide).sum((-1, -2)).mean(),
        "concentration": wide.square().sum((-1, -2)).sqrt().mean(),
        "head_diversity": wide.std(1, correction=0).sum((-1, -2)).mean() * 2 / (length * (length + 1)),
        "sink": column_importance(wide)[..., 0].mean(),
    }
    for back in range(offsets):
        found[f"local_{back}"] = wide.diagonal(-back, -2, -1).sum(-1).mean() / (length - back)
    return {name: float(value) for name, value in found.items()}


def compare_indicators(models: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """As the paper compares models: entropy, concentration and head diversity scaled to [0, 1] over those given; the rest as it is.

    An indicator in which all agree becomes 0."""
    require(bool(models), "models", models, "at least one")
    made = {label: dict(found) for label, found in models.items()}
    for name in _SCALED:
        values = [found[name] for found in models.values()]
        low, width = min(values), max(values) - min(values)
        for found in made.values():
            found[name] = (found[name] - low) / width if width > 0 else 0.0
    return made
