"""One interface for attention layers that can do some of four patterns: {self, cross} x {non-causal, causal}.

CAB (Zhang et al. 2023, ICML, arXiv 2210.07661) compares methods by swapping the layer; every layer here is built as
`Layer(dim, num_heads, causal=..., cross=...)` and called as `layer(x, context=None, keys=None)`. Parameter names are those of the
authors' package `efficient_attention` (Shark-NLP/CAB @ 0e49696, MIT), so that state dicts load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops import masks
from ...ops.attention import attention
from .pre_norm import require_rate

__all__ = [
    "PATTERNS",
    "LocalAttention",
    "OpAttention",
    "PatternAttention",
    "VanillaAttention",
    "pattern_name",
    "segment_means",
]

PATTERNS = ("NS", "CS", "NC", "CC")
"""Non-causal self, causal self, non-causal cross, causal cross: a causal one serves a decoder that writes token by token. In causal CROSS
attention the queries come one by one while the whole context is known: an output may depend on no later query."""


def pattern_name(causal: bool, cross: bool) -> str:
    return ("C" if causal else "N") + ("C" if cross else "S")


class PatternAttention(nn.Module):
    """Base: checks the pattern and the input. A subclass says `patterns` and has `forward(x, context=None, keys=None)`.

    x (B, N, dim); context (B, M, dim), only with cross=True; keys: (B, M) bool, True for real ones (of x, or of context).
    """

    patterns: ClassVar[frozenset[str]] = frozenset(PATTERNS)

    def __init__(self, dim: int, num_heads: int, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        require_int("num_heads", num_heads, 1)
        require(require_int("dim", dim, 1) % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.dim, self.num_heads, self.head_dim, self.causal, self.cross = (
            dim,
            num_heads,
            dim // num_heads,
            causal,
            cross,
        )
        known = ", ".join(name for name in PATTERNS if name in self.patterns)
        wanted = pattern_name(causal, cross)
        require(
            wanted in self.patterns,
            "causal, cross",
            (causal, cross),
            f"a pattern that {type(self).__name__} can do ({known})",
        )

    def check(self, x: Tensor, context: Tensor | None, keys: Tensor | None) -> Tensor:
        """What is attended to: the context, or x itself."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[-1] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        need = "a context with cross=True and none without"
        require((context is not None) == self.cross, "context", "none" if context is None else "one", need)
        source = x if context is None else context
        fits = source.dim() == 3 and source.shape[0] == x.shape[0] and source.shape[-1] == self.dim
        require(fits, "context", f"shape {tuple(source.shape)}", f"({x.shape[0]}, M, {self.dim})")
        if keys is not None:
            require(keys.shape == source.shape[:2], "keys", f"shape {tuple(keys.shape)}", f"{tuple(source.shape[:2])}")
        return source

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, pattern={pattern_name(self.causal, self.cross)!r}"


class ProjectedAttention(PatternAttention):
    """Base of those that differ in what is done with q, k and v (B, H, N, D): a subclass has `mix(q, k, v, keys)`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross)
        self.dropout = require_rate("dropout", dropout)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(proj.weight, gain=1.0 if proj is self.out_proj else 1 / math.sqrt(2))
            if bias:
                nn.init.zeros_(proj.bias)

    def forward(self, x: Tensor, context: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        source = self.check(x, context, keys)
        if not x.shape[1] or not source.shape[1]:
            return self.out_proj(torch.zeros_like(x))
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        k = rearrange(self.k_proj(source), "b n (h d) -> b h n d", h=self.num_heads)
        v = rearrange(self.v_proj(source), "b n (h d) -> b h n d", h=self.num_heads)
        return self.out_proj(rearrange(self.mix(q, k, v, keys), "b h n d -> b n (h d)"))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        raise NotImplementedError

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, keys: Tensor | None) -> Tensor:
        if keys is not None:
            real = masks.dense(keys.bool()[:, None, None])
            mask = real if mask is None else mask & real
        return attention(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)


class VanillaAttention(ProjectedAttention):
    """Softmax attention, the yardstick: all four patterns."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        return self.softmax_attention(q, k, v, masks.causal if self.causal and not self.cross else None, keys)


class LocalAttention(ProjectedAttention):
    """A window: causal, the last `window` keys, own one included; else `window` keys on each side. Self only.

    Padding works (in the authors' code padding inside a window is attended to).
    """

    patterns = frozenset({"NS", "CS"})

    def __init__(
        self, dim: int, num_heads: int, causal: bool = False, cross: bool = False, window: int = 15, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.window = require_int("window", window, 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        near = (
            masks.sliding_window(self.window) & masks.causal if self.causal else masks.sliding_window(self.window + 1)
        )
        return self.softmax_attention(q, k, v, near, keys)


class OpAttention(ProjectedAttention):
    """Any function (q, k, v) -> (B, H, N, Dv) between the four projections: how an op of `regard.ops` takes part.

    op: e.g. `partial(regard.ops.linear_attention, feature_map="elu+1")`. The pattern is the caller's word; see
    `regard.bench.cab.causality_test`. Padding is not passed on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        op: Callable[[Tensor, Tensor, Tensor], Tensor] = attention,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.op = op

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        require(keys is None, "keys", "given", "none: a plain op does not know of padding")
        return self.op(q, k, v)


def softmax_over_keys(scores: Tensor, keys: Tensor | None, dim: int = -1) -> Tensor:
    """Softmax of scores along the keys' axis; keys: bool that broadcasts to scores, True for real ones. Zeros where none is real."""
    if keys is None:
        return scores.softmax(dim)
    weights = scores.masked_fill(~keys, torch.finfo(scores.dtype).min).softmax(dim)
    return weights.masked_fill(~keys, 0.0)


def segment_means(x: Tensor, count: int) -> Tensor:
    """Means of `count` consecutive pieces of x (..., N, D), as even as can be, the longer ones last: (..., count, D).

    N <= count: x itself.
    """
    length = x.shape[-2]
    if length <= count:
        return x
    size, longer = divmod(length, count)
    shorter = count - longer
    split = shorter * size
    first = x[..., :split, :].unflatten(-2, (shorter, size)).mean(-2)
    if not longer:
        return first
    return torch.cat([first, x[..., split:, :].unflatten(-2, (longer, size + 1)).mean(-2)], dim=-2)
