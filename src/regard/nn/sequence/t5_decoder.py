"""A T5 decoder on embeddings, with a cache: causal self-attention with relative buckets, and attention to given vectors.

Checked against Hugging Face's `T5Stack` as the Block Transformer uses it for its "cross" strategy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require_int, require_name
from ...ops import masks
from ...ops.attention import attention
from ...ops.growing_store import GrowingStore

__all__ = ["T5Decoder"]

_EPS = 1e-6


class _Attention(nn.Module):
    """T5 attention: no biases, no scaling."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, dim, bias=False)
        nn.init.normal_(self.q.weight, std=(dim * head_dim) ** -0.5)
        nn.init.normal_(self.k.weight, std=dim**-0.5)
        nn.init.normal_(self.v.weight, std=dim**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.k(x)), self._heads(self.v(x))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
        mask = masks.causal if causal and x.shape[1] > 1 else None
        out = attention(self._heads(self.q(x)), k, v, mask=mask, bias=bias, scale=1.0)
        return self.o(rearrange(out, "b h n d -> b n (h d)"))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.gated = gated
        if gated:
            self.wi_0, self.wi_1 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        else:
            self.wi = nn.Linear(dim, hidden, bias=False)
        self.dropout, self.wo = nn.Dropout(dropout), nn.Linear(hidden, dim, bias=False)
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.wo(self.dropout(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)))
        return self.wo(self.dropout(self.wi(x).relu()))


class _Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.self_attention = nn.RMSNorm(dim, _EPS), _Attention(dim, num_heads, head_dim)
        self.cross_norm, self.cross_attention = nn.RMSNorm(dim, _EPS), _Attention(dim, num_heads, head_dim)
        self.mlp_norm, self.mlp = nn.RMSNorm(dim, _EPS), _MLP(dim, hidden, gated, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, context: tuple[Tensor, Tensor], bias: Tensor, store: GrowingStore | None = None
    ) -> Tensor:
        normed = self.self_norm(x)
        k, v = self.self_attention.keys_values(normed)
        if store is not None:
            k, v = store.append(k, v)
        x = x + self.dropout(self.self_attention(normed, k, v, bias, causal=True))
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), *context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class T5Decoder(nn.Module):
    """Causal T5 layers that also attend to `context`: embeddings (B, N, dim), context (B, M, dim) -> (B, N, dim).

    Args:
        num_layers, dim, num_heads, head_dim: head_dim default 64, as in T5. hidden: width of the MLPs (default 4 dim).
        feed_forward: "relu" or "gated-gelu" (T5 1.1). buckets, max_distance: of relative positions, one table for all layers.
        dropout: in training, of embeddings, branches and MLP units.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        head_dim: int = 64,
        hidden: int | None = None,
        feed_forward: str = "relu",
        buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("dim", dim), ("head_dim", head_dim), ("buckets", buckets)):
            require_int(name, value, 1)
        gated = require_name("feed_forward", feed_forward, ("relu", "gated-gelu")) == "gated-gelu"
        self.dim, self.buckets, self.max_distance = dim, buckets, max_distance
        self.relative = nn.Embedding(buckets, num_heads)
        nn.init.normal_(self.relative.weight, std=dim**-0.5)
        self.layers = nn.ModuleList(
            _Layer(dim, num_heads, head_dim, hidden or 4 * dim, gated, dropout)
            for _ in range(require_int("num_layers", num_layers, 0))
        )
        self.norm, self.dropout = nn.RMSNorm(dim, _EPS), nn.Dropout(dropout)

    def new_stores(self, page: int = 128) -> list[GrowingStore]:
        """An empty cache: one store a layer."""
        return [GrowingStore(page) for _ in self.layers]

    def read(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each layer attends to, from context (B, M, dim): computed once for many calls."""
        return [layer.cross_attention.keys_values(context) for layer in self.layers]  # type: ignore[union-attr, operator]

    def forward(
        self, x: Tensor, context: list[tuple[Tensor, Tensor]], stores: list[GrowingStore] | None = None
    ) -> Tensor:
        """context: from `read`. stores: keys and values of earlier rows; x then holds the rows after them."""
        past = stores[0].length if stores else 0
        bias = self._bias(past, x.shape[1], x.device)
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, context[i], bias, None if stores is None else stores[i])
        return self.dropout(self.norm(x))

    def _bias(self, past: int, count: int, device: torch.device) -> Tensor:
        """(1, H, count, past + count): by distance back; exact up to half the buckets, then logarithmic."""
        rows = torch.arange(past, past + count, device=device)[:, None]
        back = (rows - torch.arange(past + count, device=device)).clamp(min=0)
        exact = self.buckets // 2
        far = (back.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact) * (self.buckets - exact)
        bucket = torch.where(back < exact, back, (exact + far.long()).clamp(max=self.buckets - 1))
        return self.relative(bucket).permute(2, 0, 1)[None]
