"""InLine: linear attention whose weights tell queries apart, and a depthwise convolution of the values whose kernels the input makes.

Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv 2412.06590). Code read for numbers:
LeapLabTHU/InLine @ e463a6f, `models/inline_{deit,swin,pvt,cswin}.py` (no licence: numbers only).

What differs: one class serves the four of the authors, on any grid (their DeiT and Swin take the square root of the token count); the scale
uses the number of keys (theirs that of queries, which are as many; their PVT with reduced keys fails on the residual's shape). CSwin's
stripes fail in their code (the kernels are made for whole images only), so `InLineCSWinBlock` has the whole map, as their networks'
linear stages do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, require_tensor
from ...ops.state.feature_maps import FeatureMap, identity
from ...ops.state.global_linear import global_linear_attention, global_linear_weights
from ..layers import drop_samples, rename_keys
from ..sequence.pre_norm import require_rate
from .block_parts import Mlp, WindowedBlock, tokens_to_map
from .grids import Grid, grid_pair
from .window_attention import WindowSoftmaxAttention, shifted_window_bias

__all__ = ["DynamicLocalResidual", "InLineAttention", "InLineBlock", "InLineCSWinBlock"]


def _soft_exp(x: Tensor) -> Tensor:
    """exp(x / 5), the exponential map of the authors' Swin file."""
    return (0.2 * x).exp()


_MAPS: dict[str, FeatureMap] = {"identity": identity, "relu": F.relu, "leaky_relu": F.leaky_relu, "exp": _soft_exp}


class DynamicLocalResidual(nn.Module):
    """A depthwise convolution of a map with a kernel of its own for each sample and channel, made from the mean of the tokens.

    Args:
        dim: channels, a multiple of `num_heads`; the two layers that make the kernels mix channels within a head only.
        kernel_size: side of the kernels, odd.

    Shapes: `forward(values (B, dim, H, W), mean (B, dim)) -> (B, dim, H, W)`, zeros beyond the border.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 3) -> None:
        super().__init__()
        require_int("kernel_size", kernel_size, 1)
        require(kernel_size % 2 == 1, "kernel_size", kernel_size, "an odd number")
        require(dim % require_int("num_heads", num_heads, 1) == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.dim, self.kernel_size = dim, kernel_size
        self.reduce = nn.Conv1d(dim, dim, 1, groups=num_heads)
        self.expand = nn.Conv1d(dim, dim * kernel_size**2, 1, groups=num_heads)

    def kernels(self, mean: Tensor) -> Tensor:
        """(B, dim) -> (B, dim, kernel_size, kernel_size)."""
        require_tensor("mean", mean, dims=2, floating=True)
        require(mean.shape[1] == self.dim, "mean", f"shape {tuple(mean.shape)}", f"(B, {self.dim})")
        made = self.expand(F.gelu(self.reduce(mean[..., None])))
        return made.reshape(mean.shape[0], self.dim, self.kernel_size, self.kernel_size)

    def forward(self, values: Tensor, mean: Tensor) -> Tensor:
        require_tensor("values", values, dims=4, floating=True)
        need = f"(B, {self.dim}, H, W)"
        require(values.shape[1] == self.dim, "values", f"shape {tuple(values.shape)}", need)
        batch, dim, height, width = values.shape
        kernels = self.kernels(mean).reshape(batch * dim, 1, self.kernel_size, self.kernel_size)
        flat = values.reshape(1, batch * dim, height, width)
        out = F.conv2d(flat, kernels, padding=self.kernel_size // 2, groups=batch * dim)
        return out.reshape(batch, dim, height, width)


class InLineAttention(nn.Module):
    """Injective linear attention over a grid of tokens: (B, cls_tokens + height * width, dim) -> the same.

    With a_ij = phi(q_i) . phi(k_j) / (N sqrt(head_dim)), the weights are a_ij - mean_m a_im + 1 / N: rows sum to 1, weights can be
    negative, and two queries have the same weights only if they are the same to the keys (a ratio gives q and 2 q the same).

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: heads.
        grid: (height, width) of the token grid, or an int for a square: the image, or one window.
        cls_tokens: tokens before the grid. They are queries and keys and count in the mean that makes the kernels, but get no residual.
        qkv_bias: bias of the q, k, v projection. feature_map: "identity" (published networks), "relu", "leaky_relu" or "exp" (exp(x / 5)).
        residual: whether the dynamic local residual is there. kernel_size: its side.
        proj_drop: dropout of the output.

    `forward(x, grid=None)`: `grid` is that of this call, where it is not the layer's. `weights(x)` gives (B, num_heads, N, N), for looking.

    Raises:
        ValueError, TypeError: numbers that do not fit each other, wrong input shape.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | Grid,
        cls_tokens: int = 0,
        *,
        qkv_bias: bool = True,
        feature_map: str = "identity",
        residual: bool = True,
        kernel_size: int = 3,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.grid, self.cls_tokens = grid_pair("grid", grid), require_int("cls_tokens", cls_tokens)
        self.feature_map = require_name("feature_map", feature_map, _MAPS)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.residual = DynamicLocalResidual(dim, num_heads, kernel_size) if residual else None
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(require_rate("proj_drop", proj_drop))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Any of the authors' `InLineAttention` in our names; PVT's q and kv become one qkv. Ours passes unchanged."""
        return _rename(state)

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        grid = self._check(x, grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = self._global(q, k, v)
        if self.residual is not None:
            local = self.residual(tokens_to_map(v[:, self.cls_tokens :], grid), x.mean(dim=1))
            out = out + F.pad(local.flatten(2).transpose(1, 2), (0, 0, self.cls_tokens, 0))
        return self.proj_drop(self.proj(out))

    def weights(self, x: Tensor) -> Tensor:
        """The weights of the global part (the local residual is not in them); x on any grid."""
        require_tensor("x", x, dims=3, floating=True)
        q, k, _ = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return global_linear_weights(q, k, normaliser="subtract", feature_map=_MAPS[self.feature_map])

    def _global(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        out = global_linear_attention(q, k, v, normaliser="subtract", feature_map=_MAPS[self.feature_map])
        return out.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _check(self, x: Tensor, grid: int | Grid | None) -> Grid:
        require_tensor("x", x, dims=3, floating=True)
        grid = self.grid if grid is None else grid_pair("grid", grid)
        length = self.cls_tokens + math.prod(grid)
        fits = tuple(x.shape[1:]) == (length, self.dim)
        require(fits, "x", f"shape {tuple(x.shape)}", f"(B, {length}, {self.dim}) for grid {grid}")
        return grid

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid={self.grid}, feature_map={self.feature_map!r}"


class InLineBlock(WindowedBlock):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, attention being `InLineAttention`: the block of the authors' DeiT, PVT and Swin.

    Args:
        dim, num_heads, grid, cls_tokens, qkv_bias: as in `InLineAttention`.
        window: attend within windows of this side instead of over the whole grid (int or (height, width)). It must divide the grid; an
            int not smaller than the grid's shorter side becomes that side, without a shift. The authors' linear stages have windows of
            the whole map.
        shift: cells by which the grid is rolled before it is cut. Rolled-over borders see each other, as in the authors' code, which
            passes a mask and ignores it.
        mlp_ratio: hidden width of the MLP over dim. drop: dropout after projections; drop_path: stochastic depth; both in [0, 1).
        linear: False is Swin's softmax attention in the windows, with relative position biases, which keeps rolled-over borders apart.
        norm_eps: of the LayerNorms (the authors' DeiT and PVT networks use 1e-6).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | Grid,
        cls_tokens: int = 0,
        *,
        window: int | Grid | None = None,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        feature_map: str = "identity",
        linear: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(grid, window, shift, cls_tokens)
        self.drop_path = require_rate("drop_path", drop_path)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=norm_eps), nn.LayerNorm(dim, eps=norm_eps)
        self.linear = bool(linear)
        if linear:
            options: dict[str, Any] = {"qkv_bias": qkv_bias, "feature_map": feature_map, "proj_drop": drop}
            self.attn = InLineAttention(dim, num_heads, self.window or self.grid, cls_tokens, **options)
        else:
            require(self.window is not None, "window", window, "a window where linear=False")
            assert self.window is not None
            self.attn = WindowSoftmaxAttention(dim, num_heads, self.window, qkv_bias=qkv_bias, proj_drop=drop)
            bias = shifted_window_bias(self.grid, self.window, self.shift) if self.shift else None
            self.register_buffer("shift_bias", bias, persistent=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`InLineBlock` (DeiT), `Block` (PVT) or `SwinTransformerBlock` with linear attention, in our names."""
        return _rename(state, "attn.")

    def _in_windows(self, windows: Tensor) -> Tensor:
        return self.attn(windows) if self.linear else self.attn(windows, self.shift_bias)


class InLineCSWinBlock(InLineBlock):
    """CSwin's block with linear attention over the whole map.

    A depthwise 3 x 3 convolution of the values is added to attention and residual, and the residual's kernels come from the mean of the
    block's input, before the norm. Arguments as `InLineBlock`, without class tokens and windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int | Grid,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            grid,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop=drop,
            drop_path=drop_path,
            norm_eps=norm_eps,
        )
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`CSWinBlock` with one linear branch, in our names."""
        state = rename_keys(
            state,
            (r"^(qkv|proj)\.", r"attn.\1."),
            (r"^attns\.0\.get_v\.", "lepe."),
            (r"^attns\.0\.", "attn."),
        )
        return _rename(state, "attn.")

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        attn = self.attn
        assert isinstance(attn, InLineAttention)
        cells = attn._check(x, grid)
        q, k, v = attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        image = tokens_to_map(v, cells)
        assert attn.residual is not None
        local = attn.residual(image, x.mean(dim=1)) + self.lepe(image)
        mixed = attn.proj_drop(attn.proj(attn._global(q, k, v) + local.flatten(2).transpose(1, 2)))
        x = x + drop_samples(mixed, self.drop_path, self.training)
        return x + drop_samples(self.mlp(self.norm2(x)), self.drop_path, self.training)


_CONSTANTS = ("attn_mask", "relative_position_index")  # buffers of the authors' Swin


def _rename(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The authors' names of the attention below `prefix` in ours."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_CONSTANTS)}
    for kind in ("weight", "bias"):
        if f"{prefix}kv.{kind}" in state:
            parts = state.pop(f"{prefix}q.{kind}"), state.pop(f"{prefix}kv.{kind}")
            state[f"{prefix}qkv.{kind}"] = torch.cat(parts)
    return rename_keys(state, (r"\bresidual\.0\.", "residual.reduce."), (r"\bresidual\.2\.", "residual.expand."))
