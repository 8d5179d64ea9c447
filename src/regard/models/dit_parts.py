"""Parts that diffusion transformers share: fixed positions of a grid, waves of a diffusion step, their first weights.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2022, arXiv 2212.09748).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import require, require_int
from ..nn.spatial.grids import Grid

__all__ = ["init_xavier", "sincos_2d", "time_waves"]


def sincos_2d(dim: int, grid: Grid) -> Tensor:
    """Fixed position embeddings (height * width, dim) float32, rows first: a half of the channels tells the column, the other the row,
    each as dim / 4 sines, then as many cosines, of rates falling from 1 to 1 / 10000."""
    require_int("dim", dim, 4)
    require(dim % 4 == 0, "dim", dim, "a multiple of 4")
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def time_waves(times: Tensor, width: int = 256) -> Tensor:
    """Cosines, then sines, (B, width) float32, of diffusion steps (B,) at width / 2 falling rates."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=times.device) / half)
    angles = times[:, None].float() * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def init_xavier(network: nn.Module, patch: nn.Conv2d) -> None:
    """Xavier's uniform weights for every linear layer and for the map of patches, zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patch.weight.data.flatten(1))
    assert patch.bias is not None
    nn.init.zeros_(patch.bias)
