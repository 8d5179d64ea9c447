"""Token-aware average pooling (TAP), Guo et al., "Robustifying Token Attention for Vision Transformers" (ICCV 2023,
arXiv 2303.11126). Code read for numbers: guoyongcs/TAPADL @ 6e4dbff (MIT), the same part in its FAN and RVT networks.

What differs: the authors' blocks need a square grid of tokens, this module takes any; the pools are computed by
shifted sums instead of unfolding, which needs a ninth of the memory. The paper's loss is
`regard.losses.attention_diversification`.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from ...ops.reference import accumulation_dtype
from ..layers import rename_keys
from .grids import Grid, grid_pair


def dilated_average(x: Tensor, dilation: int) -> Tensor:
    """Mean over the 3x3 neighbours at distance `dilation`: x (B, C, H, W) -> (B, C, H, W).

    Outside the map counts as zero and the sum is always divided by 9, also at the border. `dilation=0` returns x.
    """
    require_tensor("x", x, dims=4)
    if require_int("dilation", dilation, 0) == 0:
        return x
    height, width = x.shape[2:]
    rows = _sum_of_three(F.pad(x, (dilation,) * 4), 2, height, dilation)
    return _sum_of_three(rows, 3, width, dilation) / 9.0


def _sum_of_three(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    return x.narrow(dim, 0, size) + x.narrow(dim, step, size) + x.narrow(dim, 2 * step, size)


class TokenAwarePooling(nn.Module):
    """Replace every token by a mix of itself and averages of its neighbourhood, the mix chosen by the token.

    `y = sum_r w_r * pool_r(x)`: pool_0 is the identity, pool_r a 3x3 average with dilation r (`dilated_average`), and
    w (one number a scale and position, shared by the channels, summing to 1 over the scales) comes from
    conv3x3 -> BatchNorm -> conv3x3 -> softmax of `logits / temperature` on x itself.

    In a transformer block it stands on the attention branch only, before the norm:
    `x = x + attention(norm(tap(x)))`, then the block's MLP on x as ever.

    Args:
        dim: channels C.
        num_scales: number K of pools, the identity included (dilations 0..K-1); default 4. With 1 it is the identity.
        temperature: divides the logits; default 1.

    A map is (B, C, H, W). Tokens (B, N, C) in row-major order work too, given `grid=(H, W)`, or without it where N is
    a square. The batch norm makes training and evaluation differ. The authors' `DilationPredictor` loads through
    `official_keys` (`proj.*`, also below `dilation_predictor.` as in their blocks).

    Raises:
        ValueError: arguments out of range; in `forward`, an input of another shape or a grid that does not fit it.
    """

    def __init__(self, dim: int, num_scales: int = 4, temperature: float = 1.0) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.num_scales = require_int("num_scales", num_scales, 1)
        require(temperature > 0, "temperature", temperature, "a number > 0")
        self.temperature = float(temperature)
        self.predictor = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def weights(self, x: Tensor) -> Tensor:
        """The mix at each position: x (B, C, H, W) -> (B, K, H, W), summing to 1 over K."""
        logits = self.predictor(x) / self.temperature
        return logits.to(accumulation_dtype(logits.dtype)).softmax(dim=1).to(logits.dtype)

    def forward(
        self, x: Tensor, grid: Grid | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W), or tokens (B, N, C) -> the same shape; with `return_weights` also w (B, K, H, W).

        Args:
            grid: (H, W) of tokens, default a square; not used for maps.
            return_weights: return (y, w).
        """
        require_tensor("x", x, floating=True)
        image = self._as_map(x, grid) if x.dim() == 3 else x
        good = image.dim() == 4 and image.shape[1] == self.dim
        require(good, "x", f"shape {tuple(x.shape)}", f"shape (B, {self.dim}, H, W) or (B, N, {self.dim})")
        weights = self.weights(image)
        pooled = weights[:, :1] * image
        for dilation in range(1, self.num_scales):
            pooled = pooled + weights[:, dilation : dilation + 1] * dilated_average(image, dilation)
        if x.dim() == 3:
            pooled = pooled.flatten(2).transpose(1, 2)
        return (pooled, weights) if return_weights else pooled

    def _as_map(self, tokens: Tensor, grid: Grid | None) -> Tensor:
        count = tokens.shape[1]
        if grid is None:
            side = math.isqrt(count)
            require(side * side == count, "grid", grid, f"(height, width) for {count} tokens, which are no square")
            grid = (side, side)
        height, width = grid_pair("grid", grid)
        require(height * width == count, "grid", grid, f"(height, width) with height * width = {count} tokens")
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' DilationPredictor (alone, or as part of one of their blocks) to ours."""
        return rename_keys(state, (r"^(dilation_predictor\.)?proj\.(\d)\.", r"predictor.\2."))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_scales={self.num_scales}, temperature={self.temperature}"
