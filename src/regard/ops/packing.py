"""From a padded batch to packed sequences and back, for `attention_varlen`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_tensor

__all__ = ["pack_padded", "unpack_padded"]


def pack_padded(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of a padded batch, one sequence after the other.

    Args:
        x: (B, S, ...). real: bool (B, S), True = real; padding may stand anywhere.

    Returns: (packed (tokens, ...), cu_seqlens (B + 1,) int64): row b of the batch is `packed[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        Differentiable in x.
    """
    _check(real)
    require_tensor("x", x)
    require(x.shape[:2] == real.shape, "x", f"shape {tuple(x.shape)}", f"(B, S, ...) with B, S = {tuple(real.shape)}")
    starts = torch.zeros(real.shape[0] + 1, dtype=torch.long, device=real.device)
    starts[1:] = real.sum(-1).cumsum(0)
    return x.flatten(0, 1).index_select(0, real.flatten().nonzero()[:, 0].to(x.device)), starts


def unpack_padded(packed: Tensor, real: Tensor) -> Tensor:
    """Undo `pack_padded`: (B, S, ...) with zeros where nothing is real. Differentiable in `packed`."""
    _check(real)
    require_tensor("packed", packed)
    count = int(real.sum())
    require(packed.dim() >= 1 and packed.shape[0] == count, "packed", f"shape {tuple(packed.shape)}", f"{count} tokens")
    out = packed.new_zeros((real.numel(), *packed.shape[1:]))
    return out.index_copy(0, real.flatten().nonzero()[:, 0].to(packed.device), packed).unflatten(0, tuple(real.shape))


def _check(real: Tensor) -> None:
    require_tensor("real", real, dims=2)
    require(real.dtype == torch.bool, "real", real.dtype, "bool, True = real")
