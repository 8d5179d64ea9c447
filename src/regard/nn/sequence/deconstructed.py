"""Attention with one ingredient taken out: no mixing, no softmax, no pairs of tokens, or maps that do not look at the text.

Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (Xue, Moosavi and Aletras 2025, arXiv
2510.11602); no code was found, so nothing is pinned to the authors' numbers. What the paper leaves open and is chosen here: no rotary
positions in `CumulativeScoreAttention` (a query and a key at one place turn alike), and the jointly normalised Taylor form (the paper's
appendix writes three terms normalised apart, which is no expansion of the softmax). Models: `regard.models.DeconstructedLM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_shape, require_tensor
from ...ops import masks
from ...ops.attention import attention
from ...ops.state.linear_scan import linear_scan
from .based import BasedLinearAttention
from .rotary import rotary_table, rotate

__all__ = [
    "CumulativeScoreAttention",
    "CumulativeState",
    "FixedMapAttention",
    "FixedMapState",
    "GatedMLPMixer",
    "TaylorAttention",
]


class GatedMLPMixer(nn.Module):
    """No mixing at all: down(silu(gate(x)) * up(x)), token by token, (B, N, dim) -> (B, N, dim); the paper's "MLP".

    Args:
        dim. num_heads: taken so that it can stand where attention stands; not used. hidden: default dim * 4 / 3, rounded: the parameters
            of four dim x dim projections.
    """

    causal = True

    def __init__(self, dim: int, num_heads: int = 1, *, hidden: int | None = None) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        hidden = max(1, round(dim * 4 / 3)) if hidden is None else require_int("hidden", hidden, 1)
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, *, state: Any = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, the number of tokens seen as an int64 scalar) with `return_state`."""
        _check(x, self.dim)
        y = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        if not return_state:
            return y
        seen = torch.tensor(0) if state is None else require_tensor("state", state, dims=0)
        return y, seen + x.shape[1]


class TaylorAttention(BasedLinearAttention):
    """Weights 1 + s + s^2 / 2 in place of exp(s), s = q . k / sqrt(head_dim), over their sum; causal. The paper's "Approximate".

    Based's layer (paper 015) with queries and keys as wide as a head: (B, N, dim) -> (B, N, dim). No positions.
    """

    def __init__(self, dim: int, num_heads: int, causal: bool = True) -> None:
        require_int("dim", dim, 1)
        require(dim % require_int("num_heads", num_heads, 1) == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        super().__init__(dim, num_heads, causal, feature_dim=dim // num_heads)


@dataclass
class CumulativeState:
    """A weighted mean so far: the largest score (B, H), the sum of exp(score - largest) (B, H), of that times v (B, H, D)."""

    largest: Tensor
    total: Tensor
    mean: Tensor

    def select(self, rows: Tensor) -> CumulativeState:
        """Batch row i becomes what row `rows[i]` was."""
        return CumulativeState(self.largest[rows], self.total[rows], self.mean[rows])


class CumulativeScoreAttention(nn.Module):
    """One score a token, from itself alone: o_i = sum_(j <= i) exp(e_j) v_j / sum_(j <= i) exp(e_j). The paper's "Non-approximate".

    e_j = q_j . k_j / sqrt(head_dim), q = silu(W_q x), k = W_k x. Softmax attention whose queries have no say: who reads does not matter.

    Args:
        dim, num_heads: dim a multiple. qk_norm: RMSNorm of q and k, a head at a time (the paper's 1.7B model has it; without, training it
            in every layer fails there). bias: of the projections.

    The state is a running mean, constant in size.
    """

    causal = True

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = _heads(dim, num_heads)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def scores(self, x: Tensor) -> Tensor:
        """e (B, H, N) in at least float32."""
        _check(x, self.dim)
        q, k = (
            rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (F.silu(self.q_proj(x)), self.k_proj(x))
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        return (self.q_norm(q).to(wide) * self.k_norm(k).to(wide)).sum(-1) * self.head_dim**-0.5

    def forward(self, x: Tensor, *, state: CumulativeState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, CumulativeState) with `return_state`; `state`: what an earlier call returned."""
        score = self.scores(x)
        v = rearrange(self.v_proj(x), "b n (h d) -> b h n d", h=self.num_heads).to(score.dtype)
        if state is not None and not isinstance(state, CumulativeState):
            raise bad_type("state", state, "a CumulativeState")
        if state is not None:
            require_shape("state.largest", state.largest, score.shape[:2])
            require_shape("state.mean", state.mean, (*score.shape[:2], v.shape[3]))
        if state is None:
            first = score.new_full(score.shape[:2], -torch.inf)
            state = CumulativeState(first, torch.zeros_like(first), torch.zeros_like(v[:, :, :0].sum(2)))
        if not x.shape[1]:
            return (x, state) if return_state else x
        # kept relative to the largest score so far: nothing overflows, and early tokens survive a large later score
        largest = torch.cat((state.largest[..., None], score), dim=2).cummax(dim=2).values.detach()
        stay = torch.exp(largest[..., :-1] - largest[..., 1:])
        enter = torch.exp(score - largest[..., 1:])
        total = linear_scan(stay, enter, state.total, dim=2)
        mean = linear_scan(stay[..., None], enter[..., None] * v, state.mean, dim=2)
        y = self.o_proj(rearrange(mean / total[..., None], "b h n d -> b n (h d)").to(x.dtype))
        return (y, CumulativeState(largest[..., -1], total[..., -1], mean[..., -1, :])) if return_state else y

    @torch.no_grad()
    def attention_weights(self, x: Tensor) -> Tensor:
        """(B, H, N, N): row i is softmax of e_0 ... e_i."""
        score = self.scores(x)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return score[:, :, None].masked_fill(~seen, -torch.inf).softmax(-1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


@dataclass
class FixedMapState:
    """Values so far, (B, H, n, D). The keys are known without the text."""

    v: Tensor

    def select(self, rows: Tensor) -> FixedMapState:
        """Batch row i becomes what row `rows[i]` was."""
        return FixedMapState(self.v[rows])


class FixedMapAttention(nn.Module):
    """Causal softmax attention whose queries and keys come from elsewhere: (B, N, dim) -> (B, N, dim), values from x.

    Alone, they come from `noise`, drawn once and never trained: every text gets the same maps. With `source` (B or 1, N, dim) from that:
    `DeconstructedLM` hands over what its layers make of noise ("random"), of one fixed text ("sequence"), or the embeddings ("static").

    Args:
        dim, num_heads: dim a multiple. max_len: tokens of the noise. std: of the noise; the paper does not say, 0.02 is that of embeddings;
            as queries and keys are linear in it, larger is sharper. rope_base: of rotary positions; None: none.
    """

    causal = True

    def __init__(
        self, dim: int, num_heads: int, *, max_len: int = 2048, std: float = 0.02, rope_base: float | None = None
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = _heads(dim, num_heads)
        require(std > 0, "std", std, "a number > 0")
        if rope_base is not None:
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number for rotary positions")
        self.rope_base = rope_base
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.noise: Tensor
        self.register_buffer("noise", torch.randn(require_int("max_len", max_len, 1), dim) * std)

    def _maps(self, source: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (rearrange(to(source), "b n (h d) -> b h n d", h=self.num_heads) for to in (self.q_proj, self.k_proj))
        if self.rope_base is None:
            return q, k
        table = rotary_table(torch.arange(source.shape[1], device=source.device), self.head_dim, self.rope_base)
        return rotate(q, table), rotate(k, table)

    def _source(self, source: Tensor | None, length: int, batch: int) -> Tensor:
        if source is None:
            most = len(self.noise)
            require(length <= most, "x", f"{length} tokens", f"at most max_len ({most}), or a source")
            return self.noise[None, :length]
        _check(source, self.dim, "source")
        shape = tuple(source.shape)
        fits = shape[0] in (1, batch) and shape[1] == length
        require(fits, "source", f"shape {shape}", f"({batch} or 1, {length}, {self.dim})")
        return source

    def forward(
        self,
        x: Tensor,
        *,
        source: Tensor | None = None,
        state: FixedMapState | None = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, FixedMapState) with `return_state`.

        source: (B or 1, n, dim) for all n tokens, those of the state included; None: the noise.
        """
        _check(x, self.dim)
        v = rearrange(self.v_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        if state is not None:
            if not isinstance(state, FixedMapState):
                raise bad_type("state", state, "a FixedMapState")
            require_shape("state.v", state.v, (*v.shape[:2], None, v.shape[3]))
            v = torch.cat((state.v, v), dim=2)
        q, k = self._maps(self._source(source, v.shape[2], len(x)))
        q, k = (t.expand(len(x), -1, -1, -1) for t in (q, k))
        out = attention(q[:, :, q.shape[2] - x.shape[1] :], k, v, mask=masks.causal)
        y = self.o_proj(rearrange(out, "b h n d -> b n (h d)"))
        return (y, FixedMapState(v)) if return_state else y

    @torch.no_grad()
    def attention_weights(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """(B or 1, H, N, N); of x only the length matters."""
        q, k = self._maps(self._source(source, x.shape[1], len(x)))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return (q @ k.mT * self.head_dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _heads(dim: int, num_heads: int) -> tuple[int, int, int]:
    require_int("dim", dim, 1)
    require(dim % require_int("num_heads", num_heads, 1) == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
    return dim, num_heads, dim // num_heads


def _check(x: Tensor, dim: int, name: str = "x") -> None:
    require_tensor(name, x, dims=3, floating=True)
    require(x.shape[2] == dim, name, f"shape {tuple(x.shape)}", f"(B, N, {dim})")
