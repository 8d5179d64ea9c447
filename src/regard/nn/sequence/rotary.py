"""Rotary positions in the halves layout of GPT-NeoX and LLaMA, on all or on the first channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary_table", "rotate"]


def rotary_table(positions: Tensor, dims: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., dims) float32 of integer positions (...); channel i turns with i + dims / 2."""
    rates = 1.0 / base ** (torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angles = positions[..., None].to(torch.float32) * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first channels of x (B, H, N, D), as many as the table (N, dims) or (B, 1, N, dims) has; the others stay."""
    cos, sin = (t.to(x.dtype) for t in table)
    dims = cos.shape[-1]
    turning, rest = x[..., :dims], x[..., dims:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
