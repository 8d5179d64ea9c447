"""Plain softmax blocks of DeiT and PVT, which networks with other attentions keep in some of their stages.

Touvron et al. (2020, arXiv 2012.12877); Wang et al., "Pyramid Vision Transformer" (2021, arXiv 2102.12122): keys and values from a copy of
the image reduced by a strided convolution. Numbers: LeapLabTHU/Agent-Attention @ 207ce3e, `agent_{deit,pvt}.py`, the blocks of type "B".
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.attention import attention
from ..sequence.pre_norm import require_rate
from .agent_attention import rename_agent_attention
from .block_parts import Mlp, WindowedBlock, tokens_to_map
from .grids import Grid, grid_pair

__all__ = ["SoftmaxBlock", "SpatialReductionAttention"]


class SpatialReductionAttention(nn.Module):
    """Softmax attention over a grid, keys and values reduced by `sr_ratio`: (B, tokens, dim) -> the same.

    Args:
        dim, num_heads, grid: as usual; the grid's tokens come rows first, behind `cls_tokens` others.
        sr_ratio: side and stride of the convolution before keys and values; 1: none. Not together with `cls_tokens`.
        qkv_bias. proj_drop: of the output.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: int | Grid, cls_tokens: int = 0, sr_ratio: int = 1, *, qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.grid, self.sr_ratio = grid_pair("grid", grid), require_int("sr_ratio", sr_ratio, 1)
        self.cls_tokens = require_int("cls_tokens", cls_tokens)
        require(sr_ratio <= min(self.grid), "sr_ratio", sr_ratio, f"at most the shorter side of grid {self.grid}")
        require(sr_ratio == 1 or cls_tokens == 0, "cls_tokens", cls_tokens, "0 together with sr_ratio > 1")
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        if sr_ratio > 1:
            self.reduction = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.reduction_norm = nn.LayerNorm(dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(require_rate("proj_drop", proj_drop))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """PVT's `Attention` or timm's, whose `qkv` is split."""
        return rename_agent_attention(state)

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        grid = self.grid if grid is None else grid_pair("grid", grid)
        need = (self.cls_tokens + math.prod(grid), self.dim)
        require(tuple(x.shape[1:]) == need, "x", f"shape {tuple(x.shape)}", f"(B, {need[0]}, {need[1]})")
        source = x
        if self.sr_ratio > 1:
            source = self.reduction_norm(self.reduction(tokens_to_map(x, grid)).flatten(2).transpose(1, 2))
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(x), *self.kv(source).chunk(2, dim=-1))
        )
        return self.proj_drop(self.proj(attention(q, k, v).transpose(1, 2).flatten(2)))


class SoftmaxBlock(WindowedBlock):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, attention being `SpatialReductionAttention`: (B, tokens, dim) kept.

    Args:
        dim, num_heads, grid, cls_tokens, sr_ratio, qkv_bias: as there. mlp_ratio: hidden width of the MLP over dim.
        drop: after projections; drop_path: stochastic depth. norm_eps: of the LayerNorms.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: int | Grid, cls_tokens: int = 0, sr_ratio: int = 1, *, mlp_ratio: float = 4.0,
        qkv_bias: bool = True, drop: float = 0.0, drop_path: float = 0.0, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(grid, None, 0, cls_tokens)
        self.drop_path = require_rate("drop_path", drop_path)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=norm_eps), nn.LayerNorm(dim, eps=norm_eps)
        self.attn = SpatialReductionAttention(
            dim, num_heads, grid, cls_tokens, sr_ratio, qkv_bias=qkv_bias, proj_drop=drop
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
