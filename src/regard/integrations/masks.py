"""The mask function that stands beside regard's attention function in transformers' `AttentionMaskInterface`.

A model builds its masks with the function registered under the name of its attention implementation. Without one the mask
arrives as None and attention silently stops being causal, or sees padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import masks


def attention_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The bool mask (B, 1, N, M) that the model asks for, True = may attend, or None where "causal" or "everything" says it all.

    Same arguments as transformers' `sdpa_mask`, whose rules for leaving the N x M matrix out are followed exactly: None for a
    causal layer means bottom-right causal with no padding in sight. What a bool matrix no longer tells stays known in attributes
    of the tensor: `padding` (B, tokens), which a sliding window of keys cuts off, and `structure`, a `regard.masks.Mask` that is
    equal to the matrix and lets the kernels skip blocks without reading it.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    if mask is not None:
        mask.padding = attention_mask  # type: ignore[attr-defined]
        if attention_mask is None:  # no padding at all, which a sliding window of keys alone could not tell
            mask.start = torch.zeros(1, dtype=torch.long, device=mask.device)  # type: ignore[attr-defined]
        if mask.shape[2] > 1 and not torch.compiler.is_compiling():
            q_offset, kv_offset = int(kwargs.get("q_offset", 0)), int(kwargs.get("kv_offset", 0))
            mask.structure = find_structure(mask, attention_mask, q_offset, kv_offset, kwargs.get("local_size"))  # type: ignore[attr-defined]
    return mask


def find_structure(
    mask: Tensor, padding: Tensor | None, q_offset: int, kv_offset: int, window: int | None
) -> masks.Mask | None:
    """The composition of causality, sliding window and padding that equals `mask`, in columns of `mask`; None if there is none.

    Made from what the model says and then compared entry by entry, once a forward, so it can never be something else.
    """
    batch, _, q_len, kv_len = mask.shape
    real: masks.Mask | None = None
    if padding is not None and not bool(padding.all()):
        first, count = padding.to(torch.uint8).argmax(-1), padding.sum(-1)
        real = masks.padding((first + count - kv_offset).clamp(min=0), start=(first - kv_offset).clamp(min=0))
    shapes = [masks.causal, masks.everything] if window is None else [masks.causal & masks.sliding_window(window)]
    for shape in shapes:
        candidate = shape if real is None else shape & real
        found = candidate.materialize(q_len, kv_len, batch=batch, q_offset=q_offset - kv_offset, device=mask.device)
        if bool((found == mask).all()):
            return candidate
    return None


def split_mask(mask: Any) -> tuple[Tensor | None, Tensor | None]:
    """A mask as a model hands it over, as (bool mask, additive bias): 4-d, at most one of them given."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask: the model gives its attention a {type(mask).__name__}, need a bool or float tensor"
        )
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask.is_floating_point():
        return None, mask
    return mask if mask.dtype == torch.bool else mask != 0, None
