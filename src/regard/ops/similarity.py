"""Attention with another similarity than exp and another normaliser than the sum: the operations of the attention-sink study.

When Attention Sink Emerges in Language Models: An Empirical View (Gu et al. 2024, ICLR 2025, arXiv 2410.10781); code read for numbers:
sail-sg/Attention-Sink @ af49727 (MIT), `lit_gpt/inference/model_attn_{sim,kernel}_infer.py`, `model_kv_bias_infer.py`. What differs:
slots are attended to without a dummy query in front; any similarity takes them; "sum+1" is not in that code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_name, require_tensor
from .attention import attention, attention_request
from .reference import accumulation_dtype, merge_lse, weighted_values

__all__ = ["NORMALIZERS", "SIMILARITIES", "similarity_attention", "similarity_weights"]

SIMILARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "elu+1": lambda scores: torch.nn.functional.elu(scores) + 1.0,
    "linear": lambda scores: scores,
}
"""Score -> weight before the normaliser."""

NORMALIZERS = ("sum", "sum+1", "clamp", "none")
EPS = 1e-8


def similarity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    similarity: str = "exp",
    normalize: str = "sum",
    mask: Any = None,
    slots: tuple[Tensor, Tensor | None] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Weights `f(scale * q k^T)` over what the mask allows, divided by their normaliser, times the values.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). mask, scale, dropout: as of `regard.ops.attention`.
        similarity: f: "exp", "sigmoid", "elu+1" of the score, or "linear", the score itself (for queries and keys that a feature map
            has already been through; weights may be negative).
        normalize: what a row is divided by: "sum" of its weights (with exp: softmax), "sum+1" (with exp: the softmax that can attend to
            nothing), "clamp", the larger of 1 and |sum|, for weights of either sign, or "none". exp without a normaliser overflows for
            scores above 88 (float32).
        slots: keys that are always there, which no token stands for, as (scores, values): scores broadcastable to (B, H, N, S), already
            scaled; values (H or 1, S, Dv), None: zeros. They take part in the normaliser. Not dropped out.

    Returns:
        (B, H, N, Dv) in q's dtype. A row that may see nothing, and has no slot, gives zeros.

    Softmax runs on the fast backends of `regard.ops.attention`; the others make the matrix (B, H, N, M).

    Raises:
        ValueError, TypeError: as `regard.ops.attention`, and for names and slots that do not fit.
    """
    require_name("similarity", similarity, SIMILARITIES)
    require_name("normalize", normalize, NORMALIZERS)
    if similarity == "exp" and normalize in ("sum", "sum+1"):
        _check_slots(q, slots, v.shape[-1])
        if slots is None and normalize == "sum":
            return attention(q, k, v, mask=mask, scale=scale, dropout=dropout)
        out, lse = attention(q, k, v, mask=mask, scale=scale, dropout=dropout, return_lse=True)
        outs, lses = [out], [lse]
        if slots is not None:
            found, mass = _of_slots(slots, out)
            outs, lses = [*outs, found], [*lses, mass]
        if normalize == "sum+1":
            outs, lses = [*outs, torch.zeros_like(out)], [*lses, torch.zeros_like(lse)]
        return merge_lse(outs, lses)[0].to(q.dtype)
    weights = similarity_weights(
        q, k, similarity=similarity, normalize=normalize, mask=mask, slots=slots, scale=scale, keep_slots=True
    )
    count = weights.shape[-1] - k.shape[2]
    of_slots, weights = weights[..., :count], weights[..., count:]
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout)
    out = weighted_values(weights, v)
    if slots is not None and slots[1] is not None:
        out = out + of_slots @ slots[1].to(of_slots.dtype)
    return out.to(q.dtype)


def similarity_weights(
    q: Tensor,
    k: Tensor,
    *,
    similarity: str = "exp",
    normalize: str = "sum",
    mask: Any = None,
    slots: tuple[Tensor, Tensor | None] | None = None,
    scale: float | None = None,
    keep_slots: bool = False,
) -> Tensor:
    """The weights of `similarity_attention`, (B, H, N, M) in at least float32; with `keep_slots`, (B, H, N, S + M), the slots first."""
    require_name("similarity", similarity, SIMILARITIES)
    require_name("normalize", normalize, NORMALIZERS)
    request = attention_request(q, k, k, mask=mask, scale=scale)
    _check_slots(q, slots)
    wide = accumulation_dtype(q.dtype)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = request.scale * (q.to(wide) @ keys.mT)
    count = 0
    if slots is not None:
        extra = slots[0].to(wide).expand(*q.shape[:3], -1)
        count = extra.shape[-1]
        scores = torch.cat((extra, scores), -1)
    allowed = None
    if request.mask is not None:
        place: dict[str, Any] = {
            "batch": q.shape[0],
            "num_heads": q.shape[1],
            "q_offset": request.q_offset,
            "device": q.device,
        }
        seen = request.mask.materialize(q.shape[2], k.shape[2], **place)
        allowed = torch.cat((seen.new_ones(*seen.shape[:3], count), seen), -1)
    if similarity == "exp" and normalize in ("sum", "sum+1"):
        weights = _softmax(scores, allowed, normalize == "sum+1")
    else:
        # the score of a forbidden pair must not reach exp, whose infinity times zero would be no number
        scores = scores if allowed is None else scores.masked_fill(~allowed, 0.0)
        weights = SIMILARITIES[similarity](scores)
        weights = weights if allowed is None else weights.masked_fill(~allowed, 0.0)
        total = weights.sum(-1, keepdim=True)
        if normalize == "clamp":
            weights = weights / total.abs().clamp_min(1.0)
        elif normalize != "none":
            weights = weights / (total + (EPS if normalize == "sum" else 1.0))
    return weights if keep_slots else weights[..., count:]


def _softmax(scores: Tensor, allowed: Tensor | None, one_more: bool) -> Tensor:
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    if one_more:
        return torch.cat((scores, torch.zeros_like(scores[..., :1])), -1).softmax(-1)[..., :-1]
    if allowed is None:
        return scores.softmax(-1)
    empty = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _of_slots(slots: tuple[Tensor, Tensor | None], out: Tensor) -> tuple[Tensor, Tensor]:
    """What a query finds in the slots alone, like `out` (B, H, N, Dv), and the log of their mass, (B, H, N)."""
    wide = accumulation_dtype(out.dtype)
    scores = slots[0].to(wide).expand(*out.shape[:3], -1)
    if slots[1] is None:
        return torch.zeros_like(out), scores.logsumexp(-1)
    return (scores.softmax(-1) @ slots[1].to(wide)).to(out.dtype), scores.logsumexp(-1)


def _check_slots(q: Tensor, slots: Any, value_dim: int | None = None) -> None:
    if slots is None:
        return
    require(isinstance(slots, tuple) and len(slots) == 2, "slots", slots, "a pair (scores, values or None)")
    scores, values = slots
    require_tensor("slots[0]", scores, dims=4, floating=True)
    fits = scores.shape[-1] > 0 and all(own in (1, size) for own, size in zip(scores.shape, q.shape[:3]))
    need = f"shape broadcastable to ({q.shape[0]}, {q.shape[1]}, {q.shape[2]}, S), S >= 1"
    require(fits, "slots[0]", f"shape {tuple(scores.shape)}", need)
    if values is None:
        return
    require_tensor("slots[1]", values, dims=3, floating=True)
    fits = values.shape[0] in (1, q.shape[1]) and values.shape[1] == scores.shape[-1]
    fits = fits and value_dim in (None, values.shape[2])
    width = "Dv" if value_dim is None else value_dim
    need = f"(H or 1, S, Dv) = ({q.shape[1]} or 1, {scores.shape[-1]}, {width})"
    require(fits, "slots[1]", f"shape {tuple(values.shape)}", need)
