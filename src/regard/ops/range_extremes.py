"""Smallest and largest value within any range of positions, in constant time: how masks with tables bound themselves over blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def range_table(values: Tensor) -> Tensor:
    """(2, levels, R, N) of `values` (R, N) integers: smallest and largest within [i, i + 2^level) of each row."""
    low = high = values
    last, step = values.shape[1] - 1, 1
    levels = [torch.stack([low, high])]
    while 2 * step <= values.shape[1]:
        later = (torch.arange(last + 1, device=values.device) + step).clamp(max=last)
        low, high = torch.minimum(low, low[:, later]), torch.maximum(high, high[:, later])
        levels.append(torch.stack([low, high]))
        step *= 2
    return torch.stack(levels, dim=1)


def range_extremes(table: Tensor, row: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of `row` within the inclusive range [lo, hi], from two overlapping powers of two of a `range_table`."""
    last = table.shape[3] - 1
    lo, hi = lo.clamp(0, last), hi.clamp(0, last)
    span = (hi - lo + 1).clamp(min=1)
    level = (torch.frexp(span.double()).exponent - 1).long()
    second = hi - (1 << level) + 1
    low = torch.minimum(table[0][level, row, lo], table[0][level, row, second])
    high = torch.maximum(table[1][level, row, lo], table[1][level, row, second])
    return low, high
