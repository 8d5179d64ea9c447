"""Attention with FlashAttention's conventions: its layout, windows, padding, packed sequences and options, on any backend.

FlashAttention (Dao et al., 2022, arXiv 2205.14135; its library Dao-AILab/flash-attention at 0251105, BSD-3, read for numbers:
`flash_attn/flash_attn_interface.py`, `utils/testing.py:attention_ref`). Code written for its functions runs on these without CUDA.
The tiled algorithm itself is `flash_tiles.py`.

What differs: a query without keys gives zeros and a log-sum-exp of -inf in every case (some of their kernels say +inf, `attention_ref`
NaN where no window or causality is asked for).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from . import backends, masks
from .attention import attention
from .flash_tiles import tiled_attention
from .masks import Mask
from .scores import ScoreMod, from_function, soft_cap

__all__ = ["attention_varlen", "flash_attention"]

TILES = "tiles"


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    attention_chunk: int = 0,
    sink_token_length: int = 0,
    learnable_sink: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention with the options of the flash-attn library, heads last.

    Query i stands at position i + Sk - Sq (the lengths are the numbers of real tokens where padding masks are given), key j at j.

    Args:
        q: (B, Sq, H, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv). Query head h reads kv head h // (H // Hkv).
        causal: keys up to the query's position. window_size: (left, right), keys from position - left to position + right; -1 or None:
            no limit. `causal` makes right 0.
        softcap: c * tanh(score / c) on scaled scores; 0: none. alibi_slopes: (H,) or (B, H), -slope * |query position - key position|.
        attn_bias: broadcastable to (B, H, Sq, Sk), added after softcap.
        query_padding_mask (B, Sq), key_padding_mask (B, Sk): bool, True = real. Outputs of padded queries are zeros. With windows,
            causality or ALiBi, positions count the real tokens and padding is taken to be on the right.
        key_leftpad: (B,), keys before it are padding; positions then count from it (only with windows, causality or chunks).
        attention_chunk: keys of the query's own chunk of this many positions only; 0: off. sink_token_length: first keys that a window's
            left end does not hide.
        learnable_sink: (H,), a logit in every softmax that takes weight and gives no value.
        qv: (B, Sq, H, Dv), a second query for the values: scores gain qv v^T and the default scale is (D + Dv) ** -0.5.
        q_descale, k_descale, v_descale: (B, Hkv), factors on the tensors of each kv head (FP8 inputs).
        dropout_p: probability of dropping a weight. dropout_mask: bool (B, H, Sq, Sk), True = kept, instead of drawing one.
        softmax_scale: default D ** -0.5. return_lse: also the log-sum-exp, (B, H, Sq), natural log (with `learnable_sink`: included).
        backend: "auto", one of `regard.ops.BACKENDS`, or "tiles" (`tiled_attention`, slow and readable).

    Returns: (B, Sq, H, Dv) in q's dtype.
    """
    require_name("backend", backend, ["auto", TILES, *backends.BACKENDS])
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=4, floating=True)
    batch, q_len, num_heads = q.shape[:3]
    kv_len, kv_heads = k.shape[1:3]
    left, right = _window(causal, window_size)
    require_int("attention_chunk", attention_chunk, 0)
    require_int("sink_token_length", sink_token_length, 0)
    dtype = q.dtype
    if qv is not None:
        require_tensor("qv", qv, dims=4, floating=True)
        need = (batch, q_len, num_heads, v.shape[3])
        require(tuple(qv.shape) == need, "qv", f"shape {tuple(qv.shape)}", f"(B, Sq, H, Dv) = {need}")
    q, qv = (_descaled("q_descale", x, q_descale, kv_heads) for x in (q, qv))
    k, v = _descaled("k_descale", k, k_descale, kv_heads), _descaled("v_descale", v, v_descale, kv_heads)
    if qv is not None:
        q, k = torch.cat([q, qv], dim=-1), torch.cat([k, v], dim=-1)
    query_real = _padding("query_padding_mask", query_padding_mask, (batch, q_len))
    key_real = _padding("key_padding_mask", key_padding_mask, (batch, kv_len))
    padded = query_real is not None or key_real is not None
    leftpad = None
    if key_leftpad is not None:
        leftpad = require_tensor("key_leftpad", key_leftpad, dims=1)
        require(leftpad.shape[0] == batch, "key_leftpad", f"shape {tuple(leftpad.shape)}", f"(B,) = ({batch},)")
    lengths = _lengths(query_real, key_real, q_len, kv_len, q.device)
    local = left is not None or right is not None or attention_chunk > 0
    if not padded and leftpad is None and sink_token_length == 0 and attention_chunk == 0:
        # nothing depends on the batch row: masks that backends know
        mask = None if not local else masks.causal if (left, right) == (None, 0) else masks.window(left, right)
        offset = kv_len - q_len
    else:
        mask, offset = None, 0
        if local and q_len > 0:
            mask = _interval_mask(lengths, leftpad, q_len, kv_len, left, right, attention_chunk, sink_token_length)
        for real, view in ((key_real, (batch, 1, 1, kv_len)), (query_real, (batch, 1, q_len, 1))):
            if real is not None:
                padding = masks.dense(real.reshape(view).expand(batch, 1, q_len, kv_len), q_offset=0)
                mask = padding if mask is None else mask & padding
    score_mod: ScoreMod | None = None if softcap == 0 else soft_cap(softcap)
    if alibi_slopes is not None:
        bend = _alibi(alibi_slopes, lengths, leftpad, offset, batch, num_heads)
        score_mod = bend if score_mod is None else score_mod >> bend
    options: dict[str, Any] = {
        "mask": mask,
        "score_mod": score_mod,
        "bias": attn_bias,
        "q_offset": offset,
        "scale": softmax_scale,
        "dropout": dropout_p,
    }
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _run(q, k, v, learnable_sink, dropout_mask, return_lse, backend, options)
    out = out.transpose(1, 2).to(dtype)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attention_chunk: int = 0,
    learnable_sink: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of sequences packed one after the other, none of which sees another.

    Args:
        q: (tokens, H, D). k: (key tokens, Hkv, D). v: (key tokens, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) integers from 0 to the number of tokens, ascending: sequence s is tokens
            cu[s] .. cu[s + 1] - 1. Without `cu_seqlens_k` the keys are packed like the queries. Lengths may be 0.
        alibi_slopes: (H,) or (sequences, H). The other options: see `flash_attention`, within each sequence.

    Returns: (tokens, H, Dv); with `return_lse` also (H, tokens). Queries of a sequence without keys give zeros and -inf.
    """
    require_name("backend", backend, ["auto", TILES, *backends.BACKENDS])
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=3, floating=True)
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k
    starts_k = _starts("cu_seqlens_k", starts_k, k.shape[0])
    count = starts_q.shape[0] - 1
    require(
        starts_k.shape[0] == count + 1,
        "cu_seqlens_k",
        f"{starts_k.shape[0] - 1} sequences",
        f"{count}, as in cu_seqlens_q",
    )
    left, right = _window(causal, window_size)
    require_int("attention_chunk", attention_chunk, 0)
    if q.shape[0] == 0 or k.shape[0] == 0:
        mask, score_mod = None, None
    else:
        sequence = torch.repeat_interleave(torch.arange(count, device=q.device), starts_q.diff())
        length_k = starts_k.diff()
        place = torch.arange(q.shape[0], device=q.device) - starts_q[sequence]
        place = place + (length_k - starts_q.diff())[sequence]
        first, last = _reach(place, length_k[sequence] - 1, left, right, attention_chunk)
        mask = masks.intervals(starts_k[sequence] + first, starts_k[sequence] + last)
        score_mod = None if softcap == 0 else soft_cap(softcap)
        if alibi_slopes is not None:
            slopes = _slopes(alibi_slopes, count, q.shape[1])[sequence] if alibi_slopes.dim() == 2 else alibi_slopes
            bend = _packed_alibi(slopes, place + starts_k[sequence])
            score_mod = bend if score_mod is None else score_mod >> bend
    options = {"mask": mask, "score_mod": score_mod, "q_offset": 0, "scale": softmax_scale, "dropout": dropout_p}
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = _run(q, k, v, learnable_sink, None, return_lse, backend, options)
    return (out[0].transpose(0, 1), lse[0]) if return_lse else out[0].transpose(0, 1)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    dropout_mask: Tensor | None,
    return_lse: bool,
    backend: str,
    options: dict[str, Any],
) -> tuple[Tensor, Any]:
    want_lse = return_lse or sink is not None
    if dropout_mask is not None and backend not in ("auto", TILES):
        raise bad_value("backend", backend, f"'auto' or {TILES!r}: backends draw their own dropout masks")
    if dropout_mask is not None or backend == TILES:
        out, lse = tiled_attention(q, k, v, dropout_mask=dropout_mask, return_lse=True, **options)
    elif want_lse:
        out, lse = attention(q, k, v, return_lse=True, backend=backend, **options)
    else:
        out, lse = attention(q, k, v, backend=backend, **options), None
    if sink is not None and lse is not None:
        require_tensor("learnable_sink", sink, dims=1, floating=True)
        require(sink.shape[0] == q.shape[1], "learnable_sink", f"{sink.shape[0]} logits", f"{q.shape[1]}, one a head")
        logit = sink.to(lse.dtype).view(1, -1, 1)
        # a query without keys sees the sink alone: its part of the keys is 0, and so is its gradient
        empty = lse == -torch.inf
        share = torch.sigmoid(lse.masked_fill(empty, 0.0) - logit).masked_fill(empty, 0.0)
        out = (out.to(lse.dtype) * share[..., None]).to(out.dtype)
        lse = torch.logaddexp(lse, logit)
    return out, lse


def _window(causal: bool, window_size: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """(left, right) with None where there is no limit."""
    fits = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    require(fits, "window_size", window_size, "a pair (left, right)")
    sides = []
    for side in window_size:
        require(side is None or require_int("window_size", side, -1) >= -1, "window_size", side, "ints >= -1, or None")
        sides.append(None if side is None or side == -1 else side)
    return sides[0], 0 if causal else sides[1]


def _descaled(name: str, x: Tensor | None, factor: Tensor | None, kv_heads: int) -> Any:
    if x is None or factor is None:
        return x
    require_tensor(name, factor, dims=2, floating=True)
    need = (x.shape[0], kv_heads)
    require(tuple(factor.shape) == need, name, f"shape {tuple(factor.shape)}", f"(B, Hkv) = {need}")
    heads = factor.repeat_interleave(x.shape[2] // kv_heads, dim=1)
    return (x.float() * heads[:, None, :, None]).to(x.dtype)


def _padding(name: str, real: Tensor | None, need: tuple[int, int]) -> Tensor | None:
    if real is None:
        return None
    require_tensor(name, real, dims=2)
    require(real.dtype == torch.bool, name, real.dtype, "bool, True = real")
    require(tuple(real.shape) == need, name, f"shape {tuple(real.shape)}", f"{need}")
    return real


def _lengths(
    query_real: Tensor | None, key_real: Tensor | None, q_len: int, kv_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Real queries and keys of each batch row, (B | 1,)."""
    queries = torch.tensor([q_len], device=device) if query_real is None else query_real.sum(-1)
    keys = torch.tensor([kv_len], device=device) if key_real is None else key_real.sum(-1)
    return queries, keys


def _reach(place: Tensor, most: Tensor, left: int | None, right: int | None, chunk: int) -> tuple[Tensor, Tensor]:
    """First and last key position that a query at `place` sees; keys end at `most`."""
    first = torch.zeros_like(place) if left is None else (place - left).clamp(min=0)
    last = most.expand(place.shape) if right is None else torch.minimum(place + right, most)
    if chunk > 0:
        start = place.div(chunk, rounding_mode="floor") * chunk
        first, last = torch.maximum(first, start), torch.minimum(last, start + chunk - 1)
    return first, last


def _interval_mask(
    lengths: tuple[Tensor, Tensor],
    leftpad: Tensor | None,
    q_len: int,
    kv_len: int,
    left: int | None,
    right: int | None,
    chunk: int,
    sink: int,
) -> Mask:
    """Window and chunk by the positions of real tokens, (B | 1) intervals; keys before `leftpad` have no position."""
    queries, keys = lengths
    place = torch.arange(q_len, device=queries.device) + (keys - queries)[:, None]
    pad = torch.zeros_like(keys) if leftpad is None else leftpad.to(keys.device)
    place, pad = torch.broadcast_tensors(place, pad[:, None])
    # as released: a window that has a left end also ends with the real keys
    most = torch.full_like(place, kv_len) if left is None else keys[:, None].expand(place.shape)
    first, last = _reach(place, most, left, right, chunk)
    window = masks.intervals(first + pad, last + pad)
    if sink == 0 or left is None:
        return window
    begin = torch.zeros_like(place)
    if chunk > 0:  # a chunk hides the sinks of earlier ones
        begin = torch.maximum(begin, place.div(chunk, rounding_mode="floor") * chunk)
    return window | masks.intervals(begin + pad, last.clamp(max=sink - 1) + pad)


def _slopes(slopes: Tensor, rows: int, num_heads: int) -> Tensor:
    """(rows | 1, H)."""
    require_tensor("alibi_slopes", slopes, floating=True)
    fits = tuple(slopes.shape) in ((num_heads,), (rows, num_heads))
    require(fits, "alibi_slopes", f"shape {tuple(slopes.shape)}", f"(H,) = ({num_heads},) or ({rows}, {num_heads})")
    return slopes if slopes.dim() == 2 else slopes[None]


def _alibi(
    slopes: Tensor, lengths: tuple[Tensor, Tensor], leftpad: Tensor | None, offset: int, batch: int, num_heads: int
) -> ScoreMod:
    table = _slopes(slopes, batch, num_heads)
    queries, keys = lengths
    # from the positions that a score mod is given to those of the tokens
    shift = keys - queries - offset + (0 if leftpad is None else leftpad.to(keys.device))

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        moved = shift.to(score.device)[b if shift.shape[0] > 1 else torch.zeros_like(b)]
        slope = table.to(device=score.device, dtype=score.dtype)[b if table.shape[0] > 1 else torch.zeros_like(b), h]
        return score - slope * (q_idx + moved - kv_idx).abs()

    return from_function(mod, slopes)


def _packed_alibi(slopes: Tensor, place: Tensor) -> ScoreMod:
    """`slopes` (H,) or (tokens, H); `place` (tokens,): each query's position as the keys are numbered."""

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        table = slopes.to(device=score.device, dtype=score.dtype)
        slope = table[h] if table.dim() == 1 else table[q_idx, h]
        return score - slope * (place.to(score.device)[q_idx] - kv_idx).abs()

    return from_function(mod, slopes)


def _starts(name: str, starts: Tensor, tokens: int) -> Tensor:
    require_tensor(name, starts, dims=1)
    require(not starts.is_floating_point() and starts.dtype != torch.bool, name, starts.dtype, "integers")
    require(starts.shape[0] >= 1, name, f"shape {tuple(starts.shape)}", "(sequences + 1,)")
    listed = starts.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(listed))
    require(rising and listed[0] == 0 and listed[-1] == tokens, name, listed, f"rising from 0 to {tokens}, the tokens")
    return starts.long()
