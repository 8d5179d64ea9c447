"""Mamba on images: four paths over the grid, a selective scan along each, their results summed.

LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba (Fu et al. 2024, arXiv 2408.02615), and VMamba
(Liu et al. 2024, arXiv 2401.10166), whose `SS2D` it changes. Code read for numbers: yunxiangfu2001/LaMamba-Diff @ 27b3c1d (MIT),
`model/vmamba.py` (`forward_type="v2"`), `model/continuous_scan.py`. What differs: any height and width (theirs: squares).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, require_tensor
from ...ops.state.selective_scan import selective_scan
from ..sequence.pre_norm import require_rate
from .grids import Grid, grid_pair

__all__ = ["SelectiveScan2D", "scan_paths"]

SCANS = ("continuous", "raster")
PATHS = 4


def scan_paths(grid: int | Grid, scans: str = "continuous") -> Tensor:
    """Four orders of the cells of a grid, (4, height * width) int64: place in the order -> cell, row * width + column.

    "continuous": snakes, so that what follows in the order lies side by side: by rows from the top left and the bottom left, by columns
    from the bottom left and the bottom right. "raster": by rows, by columns, and both backwards (VMamba).
    """
    return _paths(grid_pair("grid", grid), require_name("scans", scans, SCANS)).clone()


@lru_cache(maxsize=64)
def _paths(grid: Grid, scans: str) -> Tensor:
    height, width = grid
    cells = torch.arange(height * width).reshape(height, width)
    if scans == "raster":
        both = torch.stack((cells.flatten(), cells.T.flatten()))
        return torch.cat((both, both.flip(1)))
    return torch.stack([_snake(cells), _snake(cells.flip(0)), _snake(cells.flip(0).T), _snake(cells.flip(0, 1).T)])


def _snake(cells: Tensor) -> Tensor:
    """Row by row, every other row backwards."""
    turned = cells.clone()
    turned[1::2] = turned[1::2].flip(1)
    return turned.flatten()


class SelectiveScan2D(nn.Module):
    """(B, dim, height, width) -> the same: projection, depthwise convolution, four selective scans, norm, gate, projection.

    Args:
        dim: channels. d_state: numbers in the state of a channel (1 in LaMamba-Diff's largest). ratio: inner channels over dim.
        dt_rank: width through which step sizes are made; default dim / 16, rounded up.
        kernel: side of the convolution, odd; 1: none. conv_bias: its bias. scans: "continuous" or "raster", see `scan_paths`.
        dropout: of the result, in [0, 1). form: of the scans, as `regard.ops.state.selective_scan`.

    Parameter names are the authors'.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ratio: float = 2.0,
        *,
        dt_rank: int | None = None,
        kernel: int = 3,
        conv_bias: bool = True,
        scans: str = "continuous",
        dropout: float = 0.0,
        form: str = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.d_state = require_int("dim", dim, 1), require_int("d_state", d_state, 1)
        self.inner = int(ratio * dim)
        require(self.inner >= 1, "ratio", ratio, "a number that leaves at least one inner channel")
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else require_int("dt_rank", dt_rank, 1)
        self.scans, self.form = require_name("scans", scans, SCANS), form
        require(require_int("kernel", kernel, 1) % 2 == 1, "kernel", kernel, "an odd number")
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv2d = None
        if kernel > 1:
            self.conv2d = nn.Conv2d(
                self.inner, self.inner, kernel, padding=kernel // 2, groups=self.inner, bias=conv_bias
            )
        bound = self.inner**-0.5
        self.x_proj_weight = nn.Parameter(
            torch.empty(PATHS, self.dt_rank + 2 * d_state, self.inner).uniform_(-bound, bound)
        )
        bound = self.dt_rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(PATHS, self.inner, self.dt_rank).uniform_(-bound, bound))
        low, high = math.log(1e-3), math.log(1e-1)
        step = (torch.rand(PATHS, self.inner) * (high - low) + low).exp().clamp(min=1e-4)
        self.dt_projs_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # softplus of it is `step`
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(PATHS * self.inner, 1))
        self.Ds = nn.Parameter(torch.ones(PATHS * self.inner))
        self.out_norm = nn.LayerNorm(self.inner)
        self.out_proj, self.dropout = (
            nn.Linear(self.inner, dim, bias=False),
            nn.Dropout(require_rate("dropout", dropout)),
        )

    def forward(self, x: Tensor) -> Tensor:
        require_tensor("x", x, dims=4, floating=True)
        return self.channels_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def channels_last(self, x: Tensor) -> Tensor:
        """(B, height, width, dim) -> the same."""
        require_tensor("x", x, dims=4, floating=True)
        require(x.shape[3] == self.dim, "x", f"shape {tuple(x.shape)}", f"{self.dim} channels")
        inside, gate = self.in_proj(x).chunk(2, dim=-1)
        if self.conv2d is not None:
            inside = self.conv2d(inside.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.out_norm(self._scan(F.silu(inside)))
        return self.dropout(self.out_proj(y * F.silu(gate)))

    def _scan(self, x: Tensor) -> Tensor:
        """The four scans of x (B, height, width, inner), each cell's results summed."""
        batch, height, width, inner = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        paths = _paths((height, width), self.scans).to(x.device)
        u = x.flatten(1, 2)[:, paths]  # (B, 4, N, inner)
        made = torch.einsum("bknd,kcd->bnkc", u, self.x_proj_weight)
        low, b, c = made.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        step = torch.einsum("bnkr,kdr->bnkd", low, self.dt_projs_weight).to(wide) + self.dt_projs_bias.to(wide)
        u = u.transpose(1, 2).flatten(2)  # (B, N, 4 * inner)
        y = selective_scan(
            u.to(wide), F.softplus(step).flatten(2), -self.A_logs.to(wide).exp(), b, c, self.Ds.to(wide), form=self.form
        )
        y = y.unflatten(2, (PATHS, inner)).transpose(1, 2)
        back = paths.argsort(dim=1)
        summed = y.gather(2, back[None, :, :, None].expand(batch, -1, -1, inner)).sum(1)
        return summed.to(x.dtype).unflatten(1, (height, width))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, d_state={self.d_state}, inner={self.inner}, scans={self.scans}"
