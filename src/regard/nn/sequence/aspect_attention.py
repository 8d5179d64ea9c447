"""Attention of a text to an aspect of it: pool the aspect's tokens to a query, and the rest of the text by that query.

The head of BERT(+AS) in PSSAttention (166), Su et al. 2021, "Enhanced Aspect-Based Sentiment Analysis Models with Progressive
Self-supervised Attention Learning" (Artificial Intelligence 296, arXiv 2103.03446). Code read for numbers: DeepLearnXMU/PSSAttention @
7e23d8d (no licence), `Bert(+AS)/bert_model.py:MyBert.top_model`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from .additive_attention import Pooled, ScaledDotPooling

__all__ = ["AspectAttention"]


class AspectAttention(nn.Module):
    """states (B, T, dim), context (B, T), aspect (B, T) -> `Pooled`; its context is the attended text plus the aspect's query.

    q = softmax over the aspect's tokens of a linear score, times their states; weights = softmax(states . q / sqrt(dim)) over the
    context's tokens that are no aspect's. A text without an aspect has a query of zeros and uniform attention.

    Args:
        dim: of states. `logits_delta` (B, T) of the call is added before the softmax, as in `AttentionPooling`.

    Loads `affine.*` of the authors' MyBert.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.aspect_proj = nn.Linear(dim, 1)
        self.pooling = ScaledDotPooling(dim, query=True)

    def forward(self, states: Tensor, context: Tensor, aspect: Tensor, logits_delta: Tensor | None = None) -> Pooled:
        require_tensor("states", states, dims=3, floating=True)
        for name, mask in (("context", context), ("aspect", aspect)):
            require(mask.shape == states.shape[:2], name, f"shape {tuple(mask.shape)}", f"{tuple(states.shape[:2])}")
        aspect = aspect.bool()
        scores = self.aspect_proj(states)[..., 0].masked_fill(~aspect, -torch.inf)
        share = scores.masked_fill(~aspect.any(1, keepdim=True), 0.0).softmax(1) * aspect
        query = (share[..., None] * states).sum(1)
        pooled = self.pooling(states, context.bool() & ~aspect, query, logits_delta)
        return pooled._replace(context=pooled.context + query)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names."""
        return {key.replace("affine.", "aspect_proj.", 1): value for key, value in state.items()}
