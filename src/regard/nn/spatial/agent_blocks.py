"""Transformer blocks around agent attention: DeiT / PVT / Swin in one, and CSwin's two stripes.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., 2023, arXiv 2312.08874). Code read for numbers:
LeapLabTHU/Agent-Attention, `agent_transformer/models/agent_{deit,swin,pvt,cswin}.py` (no licence: numbers only). Blocks with plain
attention (`attn_type="B"`): `softmax_block.py` for DeiT and PVT, `InLineBlock(linear=False)` for Swin, `agent_num=None` here for CSwin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_int, require_tensor
from ...ops.agent import agent_attention
from ...ops.attention import attention
from ..layers import drop_samples
from .agent_attention import AgentAttention, AgentBias, agent_grid_of, rename_agent_attention
from .block_parts import Mlp, WindowedBlock
from .grids import Grid, from_windows, grid_pair, to_windows

__all__ = ["AgentBlock", "AgentCSWinBlock", "AgentStripeAttention"]


class AgentBlock(WindowedBlock):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`, attention being `AgentAttention`.

    Args:
        dim, num_heads, grid, agent_num, cls_tokens, sr_ratio, qkv_bias: as in `AgentAttention`.
        window: attend within windows of this side instead of over the whole grid (Swin; int or (height, width)). It must divide
            the grid; an int not smaller than the grid's shorter side becomes that side, without a shift.
        shift: cells by which the grid is rolled before it is cut (Swin: every second block, half a window). Rolled-over borders see
            each other, as in the authors' code, which passes a mask and ignores it.
        mlp_ratio: hidden width of the MLP over `dim` (default 4).
        drop: dropout after projections; attn_drop: of attention weights; drop_path: stochastic depth. All in [0, 1).
        norm_eps: of the LayerNorms (default 1e-5; the authors' DeiT and PVT networks use 1e-6).

    Shapes: `forward(x (B, cls_tokens + height * width, dim), grid=None) -> ` the same. `grid` as in `AgentAttention`, only without
    windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | Grid,
        agent_num: int | Grid = 49,
        cls_tokens: int = 0,
        sr_ratio: int = 1,
        *,
        window: int | Grid | None = None,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(grid, window, shift, cls_tokens)
        require(0.0 <= drop_path < 1.0, "drop_path", drop_path, "a probability in [0, 1)")
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = AgentAttention(
            dim,
            num_heads,
            self.window or self.grid,
            agent_num,
            cls_tokens,
            sr_ratio,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`AgentBlock` (DeiT), `Block` (PVT) or `SwinTransformerBlock` with agent attention, in our names."""
        state = {name: tensor for name, tensor in state.items() if name != "attn_mask"}  # Swin's, which nothing reads
        return rename_agent_attention(state, "attn.")


class AgentStripeAttention(nn.Module):
    """Agent attention within stripes of a grid, on given q, k, v (one branch of CSwin; no projections).

    Args:
        dim, num_heads, grid, agent_num, scale, attn_drop: as in `AgentAttention`; `agent_num=None` is CSwin's own softmax attention.
        stripe: (height, width) of a stripe; must divide the grid. CSwin: (grid height, s), (s, grid width), or the whole grid.

    Shapes: `forward(q, k, v)`, each (B, height * width, dim), rows first -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | Grid,
        stripe: Grid,
        agent_num: int | Grid | None = 49,
        *,
        scale: float | None = None,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.num_heads = require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.grid, self.stripe = grid_pair("grid", grid), grid_pair("stripe", stripe)
        cut = all(cells % side == 0 for cells, side in zip(self.grid, self.stripe))
        require(cut, "stripe", self.stripe, f"sides that divide grid {self.grid}")
        require(0.0 <= attn_drop < 1.0, "attn_drop", attn_drop, "a probability in [0, 1)")
        self.attn_drop = attn_drop
        self.scale = (dim // num_heads) ** -0.5 if scale is None else float(scale)
        self.agent_grid = None if agent_num is None else agent_grid_of(agent_num)
        self.bias = None
        if self.agent_grid is not None:
            self.bias = AgentBias(num_heads, self.agent_grid, self.stripe, self.stripe)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `AgentAttention` of agent_cswin.py in our names."""
        return rename_agent_attention(state)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        need = (math.prod(self.grid), self.dim)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require_tensor(name, tensor, dims=3, floating=True)
            fits = tuple(tensor.shape[1:]) == need
            require(fits, name, f"shape {tuple(tensor.shape)}", f"(B, {need[0]}, {need[1]}) for grid {self.grid}")
        q, k, v = (to_windows(part.unflatten(1, self.grid), self.stripe) for part in (q, k, v))
        images = [part.transpose(1, 2).unflatten(2, self.stripe) for part in (q, v)]
        q, k, v = (self._heads(part) for part in (q, k, v))
        dropout = self.attn_drop if self.training else 0.0
        if self.bias is None or self.agent_grid is None:
            out = attention(q, k, v, scale=self.scale, dropout=dropout)
        else:
            agents = F.adaptive_avg_pool2d(images[0], self.agent_grid).flatten(2).transpose(1, 2)
            bias1, bias2 = self.bias()
            out = agent_attention(
                q, k, v, self._heads(agents), bias1=bias1, bias2=bias2, scale=self.scale, dropout=dropout
            )
        out = out.transpose(1, 2).flatten(2) + self.local(images[1]).flatten(2).transpose(1, 2)
        return from_windows(out, self.stripe, self.grid).flatten(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid={self.grid}, stripe={self.stripe}"


class AgentCSWinBlock(nn.Module):
    """CSwin block with agent attention: half of the channels attend in vertical stripes, half in horizontal ones.

    Args:
        dim, num_heads: channels and heads of the block; each branch takes half of both.
        grid: (height, width) of the token grid, or an int.
        split_size: width of a stripe. Where it is the whole side of a square grid, or with `last_stage`, there is one branch over
            the whole grid instead of two.
        agent_num, qkv_bias, drop, attn_drop, drop_path, mlp_ratio, norm_eps: as in `AgentBlock`; `agent_num=None`: softmax (CSwin).

    Shapes: `forward(x (B, height * width, dim)) -> ` the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | Grid,
        split_size: int = 7,
        agent_num: int | Grid | None = 49,
        *,
        last_stage: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.grid = height, width = grid_pair("grid", grid)
        require_int("split_size", split_size, 1)
        require(0.0 <= drop_path < 1.0, "drop_path", drop_path, "a probability in [0, 1)")
        self.drop_path = drop_path
        stripes = [self.grid]
        if not last_stage and self.grid != (split_size, split_size):
            require(
                num_heads % 2 == 0 and dim % 2 == 0,
                "num_heads",
                num_heads,
                "an even number, as dim: two branches share them",
            )
            stripes = [(height, split_size), (split_size, width)]
        count = len(stripes)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attns = nn.ModuleList(
            AgentStripeAttention(dim // count, num_heads // count, self.grid, stripe, agent_num, attn_drop=attn_drop)
            for stripe in stripes
        )
        self.proj = nn.Linear(dim, dim)  # `drop` does not follow it: the authors make that dropout and never call it
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `CSWinBlock` in our names."""
        return rename_agent_attention(rename_agent_attention(state, "attns.0."), "attns.1.")

    def forward(self, x: Tensor) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        need = (math.prod(self.grid), self.dim)
        fits = tuple(x.shape[1:]) == need
        require(fits, "x", f"shape {tuple(x.shape)}", f"(B, {need[0]}, {need[1]}) for grid {self.grid}")
        q, k, v = (part.chunk(len(self.attns), -1) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        branches = [branch(*parts) for branch, *parts in zip(self.attns, q, k, v)]
        x = x + drop_samples(self.proj(torch.cat(branches, -1)), self.drop_path, self.training)
        return x + drop_samples(self.mlp(self.norm2(x)), self.drop_path, self.training)
