"""L2ViT's blocks: linear global attention with a local concentration module, and local window attention.

The Linear Attention Resurrection in Vision Transformer (Zheng, 2025, arXiv 2501.16182). Code read for numbers: ChuanyangZheng/L2ViT @
fad0341 (MIT), `classification/models/l2vit.py`. What differs: nothing in the numbers; the floor of the denominator and the kernel sizes
are arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.state.global_linear import global_linear_attention, global_linear_weights, ratio
from ..layers import drop_samples, rename_keys
from ..sequence.pre_norm import require_rate
from .block_parts import Mlp, tokens_to_map
from .grids import Grid, from_windows, grid_pair, to_windows
from .window_attention import WindowSoftmaxAttention

__all__ = [
    "ConditionalPositionEncoding",
    "LinearGlobalBlock",
    "LocalConcentration",
    "LocalWindowBlock",
    "ReluLinearAttention",
]


class ReluLinearAttention(nn.Module):
    """(B, N, dim) -> the same: tau * relu(q) (sum relu(k)^T v) / max(relu(q) . sum relu(k), floor) in each head.

    Args:
        dim: channels, a multiple of `num_heads`. num_heads: heads.
        floor: least denominator (100, as released). Weights of a row sum to tau where the sum is above it and to less below, so results
            depend on the size of features and on the number of tokens. None divides by the sum alone (rows without any weight: zeros).
        qkv_bias: bias of the q, k, v projection.

    tau is a learned number a head (`temperature`), head_dim ** -0.5 at first; it multiplies the result and not the scores.
    """

    def __init__(self, dim: int, num_heads: int, floor: float | None = 100.0, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.floor = floor
        ratio(floor)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        out = global_linear_attention(q, k, v, normaliser=self._rule, feature_map="relu", scale=1.0)
        return self.proj((out * self.temperature).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """The weights (B, num_heads, N, N), tau included: quadratic, for looking."""
        q, k, _ = self._heads(x)
        rows = global_linear_weights(q, k, normaliser=self._rule, feature_map="relu", scale=1.0)
        return rows * self.temperature

    @property
    def _rule(self):
        return ratio(self.floor) if self.floor is not None else ratio(floor=1e-12)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, floor={self.floor}"


class ConditionalPositionEncoding(nn.Module):
    """x + depthwise convolution of x as an image (zeros beyond the border, so that borders mark positions): (B, height * width, dim) kept.

    Args:
        dim: channels. kernel_size: odd side of the kernel. act: GELU on the convolution.
    """

    def __init__(self, dim: int, kernel_size: int = 3, act: bool = False) -> None:
        super().__init__()
        self.proj = _depthwise(dim, kernel_size)
        self.act = bool(act)

    def forward(self, x: Tensor, grid: int | Grid) -> Tensor:
        grid = _check_tokens(x, self.proj.in_channels, grid)
        moved = self.proj(tokens_to_map(x, grid)).flatten(2).transpose(1, 2)
        return x + (F.gelu(moved) if self.act else moved)


class LocalConcentration(nn.Module):
    """Depthwise convolution, GELU, batch norm, depthwise convolution, on tokens as an image: (B, height * width, dim) kept.

    It concentrates what linear attention spreads: weights of neighbours are gathered into a focus.
    """

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1, self.conv2 = _depthwise(dim, kernel_size), _depthwise(dim, kernel_size)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, grid: int | Grid) -> Tensor:
        grid = _check_tokens(x, self.conv1.in_channels, grid)
        image = self.conv2(self.bn(F.gelu(self.conv1(tokens_to_map(x, grid)))))
        return image.flatten(2).transpose(1, 2)


class LinearGlobalBlock(nn.Module):
    """Position encoding; `x += ReluLinearAttention(norm(x))`; `x += LocalConcentration(norm(x))`; `x += mlp(norm(x))`.

    Args:
        dim, num_heads: as `ReluLinearAttention`. mlp_ratio: hidden width of the MLP over dim.
        concentrate: whether the local concentration module is there. floor: of the attention's denominator.
        cpe_act: GELU in the position encoding. qkv_bias; drop_path: stochastic depth, in [0, 1).

    `forward(x (B, height * width, dim), grid) -> ` the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        concentrate: bool = True,
        floor: float | None = 100.0,
        cpe_act: bool = False,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = require_rate("drop_path", drop_path)
        self.cpe = nn.ModuleList([ConditionalPositionEncoding(dim, act=cpe_act)])
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ReluLinearAttention(dim, num_heads, floor, qkv_bias=qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim) if concentrate else None
        self.concentration = LocalConcentration(dim) if concentrate else None

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `LGABlock` in our names; ours passes unchanged."""
        return rename_keys(state, (r"\blocal_mp\.", "concentration."))

    def forward(self, x: Tensor, grid: int | Grid) -> Tensor:
        x = self.cpe[0](x, grid)
        x = x + drop_samples(self.attn(self.norm1(x)), self.drop_path, self.training)
        if self.concentration is not None and self.norm3 is not None:
            x = x + drop_samples(self.concentration(self.norm3(x), grid), self.drop_path, self.training)
        return x + drop_samples(self.mlp(self.norm2(x)), self.drop_path, self.training)


class LocalWindowBlock(nn.Module):
    """Position encoding; `x += softmax attention in windows of norm(x)`; position encoding; `x += mlp(norm(x))`.

    Windows are neither shifted nor masked: where they do not divide the grid it is padded at the right and bottom with zeros (after the
    norm), which are attended to, as released.

    Args:
        dim, num_heads, mlp_ratio, cpe_act, qkv_bias, drop_path: as `LinearGlobalBlock`. window: side of a window (7).

    `forward(x (B, height * width, dim), grid) -> ` the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 7,
        *,
        mlp_ratio: float = 4.0,
        cpe_act: bool = False,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path, self.window = require_rate("drop_path", drop_path), require_int("window", window, 1)
        self.cpe = nn.ModuleList(ConditionalPositionEncoding(dim, act=cpe_act) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowSoftmaxAttention(dim, num_heads, window, relative_bias=False, qkv_bias=qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: int | Grid) -> Tensor:
        x = self.cpe[0](x, grid)
        x = x + drop_samples(self._attend(self.norm1(x), grid_pair("grid", grid)), self.drop_path, self.training)
        x = self.cpe[1](x, grid)
        return x + drop_samples(self.mlp(self.norm2(x)), self.drop_path, self.training)

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        window = (self.window, self.window)
        padded = tuple(-(-side // self.window) * self.window for side in grid)
        maps = F.pad(x.unflatten(1, grid), (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        maps = from_windows(self.attn(to_windows(maps, window)), window, (padded[0], padded[1]))
        return maps[:, : grid[0], : grid[1]].flatten(1, 2)


def _depthwise(dim: int, kernel_size: int) -> nn.Conv2d:
    require_int("dim", dim, 1)
    require(require_int("kernel_size", kernel_size, 1) % 2 == 1, "kernel_size", kernel_size, "an odd number")
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


def _check_tokens(x: Tensor, dim: int, grid: int | Grid) -> Grid:
    require_tensor("x", x, dims=3, floating=True)
    grid = grid_pair("grid", grid)
    need = (grid[0] * grid[1], dim)
    require(tuple(x.shape[1:]) == need, "x", f"shape {tuple(x.shape)}", f"(B, {need[0]}, {dim}) for grid {grid}")
    return grid
