"""The N x M matrix of an `AttentionCall`, made only where somebody looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import masks, reference

if TYPE_CHECKING:
    from .call import AttentionCall


def dense_weights(call: AttentionCall, row: Tensor) -> Tensor:
    """Softmax weights of all heads of `call` for the query rows `row` (int64): (B, H, len(row), M), float32 or float64."""
    mask, bias, score_mod = call.full_mask(), call.bias(), call.full_score_mod()
    if isinstance(mask, Tensor):
        mask = masks.dense(mask, q_offset=call.q_offset)
    if call.selection is not None:
        chosen = call.selection.to(call.q.device).materialize()
        if chosen.shape[1] not in (1, call.num_heads):
            chosen = chosen.repeat_interleave(call.num_heads // call.num_kv_heads, dim=1)
        looked_at = masks.dense(chosen, q_offset=call.q_offset)
        mask = looked_at if mask is None else mask & looked_at
    position = row + call.q_offset  # masks and score mods are asked about the rows of the whole call
    scores = reference.attention_scores(
        call.q[:, :, row],
        call.k,
        mask=None if mask is None else masks.from_function(lambda b, h, i, j: mask(b, h, position[i], j)),
        score_mod=None if score_mod is None else lambda s, b, h, i, j: score_mod(s, b, h, position[i], j),
        bias=bias[:, :, row] if bias is not None and bias.shape[2] > 1 else bias,
        q_offset=0,
        scale=call.q.shape[-1] ** -0.5 if call.scale is None else call.scale,
    )
    weights, lse = reference.softmax_with_lse(scores)
    return weights if call.sinks is None else weights * share_of_keys(lse, call.sinks)


def share_of_keys(lse: Tensor, sinks: Tensor) -> Tensor:
    """What is left to the keys when sink logits (H,) take part in the softmax: e^lse / (e^lse + e^sink), (B, H, N, 1)."""
    return torch.sigmoid(lse - sinks.to(lse.dtype).view(1, -1, 1))[..., None]


def narrowed(call: AttentionCall, heads: Sequence[int]) -> AttentionCall:
    """`call` for the query heads `heads` alone, each with keys and values of its own. Masks and score mods still hear the old numbers."""
    head = torch.tensor(heads, dtype=torch.long, device=call.q.device)
    kv_head = head // (call.num_heads // call.num_kv_heads)
    extra, mod, selection = call.extra_mask, call.score_mod, call.selection
    if selection is not None:
        indices = selection.to(call.q.device).for_heads(call.num_heads, call.num_kv_heads)
        selection = selection.to(call.q.device)
        selection.indices = indices[:, head] if indices.shape[1] > 1 else indices
    return replace(
        call,
        q=call.q[:, head],
        k=call.k[:, kv_head],
        v=call.v[:, kv_head],
        mask=call.mask[:, head] if call.mask is not None and call.mask.shape[1] > 1 else call.mask,
        sinks=None if call.sinks is None else call.sinks[head],
        biases=[bias[:, head] if bias.shape[1] > 1 else bias for bias in call.biases],
        extra_mask=None if extra is None else masks.from_function(lambda b, h, i, j: extra(b, head[h], i, j)),
        score_mod=None if mod is None else lambda s, b, h, i, j: mod(s, b, head[h], i, j),
        selection=selection,
        weight_edits=[],
        output_edits=[],
    )
