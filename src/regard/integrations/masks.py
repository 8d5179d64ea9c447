"""The mask function that stands beside regard's attention function in transformers' `AttentionMaskInterface`.

A model builds its masks with the function registered under the name of its attention implementation. Without one the mask
arrives as None and attention silently stops being causal, or sees padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The bool mask (B, 1, N, M) that the model asks for, True = may attend, or None where "causal" or "everything" says it all.

    Same arguments as transformers' `sdpa_mask`, whose rules for leaving the N x M matrix out are followed exactly: None for a
    causal layer means bottom-right causal with no padding in sight. The padding (B, tokens) that went into a mask stays known
    as its attribute `padding`: a sliding window of keys no longer shows it.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    if mask is not None and attention_mask is not None:
        mask.padding = attention_mask  # type: ignore[attr-defined]
    elif mask is not None:  # no padding at all, which the mask of a sliding window alone could not tell
        mask.start = torch.zeros(1, dtype=torch.long, device=mask.device)  # type: ignore[attr-defined]
    return mask


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
