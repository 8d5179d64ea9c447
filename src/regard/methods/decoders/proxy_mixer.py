"""Proxy tuning: a large model's logits moved by what tuning changed in a small one. Liu et al. 2024 (COLM, arXiv 2401.08565).

Here because SCA (057, arXiv 2403.18976) teaches the use of pauses by its reverse, "reverse proxy tuning", of which no more than the name is
known to us: the mixture below is what a model would be tuned towards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require
from ..method import Method, UnsupportedModelError

__all__ = ["ProxyMixer"]


@dataclass
class ProxyMixer(Method):
    """Next-token logits + alpha * (logits of `tuned` - logits of `base`).

    Args:
        tuned, base: a small model after and before tuning, with the vocabulary of the model this is attached to; on its device.
        alpha: default 1. With tuned equal to base nothing changes.

    Both small models read the whole text at every step (no cache), so they should be small. Leading pad tokens of a row are masked.
    """

    tuned: nn.Module = field(repr=False)
    base: nn.Module = field(repr=False)
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tuned", "base"):
            if not isinstance(getattr(self, name), nn.Module):
                raise bad_type(name, getattr(self, name), "a language model")
        require(self.alpha == self.alpha, "alpha", self.alpha, "a number")

    def check(self, model: nn.Module) -> None:
        sizes = [_vocabulary(m) for m in (model, self.tuned, self.base)]
        if len(set(sizes)) > 1:
            raise UnsupportedModelError(
                f"tuned, base: got vocabularies of {sizes[1]} and {sizes[2]}, need {sizes[0]} as the model"
            )

    @torch.no_grad()
    def shift(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """alpha * (tuned - base) at the last place, (B, V)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        tuned, base = (
            m(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1].float()
            for m in (self.tuned, self.base)
        )
        return self.alpha * (tuned - base)

    def logits(self, model: nn.Module, session: Any) -> Any:
        pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)

        def mix(input_ids: Tensor, scores: Tensor) -> Tensor:
            mask = torch.ones_like(input_ids)
            if pad is not None:
                mask = ((input_ids != pad).cumsum(1) > 0).long()  # pads before the first word
            return scores + self.shift(input_ids, mask).to(scores.dtype)

        return mix


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
