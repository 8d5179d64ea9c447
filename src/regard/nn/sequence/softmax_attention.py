"""Softmax attention as a mixer with a state: all keys, or a window of them. The yardstick of every other mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_tensor
from ...ops import masks
from ...ops.attention import attention
from ..layers import split_joint_qk
from .pre_norm import require_rate
from .rotary import rotary_table, rotate

__all__ = ["SoftmaxAttention", "SoftmaxState"]


@dataclass
class SoftmaxState:
    """What the layer carries while decoding: k, v (B, Hkv, n, D), at most `window - 1` of them with a window; tokens seen so far;
    which of the n are tokens and no padding, (B, n) bool, None: all."""

    k: Tensor
    v: Tensor
    position: int
    exists: Tensor | None = None

    def select(self, rows: Tensor) -> SoftmaxState:
        """Batch row i becomes what row `rows[i]` was."""
        exists = None if self.exists is None else self.exists[rows]
        return SoftmaxState(self.k[rows], self.v[rows], self.position, exists)


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention: (B, N, dim) -> (B, N, dim).

    Args:
        dim, num_heads, num_kv_heads (default num_heads), head_dim (default dim / num_heads).
        causal: whether a token sees no later ones. window: keys that a token sees, itself included (causal only); None: all.
        rope_base: of rotary positions; None: none. rope_dims: channels of a head that turn, the first ones; default all.
        qk_norm: RMSNorm of each head's queries and keys, before the rotation.
        bias: of the q, k and v projections and of the output. dropout: of attention weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float | None = None,
        rope_dims: int | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        self.num_kv_heads = num_heads if num_kv_heads is None else require_int("num_kv_heads", num_kv_heads, 1)
        require(
            num_heads % self.num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"a divisor of num_heads ({num_heads})"
        )
        require(
            head_dim is not None or dim % num_heads == 0,
            "dim",
            dim,
            f"a multiple of num_heads ({num_heads}), or head_dim",
        )
        self.head_dim = dim // num_heads if head_dim is None else require_int("head_dim", head_dim, 1)
        require(window is None or causal, "window", window, "None where not causal")
        self.causal, self.window = bool(causal), None if window is None else require_int("window", window, 1)
        self.rope_dims = self.head_dim if rope_dims is None else require_int("rope_dims", rope_dims, 2)
        if rope_base is not None:
            name = "head_dim" if rope_dims is None else "rope_dims"
            need = f"an even number for rotary positions, at most head_dim ({self.head_dim})"
            require(self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim, name, self.rope_dims, need)
        self.rope_base, self.dropout = rope_base, require_rate("dropout", dropout)
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: SoftmaxState | None = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, SoftmaxState) with `return_state`; `state`: what an earlier call returned.

        padding_mask: (B, N), nonzero for tokens that exist. The others are seen by nobody but themselves; positions count them.
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, SoftmaxState):
            raise bad_type("state", state, "a SoftmaxState")
        require(self.causal or (state is None and not return_state), "state", "wanted", "a causal layer")
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        past = 0 if state is None else state.position
        q, v = self._temper(q, v, x, past)
        if self.rope_base is not None:
            table = rotary_table(torch.arange(past, past + x.shape[1], device=x.device), self.rope_dims, self.rope_base)
            q, k = rotate(q, table), rotate(k, table)
        q, k = self._map(q, k)
        if state is not None:
            need = f"({x.shape[0]}, {self.num_kv_heads}, n, {k.shape[3]})"
            fits = (*state.k.shape[:2], state.k.shape[3]) == (x.shape[0], self.num_kv_heads, k.shape[3])
            require(fits, "state", f"k of shape {tuple(state.k.shape)}", need)
            k, v = torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2)
        exists = self._exists(x, padding_mask, state)
        mask = self._mask()
        if mask is not None and x.shape[1] == 1 and (self.window is None or k.shape[2] <= self.window):
            mask = None  # the last token may see all that is held
        if exists is not None:
            seen = exists
            there = masks.as_mask(lambda b, h, q_idx, kv_idx: seen[b, kv_idx] | (q_idx == kv_idx))
            mask = there if mask is None else mask & there
        out = self._attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self._combine(out, x)
        if not return_state:
            return y
        if self.window is not None:
            first = max(0, k.shape[2] - self.window + 1)
            k, v = k[:, :, first:].contiguous(), v[:, :, first:].contiguous()  # what no later token can see is freed
            exists = None if exists is None else exists[:, first:]
        return y, SoftmaxState(k, v, past + x.shape[1], exists)

    @torch.no_grad()
    def attention_weights(self, x: Tensor, **options: Any) -> Tensor:
        """Who looks at whom, (B, H, N, N), rows summing to 1: for probes, at the memory of a matrix a head.

        options: of a layer built on this one (`SimilarityAttention`)."""
        require_tensor("x", x, dims=3, floating=True)
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        q, _ = self._temper(q, v, x, 0)
        if self.rope_base is not None:
            table = rotary_table(torch.arange(x.shape[1], device=x.device), self.rope_dims, self.rope_base)
            q, k = rotate(q, table), rotate(k, table)
        q, k = self._map(q, k)
        mask = self._mask()
        length = x.shape[1]
        seen = None if mask is None else mask.materialize(length, length, device=x.device)
        return self._weights(q, k, seen, **options)

    @staticmethod
    def _exists(x: Tensor, padding_mask: Tensor | None, state: SoftmaxState | None) -> Tensor | None:
        """(B, keys) bool, the state's first; None where nothing is padding."""
        before = None if state is None else state.exists
        if padding_mask is not None:
            require_tensor("padding_mask", padding_mask)
            need = f"{tuple(x.shape[:2])}, that of x"
            require(padding_mask.shape == x.shape[:2], "padding_mask", f"shape {tuple(padding_mask.shape)}", need)
        if padding_mask is None and before is None:
            return None
        here = x.new_ones(x.shape[:2], dtype=torch.bool) if padding_mask is None else padding_mask.bool()
        if state is None:
            return here
        before = here.new_ones(len(here), state.k.shape[2]) if before is None else before
        return torch.cat((before, here), dim=1)

    # What layers built on this one change: the projections, queries and values before they meet, who sees whom, what is made of the
    # scores, heads into the output.

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k and v (B, Hkv, N, D), before norms and rotation."""
        q, k, v = (
            rearrange(to(x), "b n (h d) -> b h n d", d=self.head_dim) for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def _temper(self, q: Tensor, v: Tensor, x: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """q and v as they are attended with; x is what they were made of, its first token the one at position `past`."""
        return q, v

    def _map(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, N, D) and k (B, Hkv, N, D) as they meet, after the rotation; the state keeps this k."""
        return q, k

    def _mask(self) -> masks.Mask | None:
        """Who sees whom, padding aside; None: everybody everything."""
        if self.window is not None:
            return masks.sliding_window(self.window) & masks.causal
        return masks.causal if self.causal else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask | None, dropout: float) -> Tensor:
        """q (B, H, N, D), k and v (B, Hkv, M, D), the queries being the last of the M -> the heads' outputs (B, H, N, D)."""
        return attention(q, k, v, mask=mask, dropout=dropout)

    def _weights(self, q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
        """q (B, H, N, D), k (B, Hkv, N, D), `seen` bool broadcastable to (B, H, N, N) -> the weights (B, H, N, N)."""
        scores = q @ k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1).mT * self.head_dim**-0.5
        return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)

    def _combine(self, out: Tensor, x: Tensor) -> Tensor:
        """out (B, H, N, D) of the heads -> (B, N, dim)."""
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """dsf-mqar's `MHA` keeps queries and keys in one matrix `Wqk`; its `Wv` is `v_proj`, its `out_proj` `o_proj`."""
        return split_joint_qk(state, "Wqk", {"Wv": "v_proj", "out_proj": "o_proj"})

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, causal={self.causal}, window={self.window}"
        )
