"""Softmax attention within one window of tokens: what networks with linear attention keep beside it.

Liu et al., "Swin Transformer" (ICCV 2021, arXiv 2103.14030), as in the InLine (LeapLabTHU/InLine @ e463a6f) and L2ViT
(ChuanyangZheng/L2ViT @ fad0341, without bias) networks, whose numbers it has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.attention import attention
from ..sequence.pre_norm import require_rate
from .grids import Grid, grid_pair, to_windows

__all__ = ["WindowSoftmaxAttention", "shifted_window_bias"]


class WindowSoftmaxAttention(nn.Module):
    """(windows, height * width, dim) -> the same: softmax attention among the tokens of each window.

    Args:
        dim: channels, a multiple of `num_heads`. num_heads: heads.
        window: (height, width) of a window, or an int for a square.
        relative_bias: a learned number for each head and offset between two cells, added to the scores.
        qkv_bias: bias of the q, k, v projection. attn_drop, proj_drop: dropout of weights and output, in [0, 1).

    `forward(x, bias=None)`: `bias` (windows of one image, height * width, the same) is added to the scores of all heads; windows are
    those of image after image.
    """

    offsets: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | Grid,
        relative_bias: bool = True,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.window, self.attn_drop = grid_pair("window", window), require_rate("attn_drop", attn_drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(require_rate("proj_drop", proj_drop))
        self.relative_position_bias_table = None
        if relative_bias:
            height, width = self.window
            table = torch.empty((2 * height - 1) * (2 * width - 1), num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            rows, columns = rows.flatten(), columns.flatten()
            down = rows[:, None] - rows + height - 1
            right = columns[:, None] - columns + width - 1
            self.register_buffer("offsets", down * (2 * width - 1) + right, persistent=False)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Swin's `WindowAttention`: the index that it keeps as a buffer is left out."""
        return {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        cells = self.window[0] * self.window[1]
        require(
            tuple(x.shape[1:]) == (cells, self.dim), "x", f"shape {tuple(x.shape)}", f"(windows, {cells}, {self.dim})"
        )
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        added = None
        if self.relative_position_bias_table is not None:
            added = self.relative_position_bias_table[self.offsets].permute(2, 0, 1)[None]
        if bias is not None:
            fits = bias.dim() == 3 and x.shape[0] % bias.shape[0] == 0
            require(fits, "bias", f"shape {tuple(bias.shape)}", f"(windows of an image, {cells}, {cells})")
            per_window = bias.to(x.dtype)[:, None].repeat(x.shape[0] // bias.shape[0], 1, 1, 1)
            added = per_window if added is None else added + per_window
        out = attention(q, k, v, bias=added, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


def shifted_window_bias(grid: Grid, window: Grid, shift: int) -> Tensor:
    """Keeps apart cells that only the roll brought into one window: (windows, cells, cells), 0 for neighbours, -100 for others (Swin)."""
    regions = torch.zeros(1, *grid, 1)
    bands = [[(0, side - cut), (side - cut, side - shift), (side - shift, side)] for side, cut in zip(grid, window)]
    for i, (top, bottom) in enumerate(bands[0]):
        for j, (left, right) in enumerate(bands[1]):
            regions[:, top:bottom, left:right] = 3 * i + j
    cells = to_windows(regions, window)[..., 0]
    return torch.where(cells[:, :, None] == cells[:, None], 0.0, -100.0)
