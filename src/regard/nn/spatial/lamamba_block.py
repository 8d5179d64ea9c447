"""LaMamba block: Mamba over the whole map, softmax attention in windows of it, an MLP, each modulated by a condition.

LaMamba-Diff (Fu et al. 2024, arXiv 2408.02615). Code read for numbers: yunxiangfu2001/LaMamba-Diff @ 27b3c1d (MIT), `model/lamamba.py`
(`LaMambaBlock_conditioned`). What differs: height and width may differ; without a condition the block is a plain residual one.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ..layers import drop_samples
from ..sequence.pre_norm import require_rate
from .block_parts import Mlp, attend_in_windows
from .grids import Grid, grid_pair
from .selective_scan_2d import SelectiveScan2D
from .window_attention import WindowSoftmaxAttention, shifted_window_bias

__all__ = ["LaMambaBlock", "modulate"]

PARTS = ("scan", "attention", "mlp")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


class LaMambaBlock(nn.Module):
    """(B, height, width, dim) and a condition (B, condition_dim) -> (B, height, width, dim).

    For each part in turn: `x += gate * part(norm(x) * (1 + scale) + shift)`; shift, scale and gate of the three parts are a linear map of
    the condition, zero at first, so that a new block gives back its input.

    Args:
        dim. grid: height and width of the map. num_heads, window, shift: of the attention; a window that is not smaller than the map is the
            map, not shifted; else its side divides the map's. shift: cells by which windows are moved (half a window in every other block).
        condition_dim: width of the condition; None: no condition, gates of 1. project: map the condition to dim even where it is dim wide.
        d_state, ratio, conv_bias, scans, dt_rank: of the scan, as `SelectiveScan2D`. mlp_ratio: hidden width of the MLP over dim.
        parts: those that the block has, of "scan", "attention", "mlp". drop_path: stochastic depth of them, in [0, 1).

    Parameter names are the authors'.
    """

    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        grid: int | Grid,
        num_heads: int,
        *,
        condition_dim: int | None = None,
        project: bool = False,
        window: int = 8,
        shift: int = 0,
        d_state: int = 16,
        ratio: float = 2.0,
        conv_bias: bool = True,
        scans: str = "continuous",
        dt_rank: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        parts: tuple[str, ...] = PARTS,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.grid, self.parts = require_int("dim", dim, 1), grid_pair("grid", grid), tuple(parts)
        require(bool(parts) and set(parts) <= set(PARTS), "parts", parts, f"some of {PARTS}")
        side = min(require_int("window", window, 1), *self.grid)
        self.window, self.shift = (side, side), 0 if min(self.grid) <= window else require_int("shift", shift, 0)
        fits = self.grid[0] % side == 0 and self.grid[1] % side == 0
        require("attention" not in parts or fits, "window", window, f"a side that divides the grid {self.grid}")
        require(self.shift < side, "shift", shift, f"less than the window ({side})")
        self.drop_path = require_rate("drop_path", drop_path)
        if "scan" in parts:
            self.norm = nn.LayerNorm(dim)
            self.op = SelectiveScan2D(dim, d_state, ratio, dt_rank=dt_rank, conv_bias=conv_bias, scans=scans)
        if "attention" in parts:
            self.norm_swin = nn.LayerNorm(dim)
            self.attn = WindowSoftmaxAttention(dim, num_heads, self.window, qkv_bias=qkv_bias)
        if "mlp" in parts:
            self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        kept = shifted_window_bias(self.grid, self.window, self.shift) if self.shift and "attention" in parts else None
        self.register_buffer("bias", kept, persistent=False)
        self.condition_dim = condition_dim
        if condition_dim is not None:
            straight = condition_dim == dim and not project
            self.condition_projection = nn.Identity() if straight else nn.Linear(condition_dim, dim)
            last = nn.Linear(dim, 9 * dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), last)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        require_tensor("x", x, dims=4, floating=True)
        need = (*self.grid, self.dim)
        require(tuple(x.shape[1:]) == need, "x", f"shape {tuple(x.shape)}", f"(B, {', '.join(map(str, need))})")
        zero, one = x.new_zeros(()), x.new_ones(())
        changes = [(zero, zero, one)] * 3
        if self.condition_dim is not None:
            width = (x.shape[0], self.condition_dim)
            require_tensor("condition", condition)
            assert condition is not None
            require(tuple(condition.shape) == width, "condition", f"shape {tuple(condition.shape)}", f"{width}")
            nine = self.adaLN_modulation(self.condition_projection(condition))[:, None, None].chunk(9, dim=-1)
            changes = [(nine[i], nine[i + 1], nine[i + 2]) for i in (0, 3, 6)]
        for name, (shift, scale, gate) in zip(PARTS, changes):
            if name in self.parts:
                made = gate * self._part(name, x, shift, scale)
                x = x + drop_samples(made, self.drop_path, self.training)
        return x

    def _part(self, name: str, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if name == "scan":
            return self.op.channels_last(modulate(self.norm(x), shift, scale))
        if name == "mlp":
            return self.mlp(modulate(self.norm2(x), shift, scale))
        tokens = modulate(self.norm_swin(x), shift, scale).flatten(1, 2)
        made = attend_in_windows(lambda cells: self.attn(cells, self.bias), tokens, self.grid, self.window, self.shift)
        return made.unflatten(1, self.grid)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' block; the mask and the index that it keeps are left out."""
        gone = ("relative_position_index", "attn_mask")
        return {name: value for name, value in state.items() if not name.endswith(gone)}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}, window={self.window}, shift={self.shift}, parts={self.parts}"
