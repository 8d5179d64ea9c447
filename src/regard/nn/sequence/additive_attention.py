"""Attention as pooling: the states of a sequence to one vector, for classifiers. Additive and scaled-dot scores, logits in the open.

Bahdanau, Cho, Bengio 2015 (arXiv 1409.0473) in the form of Jain and Wallace 2019 (arXiv 1902.10186), as Attention AT (003, arXiv
2009.12064) trains it. Code read for numbers: shunk031/attention-meets-perturbation @ d40a5ca (MIT), `amep/modules/attention_layer/bc`
and `/qa`. What differs: their masked softmax divides by the sum plus 1e-13 after masking; here it is a plain masked softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.additive import additive_scores
from ...ops.reference import accumulation_dtype, softmax_with_lse

__all__ = ["AdditiveAttention", "AttentionPooling", "Pooled", "ScaledDotPooling"]


class Pooled(NamedTuple):
    """What attention pooling gives.

    Attributes:
        context: (B, D), the weighted sum of the states. weights: (B, T), after the softmax; zero at masked places.
        logits: (B, T), before the softmax and without `logits_delta`; -inf at masked places.
    """

    context: Tensor
    weights: Tensor
    logits: Tensor


class AttentionPooling(nn.Module):
    """states (B, T, dim) -> `Pooled`. What a subclass decides is `scores(states, query)`, (B, T).

    `forward(states, mask, query, logits_delta)`: mask (B, T), True at real places, None = all; query (B, query_dim) where the class was
    built for one; logits_delta (B, T), added to the logits before the softmax: losses that perturb attention come in here (003, 028).
    A row without a real place gives a context of zeros.
    """

    dim: int
    query_dim: int | None

    def scores(self, states: Tensor, query: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        query: Tensor | None = None,
        logits_delta: Tensor | None = None,
    ) -> Pooled:
        require_tensor("states", states, dims=3, floating=True)
        require(states.shape[2] == self.dim, "states", f"shape {tuple(states.shape)}", f"(B, T, {self.dim})")
        shape = tuple(states.shape[:2])
        if self.query_dim is None:
            require(query is None, "query", "a tensor", "None: this pooling was built without query_dim")
        else:
            want = (len(states), self.query_dim)
            got = None if query is None else tuple(query.shape)
            require(got == want, "query", got, f"shape {want}")
        for name, tensor in (("mask", mask), ("logits_delta", logits_delta)):
            require(tensor is None or tuple(tensor.shape) == shape, name, getattr(tensor, "shape", None), f"{shape}")
        dtype = accumulation_dtype(states.dtype)
        logits = self.scores(states, query).to(dtype)
        shifted = logits if logits_delta is None else logits + logits_delta
        if mask is not None:
            gone = ~mask.bool()
            logits, shifted = logits.masked_fill(gone, -torch.inf), shifted.masked_fill(gone, -torch.inf)
        weights = softmax_with_lse(shifted)[0]
        context = (weights[:, None] @ states.to(dtype))[:, 0].to(states.dtype)
        return Pooled(context, weights, logits)


class AdditiveAttention(AttentionPooling):
    """Logits v . tanh(W h_t + b [+ U q]).

    Args:
        dim: of states. hidden: of the tanh; default dim // 2, as in 003. query_dim: of a query vector, None for none.

    Loads `attn.0.*`, `attn.2.weight` of the authors' TanhBCAttention and `attn1p.*`, `attn1q.*`, `attn2.weight` of TanhQAAttention.
    """

    def __init__(self, dim: int, hidden: int | None = None, query_dim: int | None = None) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        hidden = max(1, dim // 2) if hidden is None else require_int("hidden", hidden, 1)
        self.query_dim = None if query_dim is None else require_int("query_dim", query_dim, 1)
        self.proj = nn.Linear(dim, hidden)
        self.query_proj = None if query_dim is None else nn.Linear(query_dim, hidden)
        self.v = nn.Linear(hidden, 1, bias=False)

    def scores(self, states: Tensor, query: Tensor | None) -> Tensor:
        keys = self.proj(states)
        if self.query_proj is None:
            return self.v(torch.tanh(keys))[..., 0]
        assert query is not None
        return additive_scores(self.query_proj(query)[:, None], keys, self.v.weight[0])[:, 0]

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names."""
        return _renamed(
            state, {"attn.0": "proj", "attn.2": "v", "attn1p": "proj", "attn1q": "query_proj", "attn2": "v"}
        )


class ScaledDotPooling(AttentionPooling):
    """Logits h_t . q / sqrt(dim): q a learned vector, or, with `query=True`, given at each call (B, dim).

    Loads `attn1.weight` of the authors' DotBCAttention; their DotQAAttention has no parameters.
    """

    def __init__(self, dim: int, query: bool = False) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.query_dim = dim if query else None
        self.q = None if query else nn.Linear(dim, 1, bias=False)

    def scores(self, states: Tensor, query: Tensor | None) -> Tensor:
        if self.q is None:
            assert query is not None
            return (states @ query[:, :, None])[..., 0] * self.dim**-0.5
        return self.q(states)[..., 0] * self.dim**-0.5

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names."""
        return _renamed(state, {"attn1": "q"})


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    made = {}
    for key, value in state.items():
        owner, _, leaf = key.rpartition(".")
        made[f"{names.get(owner, owner)}.{leaf}"] = value
    return made
