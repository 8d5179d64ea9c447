"""Attention inside groups of tokens, with half the heads seeing the groups shifted by half a group.

LongLoRA's S2-Attn (Chen et al. 2023, arXiv 2309.12307) and SinkLoRA's SF-Attn (Zhang 2024, arXiv 2406.05678). Numbers from
Dexter-GT-86/SinkLoRA @ a741094 (Apache-2.0), which holds S2-Attn only. Meant for training: cost N * group instead of N * N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from . import masks
from .attention import attention
from .mask_groups import SHIFTS, shifted_heads

__all__ = ["shifted_group_attention"]


def shifted_group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int,
    *,
    shift: str = "clip",
    sink: int = 0,
    shift_heads: float = 0.5,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention inside groups of `group` tokens; the LAST heads have their groups shifted by half a group.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv).
        group: tokens a group. With shift "clip" and "none" the last group may be shorter.
        shift: "clip" (default): shifted heads have a half group at either end, so nothing wraps around and nothing leaks (the
            SF-Attn reading of SinkLoRA's text). "none": no head is shifted. "cyclic": as in the released S2-Attn the sequence
            is rolled, so the first tokens of shifted heads SEE THE END of the sequence; N must be a multiple of `group`. For an
            odd group the release rolls forth by one more than it rolls back, so shifted outputs land one row early; so here.
        sink: tokens at the start that every later query sees, in every head. Not with "cyclic", which has none.
        shift_heads: share of the heads that is shifted, in [0, 1].
        scale, dropout, backend: as in `regard.ops.attention`.

    Returns:
        (B, H, N, Dv). `group >= N` without shifted heads, or `sink >= N`, is full causal attention.
    """
    require_tensor("q", q, dims=4, floating=True)
    require_int("group", group, 1)
    require_int("sink", sink, 0)
    require_name("shift", shift, SHIFTS)
    moved = shifted_heads(q.shape[1], shift_heads)
    require(k.dim() == 4 and k.shape[2] == q.shape[2], "k", f"shape {tuple(k.shape)}", f"{q.shape[2]} tokens, like q")
    if shift != "cyclic":
        mask = masks.shifted_group(q.shape[1], group, shift=shift, shift_heads=shift_heads, sink=sink)
        return attention(q, k, v, mask=mask, scale=scale, dropout=dropout, backend=backend)
    require(sink == 0, "sink", sink, "0 with shift='cyclic'")
    length = q.shape[2]
    require(length % group == 0, "group", group, f"a divisor of the sequence length, {length}, with shift='cyclic'")
    heads, kv_heads = q.shape[1], k.shape[1]
    require(kv_heads > 0 and heads % kv_heads == 0, "k", f"{kv_heads} kv heads", f"a divisor of q's {heads} heads")
    # shifted and unshifted query heads may share a kv head, so each half takes the kv heads it needs
    parts = []
    for numbers, shifted in ((range(heads - moved), False), (range(heads - moved, heads), True)):
        if not len(numbers):
            continue
        kv = torch.tensor([head // (heads // kv_heads) for head in numbers], device=q.device)
        rolled = [part.roll(-group // 2, 2) if shifted else part for part in _halves(q, k, v, numbers, kv)]
        cut = [part.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for part in rolled]
        out = attention(*cut, mask=masks.causal, scale=scale, dropout=dropout, backend=backend)
        out = out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        parts.append(out.roll(group // 2, 2) if shifted else out)
    return torch.cat(parts, dim=1)


def _halves(q: Tensor, k: Tensor, v: Tensor, numbers: range, kv: Tensor) -> list[Tensor]:
    return [q[:, numbers.start : numbers.stop], k.index_select(1, kv), v.index_select(1, kv)]
