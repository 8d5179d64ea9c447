"""Mixture-of-Head attention on image grids: the two attentions of TransNeXt with routed heads (MoH-ViT).

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842) on TransNeXt (Shi, 2023,
arXiv 2311.17132); code read for numbers: SkyworkAI/MoH, `MoH-ViT/attention.py`, `attention_native.py`, `transnext.py`.

Both use cosine similarity times a learned temperature times the logarithm of the number of keys a query sees, a learned query
embedding per head, and position biases from a small MLP over log-spaced relative coordinates. The position tables belong to the
grid, so the layer builds them itself instead of taking them as arguments of every call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_int, require_tensor
from ...ops.attention import attention
from ...ops.head_routing import HeadRouting
from ...ops.reference import accumulation_dtype
from ..sequence.head_routing import OFFICIAL_ROUTER_KEYS, HeadRouter, head_counts
from .grids import Grid, grid_pair

__all__ = ["MixtureOfHeadAggregatedAttention", "MixtureOfHeadCosineAttention", "log_relative_positions"]

_POSITION_KEYS = {f"cpb_fc{i}.{p}": f"position.fc{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}


def log_relative_positions(
    query_grid: Grid, key_grid: Grid, pretrain_grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """TransNeXt's relative coordinates between the cells of two grids laid over the same image.

    Keys stand at the averages of the query rows and columns that adaptive pooling gives them. Differences are scaled so that the
    largest distance of `pretrain_grid` (default `query_grid`) is 8, then to sign(x) log2(1 + |x|) / 3.

    Returns:
        `index` (N, M) int64 into `table` (T, 2) float32, the distinct (row, column) coordinates in rising order; N and M count
        the cells of the two grids row by row.
    """
    pretrain_grid = pretrain_grid or query_grid
    axes = []
    for queries, keys, trained in zip(query_grid, key_grid, pretrain_grid):
        at = torch.arange(queries, dtype=torch.float32)
        key_at = F.adaptive_avg_pool1d(at[None], keys)[0]
        axes.append((at[:, None] - key_at[None, :]) / max(trained - 1, 1) * 8)
    rows = axes[0][:, None, :, None].expand(-1, query_grid[1], -1, key_grid[1])
    columns = axes[1][None, :, None, :].expand(query_grid[0], -1, key_grid[0], -1)
    table, index = torch.stack([rows, columns], -1).reshape(-1, 2).unique(return_inverse=True, dim=0)
    table = table.sign() * torch.log2(table.abs() + 1.0) / math.log2(8)
    return index.reshape(math.prod(query_grid), math.prod(key_grid)), table


class _PositionBias(nn.Module):
    """MLP 2 -> 512 -> heads over the distinct relative coordinates; `forward() -> (H, N, M)`. The tables are not saved."""

    index: Tensor
    table: Tensor

    def __init__(self, num_heads: int, query_grid: Grid, key_grid: Grid, pretrain_grid: Grid | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, num_heads)
        index, table = log_relative_positions(query_grid, key_grid, pretrain_grid)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def forward(self) -> Tensor:
        per_offset = self.fc2(F.relu(self.fc1(self.table.to(self.fc1.weight.dtype))))
        return per_offset.t()[:, self.index]


class _MixtureOfHead2d(nn.Module):
    """What both forms share: checks, routing, the scaled cosine query and the gated output."""

    def __init__(
        self,
        dim: int,
        grid: int | Grid,
        num_heads: int | None,
        shared: int,
        active: int | None,
        heads: int | None,
        attn_drop: float,
        proj_drop: float,
        variant: str,
    ) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.grid = grid_pair("grid", grid)
        self.num_heads, shared, active = head_counts(num_heads, heads, shared, active)
        require(dim % self.num_heads == 0, "dim", dim, f"a multiple of num_heads ({self.num_heads})")
        self.head_dim = dim // self.num_heads
        require(0.0 <= attn_drop < 1.0, "attn_drop", attn_drop, "a probability in [0, 1)")
        self.attn_drop = attn_drop
        # softplus(temperature) starts at 1 / 0.24
        self.temperature = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(self.num_heads, 1, self.head_dim), std=0.02)
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.router = HeadRouter(dim, self.num_heads, shared, active, variant)

    def _check(self, x: Tensor) -> None:
        require_tensor("x", x, dims=3, floating=True)
        need = (math.prod(self.grid), self.dim)
        require(
            tuple(x.shape[1:]) == need,
            "x",
            f"shape {tuple(x.shape)}",
            f"(B, {need[0]}, {need[1]}) for grid {self.grid}",
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _scaled(self, unit_q: Tensor, log_length: Tensor | float) -> Tensor:
        return (unit_q + self.query_embedding) * F.softplus(self.temperature) * log_length

    def _output(self, x: Tensor, out: Tensor, return_aux: bool) -> Tensor | tuple[Tensor, HeadRouting]:
        routing = self.router(x)
        out = (out * routing.gates.unsqueeze(-1)).transpose(1, 2).flatten(2)
        out = self.proj_drop(self.proj(out))
        return (out, routing) if return_aux else out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}, num_heads={self.num_heads}"


class MixtureOfHeadCosineAttention(_MixtureOfHead2d):
    """Length-scaled cosine attention over the whole grid with routed heads (last stage of MoH-ViT).

    Args:
        dim: channels, a multiple of the number of heads.
        grid: (height, width) of the token grid, or an int for a square one.
        num_heads (or `heads`), shared, active: as in `regard.nn.MixtureOfHeadAttention`; `active` includes the shared heads.
        pretrain_grid: grid of the pretraining resolution, to scale relative coordinates by when running at another one.
        qkv_bias: bias of the q, k, v projection (default True, as in TransNeXt).
        attn_drop, proj_drop: dropout of attention weights and of the output, in [0, 1).
        variant: "released" or "paper" gates, see `regard.ops.route_heads`.

    Shapes: `forward(x (B, height * width, dim)) -> ` the same; rows first. `return_aux=True` adds the `HeadRouting`.
    """

    def __init__(
        self,
        dim: int,
        grid: int | Grid,
        num_heads: int | None = None,
        shared: int = 0,
        active: int | None = None,
        *,
        heads: int | None = None,
        pretrain_grid: int | Grid | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        variant: str = "released",
    ) -> None:
        super().__init__(dim, grid, num_heads, shared, active, heads, attn_drop, proj_drop, variant)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        trained = None if pretrain_grid is None else grid_pair("pretrain_grid", pretrain_grid)
        self.position = _PositionBias(self.num_heads, self.grid, self.grid, trained)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `Attention` (MoH-ViT/attention.py) state dict in our names."""
        names = OFFICIAL_ROUTER_KEYS | _POSITION_KEYS
        return {names.get(name, name): tensor for name, tensor in state.items()}

    def forward(self, x: Tensor, *, return_aux: bool = False) -> Tensor | tuple[Tensor, HeadRouting]:
        self._check(x)
        q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        q = self._scaled(F.normalize(q, dim=-1), math.log(math.prod(self.grid)))
        dropout = self.attn_drop if self.training else 0.0
        out = attention(q, F.normalize(k, dim=-1), v, bias=self.position()[None], scale=1.0, dropout=dropout)
        return self._output(x, out, return_aux)


class MixtureOfHeadAggregatedAttention(_MixtureOfHead2d):
    """TransNeXt's aggregated attention with routed heads (first three stages of MoH-ViT).

    Each token looks at its local window and at a pooled copy of the whole grid, in one softmax. On the window's values a learned,
    query-dependent weight is added to the softmax weight. Queries near the border see fewer window cells.

    Args:
        dim, grid, num_heads (or `heads`), shared, active, pretrain_grid, attn_drop, proj_drop, variant: as in
            `MixtureOfHeadCosineAttention`.
        window: side of the local window, odd (default 3).
        sr_ratio: the pooled grid is `grid // sr_ratio` (default 1).
        pool_grid: the pooled grid itself, an int or (height, width), instead of `sr_ratio`.
        qkv_bias: bias of the q and kv projections (default True).
    """

    outside: Tensor
    log_length: Tensor

    def __init__(
        self,
        dim: int,
        grid: int | Grid,
        num_heads: int | None = None,
        shared: int = 0,
        active: int | None = None,
        *,
        heads: int | None = None,
        window: int = 3,
        sr_ratio: int = 1,
        pool_grid: int | Grid | None = None,
        pretrain_grid: int | Grid | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        variant: str = "released",
    ) -> None:
        super().__init__(dim, grid, num_heads, shared, active, heads, attn_drop, proj_drop, variant)
        self.window = require_int("window", window, 1)
        require(window % 2 == 1, "window", window, "an odd number")
        if pool_grid is None:
            require_int("sr_ratio", sr_ratio, 1)
            require(sr_ratio <= min(self.grid), "sr_ratio", sr_ratio, f"at most the shorter side of grid {self.grid}")
            pool_grid = (self.grid[0] // sr_ratio, self.grid[1] // sr_ratio)
        self.pool_grid = grid_pair("pool_grid", pool_grid)
        fits = all(small <= large for small, large in zip(self.pool_grid, self.grid))
        require(fits, "pool_grid", self.pool_grid, f"at most grid {self.grid}")
        cells, self.pool_cells = window * window, math.prod(self.pool_grid)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.pool_proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.pool_norm = nn.LayerNorm(dim)
        trained = None if pretrain_grid is None else grid_pair("pretrain_grid", pretrain_grid)
        self.position = _PositionBias(self.num_heads, self.grid, self.pool_grid, trained)
        self.local_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.num_heads, cells), std=0.0004))
        self.local_tokens = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(self.num_heads, self.head_dim, cells), std=0.02)
        )
        self.local_token_bias = nn.Parameter(torch.zeros(self.num_heads, 1, cells))
        inside = self._windows(torch.ones(1, 1, *self.grid))[0, 0] > 0  # (cells, N)
        self.register_buffer("outside", ~inside.t(), persistent=False)
        self.register_buffer(
            "log_length", torch.log(inside.sum(0, dtype=torch.float32) + self.pool_cells)[:, None], persistent=False
        )

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `AggregatedAttention` (attention_native.py) state dict in our names."""
        names = OFFICIAL_ROUTER_KEYS | _POSITION_KEYS
        names |= {f"sr.{p}": f"pool_proj.{p}" for p in ("weight", "bias")}
        names |= {f"norm.{p}": f"pool_norm.{p}" for p in ("weight", "bias")}
        names |= {
            "relative_pos_bias_local": "local_bias",
            "learnable_tokens": "local_tokens",
            "learnable_bias": "local_token_bias",
        }
        return {names.get(name, name): tensor for name, tensor in state.items()}

    def _windows(self, maps: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, C, window cells, N), zeros outside the grid."""
        return F.unfold(maps, self.window, padding=self.window // 2).unflatten(1, (maps.shape[1], -1))

    def _map(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, self.grid)

    def forward(self, x: Tensor, *, return_aux: bool = False) -> Tensor | tuple[Tensor, HeadRouting]:
        self._check(x)
        unit_q = F.normalize(self._heads(self.q(x)), dim=-1)
        q = self._scaled(unit_q, self.log_length.to(x.dtype))

        local_k, local_v = self.kv(x).chunk(2, dim=-1)
        local_k = F.normalize(local_k.unflatten(-1, (self.num_heads, -1)), dim=-1).flatten(2)
        local_k, local_v = (
            self._windows(self._map(part)).unflatten(1, (self.num_heads, self.head_dim)) for part in (local_k, local_v)
        )  # (B, H, D, cells, N)
        local_scores = torch.einsum("bhnd,bhdcn->bhnc", q, local_k) + self.local_bias[:, None]
        local_scores = local_scores.masked_fill(self.outside, -torch.inf)

        pooled = F.adaptive_avg_pool2d(F.gelu(self.pool_proj(self._map(x))), self.pool_grid).flatten(2).transpose(1, 2)
        pool_k, pool_v = (self._heads(part) for part in self.kv(self.pool_norm(pooled)).chunk(2, dim=-1))
        pool_scores = q @ F.normalize(pool_k, dim=-1).transpose(-2, -1) + self.position()

        scores = torch.cat([local_scores, pool_scores], dim=-1)
        weights = scores.softmax(-1, dtype=accumulation_dtype(scores.dtype)).to(x.dtype)
        weights = F.dropout(weights, self.attn_drop, self.training)
        local_weights, pool_weights = weights.split([self.window**2, self.pool_cells], dim=-1)
        # Outside the grid the values are zero, so the learned weights need no mask there.
        local_weights = local_weights + unit_q @ self.local_tokens + self.local_token_bias
        out = torch.einsum("bhnc,bhdcn->bhnd", local_weights, local_v) + pool_weights @ pool_v
        return self._output(x, out, return_aux)
