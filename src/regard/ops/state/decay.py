"""How fast a state forgets: decay schedules, and sums of log decays."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_int, require_name
from ..scores import alibi_slopes

__all__ = ["alibi_slopes", "cumulative_decay", "layer_log_decay"]

# Nothing survives exp(-1e5) in any dtype, and sums of it stay exact enough in float64 to subtract.
_FORGET = -1e5


def layer_log_decay(num_heads: int, layer_idx: int, num_layers: int, variant: str = "released") -> Tensor:
    """Log decay per head (H,) float32, <= 0, of layer `layer_idx` (from 0) of `num_layers` in TransNormerLLM.

    Early layers forget fast, the last layer hardly at all.
    variant "released": -alibi_slope * (1 - layer_idx / (num_layers - 1) + 1e-5), behind every released checkpoint (a
    single layer counts as the first).
    variant "paper": -(8 h / H) * (1 - layer_idx / num_layers), h = 1..H, equation 10 of arXiv 2405.17381: linear in the
    head where the code is geometric.
    """
    require_name("variant", variant, ("released", "paper"))
    require_int("num_heads", num_heads, 1)
    require_int("num_layers", num_layers, 1)
    require_int("layer_idx", layer_idx, 0)
    require(layer_idx < num_layers, "layer_idx", layer_idx, f"less than num_layers ({num_layers})")
    if variant == "paper":
        heads = torch.arange(1, num_heads + 1, dtype=torch.float32)
        return -8.0 * heads / num_heads * (1 - layer_idx / num_layers)
    depth = layer_idx / (num_layers - 1) if num_layers > 1 else 0.0
    return -alibi_slopes(num_heads) * (1 - depth + 1e-5)


def cumulative_decay(log_decay: Tensor) -> Tensor:
    """Running sum over tokens (dim 2), in float64 because only differences of it are used; -inf means "forget all"."""
    wide = log_decay if log_decay.device.type == "mps" else log_decay.double()
    return wide.clamp(min=_FORGET).cumsum(dim=2)
