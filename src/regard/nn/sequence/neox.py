"""GPT-NeoX decoder layers on embeddings, with a cache: what Pythia and the Block Transformer are stacked of.

Parameter names inside a layer are those of Hugging Face's `GPTNeoXLayer`, so that state dicts load as they are; the numbers were
checked against it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_fraction, require_int, require_tensor
from ...ops import masks
from ...ops.attention import attention
from ...ops.growing_store import GrowingStore
from .rotary import rotary_table, rotate

__all__ = ["NeoXLayer", "NeoXStack"]

_STD = 0.02


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rotary_dims: int) -> None:
        super().__init__()
        self.num_heads, self.rotary_dims = num_heads, rotary_dims
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.dense = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Any, store: GrowingStore | None) -> Tensor:
        qkv = rearrange(self.query_key_value(x), "b n (h c d) -> c b h n d", h=self.num_heads, c=3)
        q, k, v = qkv.unbind(0)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if store is not None:
            k, v = store.append(k, v)
        return self.dense(rearrange(attention(q, k, v, mask=mask), "b h n d -> b n (h d)"))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class NeoXLayer(nn.Module):
    """One layer, (B, N, dim) kept: attention and MLP side by side on the same input (`parallel`), or one after the other."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, rotary_dims: int, parallel: bool, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attention = _Attention(dim, num_heads, rotary_dims)
        self.mlp = _MLP(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Any, store: GrowingStore | None = None
    ) -> Tensor:
        """turn: `rotary_table` of the rows. mask: as `regard.ops.attention`. store: keys and values before, extended in place."""
        seen = x + self.dropout(self.attention(self.input_layernorm(x), turn, mask, store))
        normed = self.post_attention_layernorm(x if self.parallel else seen)
        return seen + self.dropout(self.mlp(normed))


class NeoXStack(nn.Module):
    """Causal GPT-NeoX layers and the final norm: embeddings (B, N, dim) -> (B, N, dim).

    Args:
        num_layers, dim, num_heads: as usual. hidden: width of the MLPs (default 4 dim).
        rotary: share of a head's channels that carry the position. rotary_base: of the angles.
        parallel: attention and MLP side by side. eps: of the norms. dropout: of both branches, in training.

    Weights start normal with deviation 0.02, biases at zero.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        hidden: int | None = None,
        rotary: float = 0.25,
        rotary_base: float = 10000.0,
        parallel: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_int("num_layers", num_layers, 0)
        require_int("num_heads", num_heads, 1)
        require(require_int("dim", dim, 1) % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.dim, self.num_heads, self.rotary_base = dim, num_heads, rotary_base
        self.rotary_dims = int(dim // num_heads * require_fraction("rotary", rotary))
        require(self.rotary_dims % 2 == 0, "rotary", rotary, f"an even number of channels, not {self.rotary_dims}")
        self.layers = nn.ModuleList(
            NeoXLayer(dim, num_heads, hidden or 4 * dim, self.rotary_dims, parallel, eps, dropout)
            for _ in range(num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(dim, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def new_stores(self, page: int = 128) -> list[GrowingStore]:
        """An empty cache: one store a layer."""
        return [GrowingStore(page) for _ in self.layers]

    def forward(
        self,
        x: Tensor,
        seen: Tensor | None = None,
        stores: list[GrowingStore] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x: the embeddings, or with `stores` (see `new_stores`) those of the rows after what is stored.

        seen: (B, past + N) bool, False where a key is padding that nobody may look at. positions: (N,) ints for the rotary
        angles (default: counted on from what is stored). Without gradients when `stores` are given.
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[-1] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        past = stores[0].length if stores else 0
        turn = None
        if self.rotary_dims:
            if positions is None:
                positions = torch.arange(past, past + x.shape[1], device=x.device)
            turn = rotary_table(positions, self.rotary_dims, self.rotary_base)
        mask: Any = masks.causal if x.shape[1] > 1 else None
        if seen is not None:
            need = f"({len(x)}, {past + x.shape[1]})"
            require(seen.shape == (len(x), past + x.shape[1]), "seen", f"shape {tuple(seen.shape)}", need)
            keys = masks.dense(seen.bool()[:, None, None])
            mask = keys if mask is None else mask & keys
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, None if stores is None else stores[i])
        return self.final_layer_norm(x)
