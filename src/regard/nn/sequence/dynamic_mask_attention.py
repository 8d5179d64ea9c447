"""Dynamic mask attention as a layer: the values say which keys are worth keeping.

Shi et al., "Trainable Dynamic Mask Sparse Attention" (2025, arXiv 2508.02124). Code read for numbers: transformers
`models/doge/modeling_doge.py`, `DogeAttention` (Apache-2.0), and SmallDoges/flash-dmattn @ f024c28, `examples/modeling/modeling_doge.py`
(BSD-3).

What differs: without a mask the layer is causal (Doge's, given none, sees the future); equal biases, as at initialisation, keep the
most recent keys where the authors leave the choice to `torch.topk`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import bad_type, require, require_int, require_name, require_shape, require_tensor
from ...ops.dynamic_mask import SELECTS, dynamic_mask_attention
from .rotary import rotary_table, rotate

FORMS = ("exp", "linear")


@dataclass
class DynamicMaskState:
    """What the layer carries while decoding: k, v (B, Hkv, n, D), the keys' bias (B, Hkv, n) and which keys exist, bool (B, n) or None."""

    k: Tensor
    v: Tensor
    key_bias: Tensor
    key_mask: Tensor | None = None

    @property
    def length(self) -> int:
        return self.k.shape[2]

    def reorder(self, rows: Tensor) -> DynamicMaskState:
        """Batch row i becomes what row `rows[i]` was."""
        mask = None if self.key_mask is None else self.key_mask[rows]
        return DynamicMaskState(self.k[rows], self.v[rows], self.key_bias[rows], mask)


class DynamicMaskAttention(nn.Module):
    """Attention over the `keep` keys with the largest learned bias among those that a query sees: (B, N, dim) -> (B, N, dim).

    The bias of a key comes from the values of all kv heads at its position, one number a kv head: with t = dt_proj(v) it is
    exp(A softplus(t)) ("exp", the paper and the Doge checkpoints) or A softplus(t) ("linear", the authors' later code). It is added to
    the scores, which is how A and dt_proj learn, and it decides who is kept.

    Args:
        dim, num_heads, num_kv_heads (default num_heads), head_dim (default dim / num_heads).
        keep: keys that a query and kv head keep. form: "exp" or "linear".
        qk_norm: RMSNorm on queries and keys, head by head, before the rotary embedding. bias: of all projections.
        block: smooth the choice over blocks of this many keys (see `regard.ops.dynamic_mask_attention`).
        select: "topk", or "relu" (keys with a bias
            above 0, for the linear form).
        causal: whether a query sees only keys up to itself.
        rope_base: of the rotary embedding; None: none. dropout: of attention weights, in training. eps: of the norms.

    The state dict has the names of transformers' `DogeAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        keep: int = 2048,
        form: str = "exp",
        qk_norm: bool = True,
        bias: bool = False,
        block: int | None = None,
        select: str = "topk",
        causal: bool = True,
        rope_base: float | None = 10000.0,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        self.num_kv_heads = num_heads if num_kv_heads is None else require_int("num_kv_heads", num_kv_heads, 1)
        need = f"a divisor of num_heads = {num_heads}"
        require(num_heads % self.num_kv_heads == 0, "num_kv_heads", num_kv_heads, need)
        if head_dim is None:
            require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads}), or a head_dim")
        self.head_dim = dim // num_heads if head_dim is None else require_int("head_dim", head_dim, 1)
        if rope_base is not None:
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, or rope_base=None")
        self.keep, self.form = require_int("keep", keep, 1), require_name("form", form, FORMS)
        self.block = None if block is None else require_int("block", block, 1)
        self.select, self.causal = require_name("select", select, SELECTS), causal
        self.rope_base, self.dropout = rope_base, dropout
        inner, kv = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=bias)
        self.k_proj = nn.Linear(dim, kv, bias=bias)
        self.v_proj = nn.Linear(dim, kv, bias=bias)
        self.A = nn.Parameter(torch.zeros(self.num_kv_heads))
        self.dt_proj = nn.Linear(kv, self.num_kv_heads, bias=bias)
        self.o_proj = nn.Linear(inner, dim, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()

    def key_bias(self, v: Tensor) -> Tensor:
        """Values (B, Hkv, N, D) -> the bias of their keys (B, Hkv, N)."""
        t = self.dt_proj(rearrange(v, "b h n d -> b n (h d)"))
        bias = self.A * F.softplus(t)
        return (bias.exp() if self.form == "exp" else bias).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: DynamicMaskState | None = None,
        return_state: bool = False,
        backend: str = "auto",
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim); with `return_state`, (that, DynamicMaskState).

        Args:
            padding_mask: (B, N), nonzero for tokens that exist; the others are seen by nobody. A padded query gives what it sees.
            positions: int (B, N) or (N,) for the rotary embedding; default: counted on from the state.
            state: what an earlier call returned; x continues that sequence. backend: as in `regard.ops.attention`.
        """
        self._check(x, padding_mask, state)
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        past = 0 if state is None else state.length
        if self.rope_base is not None:
            positions = torch.arange(past, past + x.shape[1], device=x.device) if positions is None else positions
            table = rotary_table(positions, self.head_dim, self.rope_base)
            table = table if positions.dim() == 1 else (table[0][:, None], table[1][:, None])
            q, k = rotate(q, table), rotate(k, table)
        bias, mask = self.key_bias(v), None if padding_mask is None else padding_mask.bool()
        if state is not None:
            if mask is not None or state.key_mask is not None:
                before = (
                    state.key_mask if state.key_mask is not None else x.new_ones(x.shape[0], past, dtype=torch.bool)
                )
                mask = torch.cat((before, x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask), dim=1)
            k, v = torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2)
            bias = torch.cat((state.key_bias, bias), dim=2)
        out = dynamic_mask_attention(
            q,
            k,
            v,
            bias,
            self.keep,
            causal=self.causal,
            key_mask=mask,
            select=self.select,
            block=self.block,
            dropout=self.dropout if self.training else 0.0,
            backend=backend,
        )
        y = self.o_proj(rearrange(out, "b h n d -> b n (h d)"))
        return (y, DynamicMaskState(k, v, bias, mask)) if return_state else y

    def _check(self, x: Tensor, padding_mask: Tensor | None, state: DynamicMaskState | None) -> None:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if padding_mask is not None:
            require_tensor("padding_mask", padding_mask)
            need = f"shape {tuple(x.shape[:2])}"
            require(padding_mask.shape == x.shape[:2], "padding_mask", f"shape {tuple(padding_mask.shape)}", need)
        if state is not None:
            if not isinstance(state, DynamicMaskState):
                raise bad_type("state", state, "a DynamicMaskState")
            require(self.causal, "state", "a state", "a causal layer")
            require_shape("state.k", state.k, (x.shape[0], self.num_kv_heads, None, self.head_dim))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, keep={self.keep}, form={self.form!r}"
