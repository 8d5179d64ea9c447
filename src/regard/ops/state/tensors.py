"""Small helpers that every form of linear attention needs."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types, the dtype itself for float32 and float64."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def expand_heads(x: Tensor, groups: int) -> Tensor:
    """(B, Hkv, ...) -> (B, Hkv * groups, ...): query head h reads kv head h // groups. A view when groups == 1."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """States accumulate in float32, also where the caller's autocast would make every product a half one."""
    return torch.autocast(device_type=device.type, enabled=False)
