"""Neighborhood attention as a layer: every token of a map, a sequence or a video attends to the tokens around it.

Faster Neighborhood Attention (Hassani et al., 2024, arXiv 2403.04690). Code read for numbers: SHI-Labs/NATTEN,
`src/natten/modules.py` (MIT), and `natten2d.py` of v0.14.6 for NAT and DiNAT. State dicts load as they are; the relative biases `rpb`
of the older layers become `rel_pos_bias`. What differs: no compiled extension (see `regard.ops.neighborhood_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.neighborhood import neighborhood_attention

__all__ = ["NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class NeighborhoodAttention(nn.Module):
    """Projections around `regard.ops.neighborhood_attention`, for tokens (B, *grid, dim) on a grid of 1 to 3 axes.

    Args:
        dim: channels, a multiple of `num_heads`.
        kernel_size: keys along each axis. An int serves all axes and then `grid_dims` tells how many there are; a sequence has one each.
        stride, dilation, is_causal: one value, or one an axis; see `regard.masks.neighborhood`.
        grid_dims: axes of the grid, 1 to 3. None: as many as `kernel_size` has (2 where it is an int).
        qkv_bias: biases in the projection to q, k and v. scale: factor on the scores. Default head_dim ** -0.5.
        proj_drop: dropout after the output projection. attn_drop: dropout of attention weights, in training.
        rel_pos_bias: learn a bias by relative place, as NAT and DiNAT do, (num_heads, 2 * kernel_size - 1, ...).
        pad_small: grids too small for kernel_size * dilation get zeros at the end of each axis first, and what comes out there is cut off;
            as in NAT and DiNAT the padding takes part (with the biases of q, k and v). False: such grids are an error.

    Shapes: (B, *grid, dim) to the same. Grids may differ from call to call.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        grid_dims: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        rel_pos_bias: bool = False,
        pad_small: bool = False,
    ) -> None:
        super().__init__()
        require_int("dim", dim, 1)
        require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "num_heads", num_heads, f"a divisor of dim = {dim}")
        own = len(kernel_size) if isinstance(kernel_size, Sequence) else None
        self.grid_dims = require_int("grid_dims", grid_dims if grid_dims is not None else own or 2, 1)
        require(self.grid_dims <= 3, "grid_dims", self.grid_dims, "1, 2 or 3")
        require(own in (None, self.grid_dims), "kernel_size", kernel_size, f"an int or {self.grid_dims} of them")
        self.num_heads, self.scale, self.attn_drop, self.pad_small = num_heads, scale, attn_drop, pad_small
        self.kernel_size = (kernel_size,) * self.grid_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride, self.dilation = (tuple(x) if isinstance(x, Sequence) else x for x in (stride, dilation))
        self.is_causal = tuple(is_causal) if isinstance(is_causal, Sequence) else is_causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rel_pos_bias: nn.Parameter | None = None
        if rel_pos_bias:
            shape = (num_heads, *(2 * kernel - 1 for kernel in self.kernel_size))
            self.rel_pos_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """NATTEN's names are ours; the bias table `rpb` of NAT and DiNAT becomes `rel_pos_bias`."""
        return {"rel_pos_bias" if name == "rpb" else name: tensor for name, tensor in state.items()}

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, dim) to the same."""
        require_tensor("x", x, dims=self.grid_dims + 2, floating=True)
        require(x.shape[-1] == self.qkv.in_features, "x", f"{x.shape[-1]} channels", f"dim = {self.qkv.in_features}")
        grid = x.shape[1:-1]
        if self.pad_small:
            x = self._padded(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = neighborhood_attention(
            q,
            k,
            v,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            scale=self.scale,
            rel_pos_bias=self.rel_pos_bias,
            dropout=self.attn_drop if self.training else 0.0,
        )
        own = (slice(None), *(slice(length) for length in grid))
        return self.proj_drop(self.proj(out[own].flatten(-2)))

    def _padded(self, x: Tensor) -> Tensor:
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * self.grid_dims
        reach = [kernel * step for kernel, step in zip(self.kernel_size, dilation)]
        short = [max(0, need - length) for need, length in zip(reach, x.shape[1:-1])]
        if not any(short):
            return x
        return nn.functional.pad(x, (0, 0, *(end for missing in reversed(short) for end in (0, missing))))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """`NeighborhoodAttention` on sequences, (B, N, dim)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int | Sequence[int], *args, **options) -> None:
        super().__init__(dim, num_heads, kernel_size, *args, grid_dims=1, **options)


class NeighborhoodAttention2D(NeighborhoodAttention):
    """`NeighborhoodAttention` on maps, (B, height, width, dim)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int | Sequence[int], *args, **options) -> None:
        super().__init__(dim, num_heads, kernel_size, *args, grid_dims=2, **options)


class NeighborhoodAttention3D(NeighborhoodAttention):
    """`NeighborhoodAttention` on videos and volumes, (B, depth, height, width, dim)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int | Sequence[int], *args, **options) -> None:
        super().__init__(dim, num_heads, kernel_size, *args, grid_dims=3, **options)
