"""Plain pre-norm Transformer parts that several networks are stacked of: attention with projections, MLP, layers.

Nothing here is a mechanism of its own: `x + attention(norm(x))`, `x + mlp(norm(x))`. Self-attention and attention to another
sequence of another width are the same module. The numbers are those of Keras' layers (Dense, LayerNormalization,
MultiHeadAttention), which FIT is built of (google-research/pix2seq).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_fraction, require_int, require_tensor
from ...ops.attention import attention
from ..layers import drop_samples

__all__ = ["CrossAttend", "FeedForward", "MultiHeadAttention", "PreNormLayer"]

_EPS = 1e-6


def require_rate(name: str, value: float) -> float:
    """A probability in [0, 1)."""
    require(require_fraction(name, value) < 1.0, name, value, "a probability in [0, 1)")
    return float(value)


class MultiHeadAttention(nn.Module):
    """Softmax attention with four projections: x (B, N, dim), context (B, M, context_dim) -> (B, N, dim).

    Args:
        dim: channels of the queries and of the result. context_dim: channels of what is attended to (default dim).
        num_heads, head_dim: of keys and values alike; head_dim defaults to dim // num_heads (rounded down, as Keras' users do).
        bias: of all four projections. dropout: of attention weights, in training.
        num_kv_heads: fewer key and value heads than query heads (GQA); default num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        require_int("dim", dim, 1)
        require_int("num_heads", num_heads, 1)
        self.dim, self.context_dim, self.num_heads = dim, context_dim or dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else require_int("num_kv_heads", num_kv_heads, 1)
        need = f"a divisor of num_heads ({num_heads})"
        require(num_heads % self.num_kv_heads == 0, "num_kv_heads", num_kv_heads, need)
        if head_dim is None:
            require(dim >= num_heads, "num_heads", num_heads, f"at most dim ({dim})")
            head_dim = dim // num_heads
        self.head_dim = require_int("head_dim", head_dim, 1)
        self.dropout = require_rate("dropout", dropout)
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(self.context_dim, self.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(self.context_dim, self.num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, dim, bias=bias)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Any = None) -> Tensor:
        """context: default x itself. mask: anything `regard.ops.attention` takes."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[-1] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        context = x if context is None else context
        need = f"(B, M, {self.context_dim})"
        require(context.shape[-1] == self.context_dim, "context", f"shape {tuple(context.shape)}", need)
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        k = rearrange(self.k_proj(context), "b n (h d) -> b h n d", h=self.num_kv_heads)
        v = rearrange(self.v_proj(context), "b n (h d) -> b h n d", h=self.num_kv_heads)
        out = attention(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, context_dim={self.context_dim}"


class FeedForward(nn.Module):
    """`x + fc2(dropout(gelu(fc1(norm(x)))))`, (..., dim) kept; the hidden width is `round(ratio * dim)`, gelu is the exact one."""

    def __init__(self, dim: int, ratio: float = 4, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = require_int("ratio * dim", round(ratio * dim), 1)
        self.drop_path = require_rate("drop_path", drop_path)
        self.norm = nn.LayerNorm(dim, _EPS)
        self.fc1 = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(require_rate("dropout", dropout))
        self.fc2 = nn.Linear(hidden, dim)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.fc2(self.dropout(F.gelu(self.fc1(self.norm(x)))))
        return x + drop_samples(branch, self.drop_path, self.training)


class PreNormLayer(nn.Module):
    """One Transformer layer: `x + attention(norm(x))`, then `FeedForward`. (B, N, dim) kept.

    Args:
        dim, num_heads: width and heads. ratio: hidden width of the MLP over dim.
        attend: False leaves attention out: a position-wise MLP layer.
        dropout: in the MLP. attention_dropout: of attention weights. drop_path: chance that a sample skips a branch in training.
        attention: a module (x, context=None, mask=None) -> (B, N, dim) in place of `MultiHeadAttention`: the swap seam.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: float = 4,
        attend: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.drop_path = require_rate("drop_path", drop_path)
        self.norm = nn.LayerNorm(dim, _EPS) if attend else None
        self.attention = (
            (attention or MultiHeadAttention(dim, num_heads, dropout=attention_dropout)) if attend else None
        )
        self.mlp = FeedForward(dim, ratio, dropout, drop_path)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if self.norm is not None and self.attention is not None:
            branch = self.attention(self.norm(x), mask=mask)
            x = x + drop_samples(branch, self.drop_path, self.training)
        return self.mlp(x)


class CrossAttend(nn.Module):
    """`x + attention(norm(x) to context_norm(context))`: x (B, N, dim), context (B, M, context_dim) -> (B, N, dim).

    Args:
        dim, context_dim, num_heads, head_dim: as `MultiHeadAttention`.
        norm_context: False attends to the context as it is.
        ratio: with an MLP of this ratio after it (None: none). attention: as in `PreNormLayer`.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        norm_context: bool = True,
        ratio: float | None = None,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, _EPS)
        self.context_norm = nn.LayerNorm(context_dim, _EPS) if norm_context else nn.Identity()
        self.attention = attention or MultiHeadAttention(dim, num_heads, head_dim, context_dim)
        self.mlp = FeedForward(dim, ratio) if ratio is not None else None

    def forward(self, x: Tensor, context: Tensor, mask: Any = None) -> Tensor:
        x = x + self.attention(self.norm(x), self.context_norm(context), mask=mask)
        return x if self.mlp is None else self.mlp(x)
