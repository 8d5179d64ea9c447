"""One vector for each label: states pooled by the labels' own queries, by a learned self-attention, and the two joined by gates.

The attention blocks of KeNet (165), Li, Chen, Zeng 2024, "KeNet: Knowledge-enhanced Doc-Label Attention Network for Multi-label Text
Classification" (ICASSP, arXiv 2403.01767). No code of the authors is known and their formulas were not to be had: a reconstruction in the
manner of LSAN (Xiao et al. 2019), whose blocks the paper's description follows. No number here is claimed to be theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.attention import attention

__all__ = ["GatedFusion", "LabelAttention", "SelfAttentivePool"]


def _pool(scores: Tensor, states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax of (B, L, T) over real places, times states (B, T, dim); rows without a place are zero."""
    if mask is not None:
        keep = mask.bool()[:, None]
        scores = scores.masked_fill(~keep, -torch.inf)
        empty = ~keep.any(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1) * keep
    else:
        weights = scores.softmax(-1)
    return weights @ states, weights


class LabelAttention(nn.Module):
    """states (B, T, dim) -> (B, num_labels, dim): softmax(C states^T) states, the queries C being the labels' embeddings.

    Args:
        dim: of states. num_labels: L.
        init: (L, any width), label vectors (means of word vectors, say): C is then a trained linear map of them, which are trained too;
            None: C is a table of its own.

    Without a scale, as in LSAN: it equals attention with scale 1 whose queries are the labels.
    """

    def __init__(self, dim: int, num_labels: int, init: Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.num_labels = require_int("dim", dim, 1), require_int("num_labels", num_labels, 1)
        if init is None:
            self.labels = nn.Parameter(torch.randn(num_labels, dim) * dim**-0.5)
            self.proj: nn.Module = nn.Identity()
        else:
            require_tensor("init", init, dims=2, floating=True)
            require(len(init) == num_labels, "init", f"shape {tuple(init.shape)}", f"({num_labels}, any width)")
            self.labels = nn.Parameter(init.detach().clone().float())
            self.proj = nn.Linear(init.shape[1], dim)

    def queries(self) -> Tensor:
        """C, (L, dim)."""
        return self.proj(self.labels)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        require_tensor("states", states, dims=3, floating=True)
        require(states.shape[2] == self.dim, "states", f"shape {tuple(states.shape)}", f"(B, T, {self.dim})")
        queries = self.queries()[None, None].expand(len(states), -1, -1, -1)
        keys = states[:, None]
        allowed = None if mask is None else mask.bool()[:, None, None]
        return attention(queries, keys, keys, mask=allowed, scale=1.0)[:, 0]


class SelfAttentivePool(nn.Module):
    """states (B, T, dim) -> (B, hops, dim): softmax(W2 tanh(W1 states^T)) states (Lin et al. 2017); in KeNet a hop for each label.

    hidden: of the tanh; default dim // 2.
    """

    def __init__(self, dim: int, hops: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = max(1, dim // 2) if hidden is None else require_int("hidden", hidden, 1)
        self.proj = nn.Linear(dim, hidden, bias=False)
        self.hops = nn.Linear(hidden, require_int("hops", hops, 1), bias=False)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        require_tensor("states", states, dims=3, floating=True)
        scores = self.hops(torch.tanh(self.proj(states))).transpose(1, 2)
        return _pool(scores, states, mask)[0]


class GatedFusion(nn.Module):
    """n tensors (..., dim) -> one: each weighted by sigmoid(x . w_i), the weights divided by their sum.

    dim, n: as they say. forward(parts, present): present, None or a boolean tensor (...,) for each part, broadcastable: where False the
    part has weight 0; with none present the result is zero.
    """

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.n = require_int("n", n, 1)
        self.gates = nn.ModuleList(nn.Linear(dim, 1) for _ in range(n))

    def weights(self, parts: Sequence[Tensor], present: Sequence[Tensor | None] | None = None) -> Tensor:
        """(n, ..., 1), summing to 1 over the parts."""
        require(len(parts) == self.n, "parts", f"{len(parts)} tensors", f"{self.n}")
        raw = torch.stack([torch.sigmoid(gate(part)) for gate, part in zip(self.gates, parts)])
        if present is not None:
            keep = [
                torch.ones_like(raw[0]) if p is None else p[..., None].to(raw.dtype).expand_as(raw[0]) for p in present
            ]
            raw = raw * torch.stack(keep)
        return raw / raw.sum(0, keepdim=True).clamp(min=1e-12)

    def forward(self, parts: Sequence[Tensor], present: Sequence[Tensor | None] | None = None) -> Tensor:
        return (self.weights(parts, present) * torch.stack(list(parts))).sum(0)
