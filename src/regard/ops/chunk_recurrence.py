"""A gated recurrence within chunks, softmax attention across them: RAT's op, all tokens at once or a few after a state.

RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (Wei et al. 2025, arXiv 2507.04416); code read for numbers:
CLAIRE-Labo/RAT @ d4a8f54 (MIT), `src/model/backbone/rat/rat.py`. What differs: any length (theirs: whole chunks), a state may be continued
anywhere by any number of tokens, and the queries of a chunk are folded into heads, so that the mask across chunks is a plain causal one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .._checks import bad_type, require, require_int, require_tensor
from . import masks
from .attention import attention
from .reference import accumulation_dtype, merge_lse
from .state.linear_scan import linear_scan

__all__ = ["ChunkRecurrentState", "chunk_recurrent_attention"]

_LOOP = 64  # chunks up to here are scanned step by step: all chunks advance together, at the least memory traffic


@dataclass
class ChunkRecurrentState:
    """What is carried from call to call.

    k, v (B, H, C, D): the last states of the C whole chunks so far, keys turned to their chunk's position. last_k, last_v (B, H, D): the
    running states behind the last token, not turned. position: tokens seen, C * chunk_size and those of the open chunk.
    """

    k: Tensor
    v: Tensor
    last_k: Tensor
    last_v: Tensor
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes held: 1 / chunk_size of a key-value cache, and one token more."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.last_k, self.last_v))

    def select(self, rows: Tensor) -> ChunkRecurrentState:
        """Batch row i becomes what row `rows[i]` was."""
        return ChunkRecurrentState(self.k[rows], self.v[rows], self.last_k[rows], self.last_v[rows], self.position)


def chunk_recurrent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_size: int,
    *,
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None,
    scale: float | None = None,
    state: ChunkRecurrentState | None = None,
    return_state: bool = False,
) -> Any:
    """Causal attention to one running state for each chunk of tokens.

    In each chunk, from zeros: k~_t = g_t k~_(t-1) + (1 - g_t) k_t, and v~ alike. Token t attends to the last k~ of every earlier chunk and
    to its own k~_t, values v~: n / chunk_size + 1 items in place of n. chunk_size >= n is a gated linear recurrence, chunk_size 1 is
    attention to (1 - g) k and (1 - g) v.

    Args:
        q, k, v, gate: (B, H, N, D), all of one shape; gate in [0, 1], what the state keeps; it may be wider (float32) than the others.
        chunk_size: tokens of a chunk, counted from the first token of the sequence. N need not be a multiple.
        rotate: (x (..., D), int64 numbers that broadcast to its other axes) -> x turned by them, for rotary positions: the position
            of queries and of states is the number of their chunk.
        scale: of the scores, default D ** -0.5.
        state: what an earlier call returned: these tokens come after it. return_state: also give the next one, as a pair.

    Returns:
        (B, H, N, D) in q's dtype. Recurrences of half types run in float32.
    """
    _check(q, k, v, gate, state, require_int("chunk_size", chunk_size, 1))
    batch, heads, length, dim = q.shape
    if state is None:
        none, zero = k.new_zeros(batch, heads, 0, dim), k.new_zeros(batch, heads, dim)
        state = ChunkRecurrentState(none, none, zero, zero, 0)
    if not length:
        return (q, state) if return_state else q
    scale = dim**-0.5 if scale is None else float(scale)
    begun = state.position % chunk_size  # tokens that the open chunk already has
    whole, chunks = (begun + length) // chunk_size, -(-(begun + length) // chunk_size)
    before, after = begun, chunks * chunk_size - begun - length
    if chunks == 1:  # all in the open chunk: decoding
        before = after = 0
    width = (length + before + after) // chunks

    def fold(x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, C, T, D), `fill` where there is no token: before the first one and behind the last."""
        if before or after:
            x = torch.nn.functional.pad(x, (0, 0, before, after), value=fill)
        return x.unflatten(2, (chunks, width))

    keep, enter = fold(gate, 1.0), fold(1 - gate)  # a place without a token keeps the state as it is

    def scan(x: Tensor, last: Tensor) -> Tensor:
        start = torch.zeros(batch, heads, chunks, dim, dtype=last.dtype, device=last.device)
        if begun:
            start = torch.cat((last[:, :, None], start[:, :, 1:]), dim=2)
        made = linear_scan(keep, enter * fold(x), start, dim=3, form="recurrent" if width <= _LOOP else "parallel")
        return made.to(x.dtype)

    inner_k, inner_v = scan(k, state.last_k), scan(v, state.last_v)
    queries, first = fold(q), state.position // chunk_size
    own = (queries.to(accumulation_dtype(q.dtype)) * inner_k).sum(
        -1
    ) * scale  # both of one chunk: turning changes nothing
    ends_k, ends_v = inner_k[:, :, :whole, -1], inner_v[:, :, :whole, -1]
    if rotate is not None:
        number = torch.arange(first, first + chunks, device=q.device)
        ends_k, queries = rotate(ends_k, number[:whole]), rotate(queries, number[:, None])
    held_k, held_v = state.k, state.v
    if whole:
        held_k, held_v = torch.cat((held_k, ends_k), dim=2), torch.cat((held_v, ends_v), dim=2)

    out = inner_v
    if first + chunks > 1:
        rows = rearrange(queries, "b h c t d -> b (h t) c d")  # tokens of a chunk see the same: they share a key head
        seen = min(first + chunks - 1, held_k.shape[2])  # nobody here sees the last chunk's end
        mask = masks.causal if chunks > 1 else None
        far, lse = attention(
            rows, held_k[:, :, :seen], held_v[:, :, :seen], mask=mask, q_offset=first - 1, scale=scale, return_lse=True
        )
        far, lse = (rearrange(t, "b (h t) c ... -> b h c t ...", t=width) for t in (far, lse))
        out = merge_lse([far, inner_v], [lse, own])[0]
    out = out.flatten(2, 3)[:, :, before : before + length].to(q.dtype)
    if not return_state:
        return out
    last_k, last_v = (t.flatten(2, 3)[:, :, before + length - 1] for t in (inner_k, inner_v))
    return out, ChunkRecurrentState(held_k, held_v, last_k, last_v, state.position + length)


def _check(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Any, chunk_size: int) -> None:
    require_tensor("q", q, dims=4, floating=True)
    for name, tensor in (("k", k), ("v", v), ("gate", gate)):
        require_tensor(name, tensor, dims=4, floating=True)
        require(tensor.shape == q.shape, name, f"shape {tuple(tensor.shape)}", f"q's shape {tuple(q.shape)}")
    if state is None:
        return
    if not isinstance(state, ChunkRecurrentState):
        raise bad_type("state", state, "a ChunkRecurrentState")
    need = (q.shape[0], q.shape[1], state.position // chunk_size, q.shape[3])
    found = tuple(state.k.shape)
    require(
        found == need, "state", f"k of shape {found}", f"{need} at position {state.position}, chunks of {chunk_size}"
    )
