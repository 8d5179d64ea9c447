"""A short causal convolution of each channel, with its state: what recurrent mixers stand on, or behind their projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import require_int

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """A causal convolution of each channel over `width` tokens: (B, N, dim) -> (B, N, dim). Starts near nothing."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = require_int("width", width, 2)
        self.conv = nn.Conv1d(dim, dim, width, groups=dim, bias=False)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """before: the last `width - 1` tokens (zeros at the start). Returns the output and the last `width - 1` tokens."""
        before = x.new_zeros(x.shape[0], self.width - 1, x.shape[2]) if before is None else before
        if not x.shape[1]:
            return x, before
        whole = torch.cat((before, x), dim=1)
        return self.conv(whole.transpose(1, 2)).transpose(1, 2), whole[:, whole.shape[1] - self.width + 1 :]
