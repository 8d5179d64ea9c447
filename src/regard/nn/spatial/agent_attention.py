"""Agent attention as a layer: agents pooled from the queries' image, position biases, and a local convolution of the values.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., 2023, arXiv 2312.08874). Code read for numbers:
LeapLabTHU/Agent-Attention, `agent_transformer/models/agent_{deit,swin,pvt}.py` and the detection and segmentation backbones
(no licence: numbers only). Blocks and the CSwin stripes are in `agent_blocks.py`.

What differs: one class serves the five of the authors, on any grid (theirs take the square root of the token count) and any agent
grid; q and kv are two Linears as in their PVT (the fused `qkv` of the others is split on loading).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_int, require_tensor
from ...ops.agent import agent_attention
from .grids import Grid, grid_pair

__all__ = ["AgentAttention", "AgentBias"]

_BIAS_KEYS = {
    "an_bias": "bias.key_map",
    "ah_bias": "bias.key_rows",
    "aw_bias": "bias.key_columns",
    "na_bias": "bias.query_map",
    "ha_bias": "bias.query_rows",
    "wa_bias": "bias.query_columns",
    "ac_bias": "bias.key_class",
    "ca_bias": "bias.query_class",
}
_LAYER_KEYS = {"dwc": "local", "get_v": "local", "sr": "reduction", "norm": "reduction_norm"}


def rename_agent_attention(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The authors' names of one attention, below `prefix`, in ours; a fused `qkv` is split. Other entries pass."""
    renamed = {}
    for name, tensor in state.items():
        head, _, tail = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            renamed[name] = tensor
        elif head == "qkv":
            third = tensor.shape[0] // 3
            renamed[f"{prefix}q.{tail}"], renamed[f"{prefix}kv.{tail}"] = tensor[:third], tensor[third:]
        elif head in _BIAS_KEYS and not tail:
            renamed[prefix + _BIAS_KEYS[head]] = tensor
        else:
            renamed[f"{prefix}{_LAYER_KEYS.get(head, head)}.{tail}" if tail else name] = tensor
    return renamed


def agent_grid_of(agent_num: int | Grid) -> Grid:
    """(rows, columns) of agents, from a square number of them or a pair."""
    if isinstance(agent_num, int) and not isinstance(agent_num, bool):
        require(
            agent_num >= 1 and math.isqrt(agent_num) ** 2 == agent_num,
            "agent_num",
            agent_num,
            "a square number or a pair",
        )
        return math.isqrt(agent_num), math.isqrt(agent_num)
    return grid_pair("agent_num", agent_num)


class AgentBias(nn.Module):
    """Position biases of both softmaxes, as sums of a coarse map, a row part and a column part per agent.

    Args:
        num_heads: heads, H.
        agent_grid: (rows, columns) of agents, m in all.
        key_grid, query_grid: grids that the row and column parts are made for.
        cls_tokens: tokens before the grid; they get one number per agent.
        map_size: side of the coarse maps (7 in the paper).

    `forward(key_grid, query_grid, agent_grid)` gives `(1, H, m, keys)` and `(1, H, queries, m)`, class tokens first. Grids other
    than the own ones are reached by bilinear interpolation, over space and then over the agents, as the authors' detectors do.
    """

    def __init__(
        self,
        num_heads: int,
        agent_grid: Grid,
        key_grid: Grid,
        query_grid: Grid,
        cls_tokens: int = 0,
        map_size: int = 7,
    ) -> None:
        super().__init__()
        self.agent_grid, self.key_grid, self.query_grid, self.cls_tokens = agent_grid, key_grid, query_grid, cls_tokens
        agents = math.prod(agent_grid)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

        self.key_map = parameter(num_heads, agents, map_size, map_size)
        self.key_rows = parameter(1, num_heads, agents, key_grid[0], 1)
        self.key_columns = parameter(1, num_heads, agents, 1, key_grid[1])
        self.query_map = parameter(num_heads, agents, map_size, map_size)
        self.query_rows = parameter(1, num_heads, query_grid[0], 1, agents)
        self.query_columns = parameter(1, num_heads, 1, query_grid[1], agents)
        self.key_class = parameter(1, num_heads, agents, cls_tokens) if cls_tokens else None
        self.query_class = parameter(1, num_heads, cls_tokens, agents) if cls_tokens else None

    def forward(
        self, key_grid: Grid | None = None, query_grid: Grid | None = None, agent_grid: Grid | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, queries, agents = key_grid or self.key_grid, query_grid or self.query_grid, agent_grid or self.agent_grid
        of_keys = _resize(self.key_map, keys) + _resize((self.key_rows + self.key_columns)[0], keys)
        lines = (self.query_rows + self.query_columns)[0].permute(0, 3, 1, 2)
        of_queries = _resize(self.query_map, queries) + _resize(lines, queries)
        of_keys, of_queries = of_keys.flatten(2), of_queries.flatten(2)  # (H, m, cells)
        if self.key_class is not None and self.query_class is not None:
            of_keys = torch.cat([self.key_class[0], of_keys], dim=-1)
            of_queries = torch.cat([self.query_class[0].transpose(1, 2), of_queries], dim=-1)
        if agents != self.agent_grid:
            of_keys, of_queries = (self._other_agents(bias, agents) for bias in (of_keys, of_queries))
        return of_keys[None], of_queries.transpose(1, 2)[None]

    def _other_agents(self, bias: Tensor, agents: Grid) -> Tensor:
        """(H, own agents, tokens) -> (H, other agents, tokens): the agents lie on a grid, too."""
        maps = bias.transpose(1, 2).unflatten(2, self.agent_grid)
        return _resize(maps, agents).flatten(2).transpose(1, 2)


def _resize(maps: Tensor, grid: Grid) -> Tensor:
    return maps if tuple(maps.shape[-2:]) == tuple(grid) else F.interpolate(maps, size=grid, mode="bilinear")


class AgentAttention(nn.Module):
    """Agent attention over a grid of tokens: linear in their number for a fixed number of agents.

    Agents are the queries, averaged over a coarse grid. They read all keys, every query reads the agents (both with softmax and
    position biases), and a depthwise convolution of the value image puts local detail back.

    Args:
        dim: channels in and out, a multiple of `num_heads`.
        num_heads: heads.
        grid: (height, width) of the token grid, or an int for a square one: the image (DeiT, PVT) or one window (Swin).
        agent_num: agents: a square number (7 x 7 = 49 by default; Swin and PVT use 9, 16, 49, 49 by stage) or (rows, columns).
        cls_tokens: tokens before the grid (DeiT: 1). They are keys and queries with biases of their own, but take no part in
            pooling and convolution.
        sr_ratio: keys and values from a copy of the image reduced by a strided convolution (PVT; default 1, no reduction). Not
            together with `cls_tokens`, which the paper does not define.
        qkv_bias: bias of the q and kv projections (default False; the paper's networks use True).
        kernel_size: side of the value convolution, odd (default 3).
        scale: factor on the scores of both softmaxes. Default head_dim ** -0.5.
        agent_grid: agents to run with, (rows, columns) or an int for a square, where they differ from the trained `agent_num` ones
            (the authors' detectors: 12 x 12 and more). Default: as trained.
        attn_drop, proj_drop: dropout of both attentions' weights and of the output, in [0, 1).

    Shapes: `forward(x (B, cls_tokens + height * width, dim), grid=None) -> ` the same; rows first. `grid` gives the token grid of
    this call where it is not the one of the layer: all biases are then interpolated.

    The authors' shifted Swin windows pass a mask that their agent attention ignores: tokens of opposite borders see each other.
    There is no mask here either.

    Raises:
        ValueError, TypeError: numbers that do not fit each other, wrong input shape.
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
        qkv_bias: bool = False,
        kernel_size: int = 3,
        scale: float | None = None,
        agent_grid: int | Grid | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.num_heads = require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.grid = grid_pair("grid", grid)
        trained = agent_grid_of(agent_num)
        self.agent_grid = trained if agent_grid is None else grid_pair("agent_grid", agent_grid)
        self.cls_tokens = require_int("cls_tokens", cls_tokens)
        self.sr_ratio = require_int("sr_ratio", sr_ratio, 1)
        require(sr_ratio <= min(self.grid), "sr_ratio", sr_ratio, f"at most the shorter side of grid {self.grid}")
        require(sr_ratio == 1 or cls_tokens == 0, "cls_tokens", cls_tokens, "0 together with sr_ratio > 1")
        require_int("kernel_size", kernel_size, 1)
        require(kernel_size % 2 == 1, "kernel_size", kernel_size, "an odd number")
        require(0.0 <= attn_drop < 1.0, "attn_drop", attn_drop, "a probability in [0, 1)")
        self.attn_drop = attn_drop
        self.scale = (dim // num_heads) ** -0.5 if scale is None else float(scale)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        if sr_ratio > 1:
            self.reduction = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.reduction_norm = nn.LayerNorm(dim)
        self.bias = AgentBias(num_heads, trained, self._key_grid(self.grid), self.grid, cls_tokens)
        self.local = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of any of the authors' `AgentAttention` classes in our names."""
        return rename_agent_attention(state)

    def _key_grid(self, grid: Grid) -> Grid:
        return grid[0] // self.sr_ratio, grid[1] // self.sr_ratio

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        grid = self.grid if grid is None else grid_pair("grid", grid)
        first, length = self.cls_tokens, self.cls_tokens + math.prod(grid)
        shape = f"shape {tuple(x.shape)}"
        require(tuple(x.shape[1:]) == (length, self.dim), "x", shape, f"(B, {length}, {self.dim}) for grid {grid}")
        require(self.sr_ratio <= min(grid), "grid", grid, f"sides of at least sr_ratio ({self.sr_ratio})")
        q = self.q(x)
        source, key_grid = x, self._key_grid(grid)
        if self.sr_ratio > 1:
            reduced = self.reduction(_image(x, grid))
            source = self.reduction_norm(reduced.flatten(2).transpose(1, 2))
        k, v = self.kv(source).chunk(2, dim=-1)
        agents = F.adaptive_avg_pool2d(_image(q[:, first:], grid), self.agent_grid).flatten(2).transpose(1, 2)
        bias1, bias2 = self.bias(key_grid, grid, self.agent_grid)
        out = agent_attention(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            self._heads(agents),
            bias1=bias1,
            bias2=bias2,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
        )
        out = out.transpose(1, 2).flatten(2)
        local = self.local(_resize(_image(v[:, first:], key_grid), grid)).flatten(2).transpose(1, 2)
        out = out + F.pad(local, (0, 0, first, 0))
        return self.proj_drop(self.proj(out))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        agents = f"agent_grid={self.agent_grid}"
        return f"dim={self.dim}, num_heads={self.num_heads}, grid={self.grid}, {agents}, sr_ratio={self.sr_ratio}"


def _image(x: Tensor, grid: Grid) -> Tensor:
    """(B, height * width, C) -> (B, C, height, width)."""
    return x.transpose(1, 2).unflatten(2, grid)
