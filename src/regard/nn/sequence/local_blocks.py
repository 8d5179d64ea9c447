"""Which tokens local heads see: blocks, as Routing Transformers cut them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import masks
from ...ops.masks import Mask


def local_mask(block: int, reach: int, causal: bool, real: Tensor | None = None) -> Mask:
    """A token sees its own block of `block` tokens, `reach` blocks before it and (unless causal) as many after it.

    Args:
        real: bool (B, N), False for padding, which nobody sees.
    """
    if causal:
        near = masks.block_local(block, reach) & masks.causal
    else:
        # the window says which blocks there is nothing to ask about
        near = masks.sliding_window((reach + 1) * block) & masks.from_function(
            lambda b, h, i, j: (i // block - j // block).abs() <= reach, varies_batch=False, varies_head=False
        )
    if real is None or bool(real.all()):
        return near
    last = real.shape[1] - 1
    return near & masks.from_function(lambda b, h, i, j: real[b, j.clamp(max=last)], varies_head=False)


def local_groups(
    length: int, block: int, flange: int, causal: bool, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as groups of tokens: blocks of queries with the keys around them.

    Returns:
        numbers of query tokens (G, block) and of key tokens (G, m), -1 where there is none, and the distance of each key place from
        each query place, int64 (block, m). m is block + flange, or block + 2 flange where not causal.
    """
    rows = torch.arange(length + -length % block, device=device).view(-1, block)
    reach = torch.arange(block + flange * (1 if causal else 2), device=device) - flange
    columns = rows[:, :1] + reach
    inside = (columns >= 0) & (columns < length)
    distance = reach - torch.arange(block, device=device)[:, None]
    return torch.where(rows < length, rows, -1), torch.where(inside, columns, -1), distance


def strided_groups(length: int, stride: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Every `stride`-th token a group: numbers (stride, ceil(length / stride)), -1 where there is none, and distances in strides."""
    index = torch.arange(length + -length % stride, device=device).view(-1, stride).T
    place = torch.arange(index.shape[1], device=device)
    return torch.where(index < length, index, -1), place - place[:, None]
