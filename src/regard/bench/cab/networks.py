"""The two networks of the reduced tasks. Everything but the attention layer under test is the same for all methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...models.fit_stages import sin_cos
from ...nn import FeedForward

__all__ = ["Coder", "EncoderDecoder", "LayerFactory"]

LayerFactory = Callable[[bool, bool, int], nn.Module]
"""(causal, cross, length) -> an attention layer called as `layer(x, context=None)`."""


class _Layer(nn.Module):
    def __init__(self, dim: int, self_attention: nn.Module, cross_attention: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.self_attention = nn.LayerNorm(dim), self_attention
        self.cross_norm = nn.LayerNorm(dim) if cross_attention is not None else None
        self.cross_attention = cross_attention
        self.mlp = FeedForward(dim, 2)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.norm(x))
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.cross_attention(self.cross_norm(x), context)
        return self.mlp(x)


class Coder(nn.Module):
    """Pre-norm layers over embeddings (B, N, dim) with learned positions: an encoder, or a decoder when it attends to a context.

    length: most tokens. self_attention, cross_attention: factories of the layers; causal: of the self-attention and the cross one.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        length: int,
        self_attention: LayerFactory,
        cross_attention: LayerFactory | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.3 * sin_cos(torch.arange(length).float(), dim))  # neighbours are found early
        self.layers = nn.ModuleList(
            _Layer(
                dim,
                self_attention(causal, False, length),
                None if cross_attention is None else cross_attention(causal, True, length),
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """Source (B, M, ...) and target (B, N, ...) -> (B, N, out_dim), through embeddings given as modules."""

    def __init__(
        self, embed_source: nn.Module, embed_target: nn.Module, encoder: Coder, decoder: Coder, dim: int, out_dim: int
    ) -> None:
        super().__init__()
        self.embed_source, self.embed_target = embed_source, embed_target
        self.encoder, self.decoder, self.head = encoder, decoder, nn.Linear(dim, out_dim)

    def encode(self, source: Tensor) -> Tensor:
        return self.encoder(self.embed_source(source))

    def decode(self, context: Tensor, target: Tensor) -> Tensor:
        return self.head(self.decoder(self.embed_target(target), context))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(self.encode(source), target)
