"""The first-order linear recurrence h_t = a_t h_(t-1) + b_t, all steps at once in log2(N) rounds, or one by one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..._checks import require, require_int, require_name, require_tensor
from ..._shapes import broadcast_shape
from .varlen import check_cu_seqlens

__all__ = ["linear_scan"]

FORMS = ("auto", "parallel", "recurrent")


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    *,
    dim: int = 1,
    form: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """h_t = a_t * h_(t-1) + b_t, entry by entry: every h_t, of the shape that a and b broadcast to.

    Args:
        a, b: real or complex, time along `dim` (not negative). a may have any sign and size, zeros included.
        initial: h before the first step, without the time axis; None: zeros.
        form: "parallel": log2(N) rounds of whole-tensor arithmetic (pairs of neighbouring steps are themselves such steps);
            "recurrent": N steps, the definition; "auto": recurrent for one step, else parallel. Equal up to rounding, differentiable.
        cu_seqlens: (S + 1,) bounds of S sequences packed along `dim`, each a recurrence of its own; `initial` then has one entry for each,
            (S, ...). The last h of sequence s is the one at cu_seqlens[s + 1] - 1.

    Half types are computed in float32 and given back as they were.
    """
    for name, tensor in (("a", a), ("b", b)):
        require_tensor(name, tensor)
        kind = tensor.is_floating_point() or tensor.is_complex()
        require(kind, name, tensor.dtype, "floating point or complex numbers")
    require_name("form", form, FORMS)
    shape = broadcast_shape(a.shape, b.shape)
    require(require_int("dim", dim, 0) < len(shape), "dim", dim, f"an axis of {tuple(shape)}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = a.expand(shape).movedim(dim, 0).to(wide), b.expand(shape).movedim(dim, 0).to(wide)
    length = shape[dim]
    if cu_seqlens is not None:
        a, b = _apart(a, b, check_cu_seqlens(cu_seqlens, length), initial)
    elif initial is not None:
        need = tuple(b.shape[1:])
        require(tuple(initial.shape) == need, "initial", f"shape {tuple(initial.shape)}", f"shape {need}")
        if length:
            b = torch.cat(((b[0] + a[0] * initial.to(wide))[None], b[1:]))
    if form == "recurrent" or length < 2:
        held, made = None, []
        for step in range(length):
            held = b[step] if held is None else a[step] * held + b[step]
            made.append(held)
        h = torch.stack(made) if made else b
    else:
        h, kept, reach = b, a, 1
        while reach < length:
            h = torch.cat((h[:reach], h[reach:] + kept[reach:] * h[:-reach]))
            kept = torch.cat((kept[:reach], kept[reach:] * kept[:-reach]))
            reach *= 2
    return h.movedim(0, dim).to(dtype)


def _apart(a: Tensor, b: Tensor, bounds: list[int], initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and b (time first) with nothing carried over a bound: there a is 0, and b has what comes of the own initial h."""
    numbers = [s for s, (start, end) in enumerate(pairwise(bounds)) if end > start]
    starts = torch.tensor([bounds[s] for s in numbers], dtype=torch.long, device=b.device)
    if initial is not None:
        need = (len(bounds) - 1, *b.shape[1:])
        require(
            tuple(initial.shape) == need, "initial", f"shape {tuple(initial.shape)}", f"shape {need}, one a sequence"
        )
        carried = a[starts] * initial[torch.tensor(numbers, dtype=torch.long, device=initial.device)].to(b.dtype)
        b = b.index_add(0, starts, carried)
    return a.index_fill(0, starts, 0), b
