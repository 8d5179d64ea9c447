"""Mixture-of-Head attention: attention heads as experts, of which each token uses its best few.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842); code read for numbers: SkyworkAI/MoH
(`MoH-DiT/models.py`). The TransNeXt forms (MoH-ViT) are in `nn/spatial/mixture_of_heads_2d.py`, the routing rules, the one without
weights for pretrained LLMs included, in `ops/head_routing.py`.

What differs: losses are returned, not collected in a class-level list; one shared head works (the DiT code has no router for it
and fails; as in MoH-ViT its own gate is 1); `variant="paper"` gives the paper's gates, which the released code rescales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops import masks
from ...ops.attention import attention
from ...ops.head_routing import HeadRouting, selected_rows_attention
from .head_routing import OFFICIAL_ROUTER_KEYS, HeadRouter, head_counts

__all__ = ["MixtureOfHeadAttention"]


class MixtureOfHeadAttention(nn.Module):
    """Self-attention in which every token uses `active` of `num_heads` heads and weighs them: `sum_h g_h(token) head_h W_h`.

    Args:
        dim: channels in and out.
        num_heads: all heads. `heads` is accepted as another spelling.
        shared: heads in use for every token, the first ones (default 0).
        active: heads in use per token, the shared ones INCLUDED; `active - shared` are routed. `active == shared` is allowed only
            when all heads are shared (every token uses all of them, weighted).
        head_dim: channels of a head, independent of `dim` (MoH-DiT: 64 or 72). Default `dim // num_heads`.
        qkv_bias: bias of the q, k, v projection (default False; MoH's networks use True).
        qk_norm: normalise each head's queries and keys with `norm_layer(head_dim)`.
        attn_drop, proj_drop: dropout of attention weights and of the output, in [0, 1).
        skip_inactive: compute attention only for the (head, token) pairs in use, instead of computing all and multiplying by zero.
            Same numbers up to rounding; worth it for long sequences and few active heads.
        causal: a token sees no later ones, whatever `mask` allows.
        variant: "released" (default, the numbers of the authors' checkpoints) or "paper"; see `regard.ops.route_heads`.

    Shapes: `forward(x (B, N, dim), mask=None) -> (B, N, dim)`; with `return_aux=True` a pair of that and a
    `HeadRouting(gates (B, H, N), selected (B, H, N), balance_loss)`. Training adds
    `regard.ops.head_balance_loss([aux of each layer], coefficient=0.01)` to the task's loss.

    Raises:
        ValueError, TypeError: counts that do not fit, `dim` not divisible by `num_heads` without `head_dim`, wrong input shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        shared: int = 0,
        active: int | None = None,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        skip_inactive: bool = False,
        causal: bool = False,
        variant: str = "released",
    ) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.num_heads, shared, active = head_counts(num_heads, heads, shared, active)
        if head_dim is None:
            require(
                dim % self.num_heads == 0,
                "dim",
                dim,
                f"a multiple of num_heads ({self.num_heads}), or an explicit head_dim",
            )
            head_dim = dim // self.num_heads
        self.head_dim = require_int("head_dim", head_dim, 1)
        require(0.0 <= attn_drop < 1.0, "attn_drop", attn_drop, "a probability in [0, 1)")
        self.attn_drop = attn_drop
        self.skip_inactive, self.causal = skip_inactive, bool(causal)
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.router = HeadRouter(dim, self.num_heads, shared, active, variant)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `MoHAttention` state dict (routers `wg`, `wg_0`, `wg_1`) in our names."""
        return {OFFICIAL_ROUTER_KEYS.get(name, name): tensor for name, tensor in state.items()}

    def forward(self, x: Tensor, mask: Any = None, *, return_aux: bool = False) -> Tensor | tuple[Tensor, HeadRouting]:
        """`mask`: who may look at whom, anything `regard.ops.attention` takes (a `regard.masks` mask, a bool tensor)."""
        if self.causal:
            mask = masks.causal if mask is None else masks.as_mask(mask) & masks.causal
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[-1] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        routing = self.router(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        dropout = self.attn_drop if self.training else 0.0
        if self.skip_inactive and self.router.routed is not None:
            shared = self.router.num_shared
            out = selected_rows_attention(q, k, v, routing.selected, shared=shared, mask=mask, dropout=dropout)
        else:
            out = attention(q, k, v, mask=mask, dropout=dropout)
        out = (out * routing.gates.unsqueeze(-1)).transpose(1, 2).flatten(2)
        out = self.proj_drop(self.proj(out))
        return (out, routing) if return_aux else out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
