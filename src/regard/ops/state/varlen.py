"""Packed sequences of different lengths in one row, for the state ops: each starts from its own state and leaves its own.

The layout of flash-linear-attention and of FlashAttention's varlen calls: batch 1, tokens of all sequences one after the other,
`cu_seqlens` their bounds. Sequences of like length (within a factor of 2) are run together, so that at most half of the work is padding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._checks import bad_type, require, require_tensor

if TYPE_CHECKING:
    from .linear_state import LinearState

__all__ = ["check_cu_seqlens", "packed_linear_attention"]


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The bounds (S + 1,) of S packed sequences as numbers: from 0, never falling, to `tokens`. (Looks at them, wherever they lie.)"""
    require_tensor("cu_seqlens", cu_seqlens, dims=1)
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise bad_type("cu_seqlens", cu_seqlens.dtype, f"an integer tensor (dtype is {cu_seqlens.dtype})")
    bounds: list[int] = cu_seqlens.tolist()
    rising = all(first <= second for first, second in pairwise(bounds))
    fits = len(bounds) >= 1 and bounds[0] == 0 and bounds[-1] == tokens and rising
    require(fits, "cu_seqlens", bounds, f"bounds that start at 0, never fall and end at {tokens}, the tokens of q")
    return bounds


def packed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    log_decay: Tensor | None,
    state: LinearState | None,
    **options: Any,
) -> tuple[Tensor, LinearState]:
    """`linear_attention` on packed sequences: (1, H, T, Dv), and one state a sequence, (S, H, D, Dv). Arguments as there."""
    from .linear import linear_attention
    from .linear_state import LinearState

    require(q.shape[0] == 1, "q", f"batch {q.shape[0]} with cu_seqlens", "batch 1: packed sequences lie in one row")
    require(k.shape[2] == q.shape[2], "k", f"{k.shape[2]} tokens", f"as many as q ({q.shape[2]}) with cu_seqlens")
    bounds = check_cu_seqlens(cu_seqlens, q.shape[2])
    lengths = [end - start for start, end in pairwise(bounds)]
    if state is not None:
        if not isinstance(state, LinearState):
            raise bad_type("state", state, "a LinearState")
        need = f"one state a sequence, ({len(lengths)}, H, D, Dv)"
        require(state.kv.shape[0] == len(lengths), "state.kv", f"shape {tuple(state.kv.shape)}", need)
    alike: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        alike.setdefault(length.bit_length() if length > 1 else length, []).append(number)
    if not alike:  # no sequence at all: the call of no token says what is wrong with the other arguments
        alike = {0: []}
    outs, places, ends = [], [], []
    for numbers in alike.values():
        longest = max((lengths[number] for number in numbers), default=0)
        index = torch.tensor([[bounds[n] + min(i, max(0, lengths[n] - 1)) for i in range(longest)] for n in numbers])
        index = index.reshape(len(numbers), longest).long().to(q.device)
        own = torch.tensor([lengths[n] for n in numbers], dtype=torch.long)
        row_q, row_k, row_v = (_rows(x, index) for x in (q, k, v))
        decay = log_decay if log_decay is None or log_decay.dim() == 1 else _rows(log_decay, index)
        chosen = torch.tensor(numbers, dtype=torch.long, device=q.device)
        before = None if state is None else state.select(chosen)
        padded = any(lengths[n] != longest for n in numbers)
        out, end = linear_attention(
            row_q, row_k, row_v, log_decay=decay, state=before, return_state=True, lengths=own.to(q.device) if padded else None,
            **options,
        )  # fmt: skip
        real = torch.arange(longest, device=q.device) < own.to(q.device)[:, None]
        outs.append(out.transpose(1, 2)[real])
        places.append(index[real])
        ends.append((chosen, end))
    place = torch.cat(places).argsort()
    order = torch.cat([chosen for chosen, _ in ends]).argsort()
    sums = [end.normaliser for _, end in ends if end.normaliser is not None]
    after = LinearState(torch.cat([end.kv for _, end in ends])[order], torch.cat(sums)[order] if sums else None)
    return torch.cat(outs)[place].transpose(0, 1)[None], after


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (1, H, T, ...) at index (n, length) -> (n, H, length, ...)."""
    return x[0].transpose(0, 1)[index].transpose(1, 2)
