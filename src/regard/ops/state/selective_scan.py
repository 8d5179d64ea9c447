"""Mamba's selective scan: a state for each channel whose decay, input and readout depend on the token.

Gu and Dao 2023 (arXiv 2312.00752), as the reference function of LaMamba-Diff (yunxiangfu2001/LaMamba-Diff @ 27b3c1d, MIT,
`kernels/selective_scan`) computes it. What differs: time stands second and channels last; real states alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import require, require_int, require_name, require_tensor
from .linear_scan import linear_scan

__all__ = ["selective_scan"]

FORMS = ("auto", "parallel", "chunk", "recurrent")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int | None = None,
) -> Any:
    """h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t, y_t = c_t . h_t + d u_t, each channel on its own: (B, N, C).

    Args:
        u, delta: (B, N, C), inputs and step sizes (already positive). a: (C, S), negative for a state that forgets.
        b, c: (B, N, S), or (B, N, G, S) for G groups of C / G channels that follow one another. d: (C,), or None.
        initial: (B, C, S), the state before the first step; None: zeros. return_state: also give the state after the last step, float32 for
            half types: (y, (B, C, S)).
        form: "recurrent", N steps, the definition; "parallel", log2(N) rounds on whole tensors; "chunk", all chunks side by side step by
            step, then joined; "auto": chunk from 16 tokens on, else recurrent. Equal up to rounding, differentiable.
        chunk_size: tokens of a chunk; default the square root of N, which makes the fewest steps.

    Half types are computed in float32.
    """
    require_tensor("u", u, dims=3, floating=True)
    batch, length, channels = u.shape
    require(
        tuple(delta.shape) == tuple(u.shape), "delta", f"shape {tuple(delta.shape)}", f"{tuple(u.shape)}, that of u"
    )
    require(a.dim() == 2 and a.shape[0] == channels, "a", f"shape {tuple(a.shape)}", f"({channels}, S)")
    size = a.shape[1]
    require_name("form", form, FORMS)
    chunk = math.isqrt(max(length - 1, 0)) + 1 if chunk_size is None else require_int("chunk_size", chunk_size, 1)
    wide = torch.promote_types(u.dtype, torch.float32)
    drive, readout = (_by_channel(name, part, u, size).to(wide) for name, part in (("b", b), ("c", c)))
    x, step = u.to(wide), delta.to(wide)
    log_keep = step[..., None] * a.to(wide)
    push = (step * x)[..., None] * drive
    start = None
    if initial is not None:
        need = (batch, channels, size)
        require(tuple(initial.shape) == need, "initial", f"shape {tuple(initial.shape)}", f"{need}")
        start = initial.to(wide)
    if form == "auto":
        form = "recurrent" if length < 16 else "chunk"
    if form == "chunk" and length:
        h = _chunked(log_keep, push, start, chunk)
    else:
        h = linear_scan(log_keep.exp(), push, start, form="parallel" if form == "parallel" else "recurrent")
    y = (h * readout).sum(-1)
    if d is not None:
        require(tuple(d.shape) == (channels,), "d", f"shape {tuple(d.shape)}", f"({channels},)")
        y = y + d.to(wide) * x
    y = y.to(u.dtype)
    if not return_state:
        return y
    if not length:
        return y, x.new_zeros(batch, channels, size) if start is None else start
    return y, h[:, -1]


def _by_channel(name: str, part: Tensor, u: Tensor, size: int) -> Tensor:
    """(B, N, S) or (B, N, G, S) -> (B, N, 1 or C, S)."""
    batch, length, channels = u.shape
    grouped = part[:, :, None] if part.dim() == 3 else part
    fits = grouped.dim() == 4 and (*grouped.shape[:2], grouped.shape[3]) == (batch, length, size)
    need = f"({batch}, {length}, {size}), or with groups that divide {channels} channels before the last axis"
    require(fits and channels % grouped.shape[2] == 0, name, f"shape {tuple(part.shape)}", need)
    return grouped if grouped.shape[2] == 1 else grouped.repeat_interleave(channels // grouped.shape[2], dim=2)


def _chunked(log_keep: Tensor, push: Tensor, start: Tensor | None, chunk: int) -> Tensor:
    """All states (B, N, C, S): within chunks step by step, all chunks at once; then the state before each chunk is added."""
    length = push.shape[1]
    missing = -length % chunk
    log_keep, push = (F.pad(t, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, chunk)) for t in (log_keep, push))
    inner = linear_scan(log_keep.exp(), push, dim=2, form="recurrent")
    reach = log_keep.cumsum(2).exp()
    ends = linear_scan(reach[:, :, -1], inner[:, :, -1], start, form="recurrent")
    first = torch.zeros_like(ends[:, :1]) if start is None else start[:, None]
    before = torch.cat((first, ends[:, :-1]), dim=1)
    return (inner + reach * before[:, :, None]).flatten(1, 2)[:, :length]
