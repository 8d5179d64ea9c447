"""Choosing the next token from logits, for the networks here that generate by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int

__all__ = ["Sampling"]


class Sampling:
    """How the next token is chosen from logits (B, V): the likeliest one, or drawn.

    Args:
        do_sample: draw; False (default) takes the likeliest. temperature: divides the logits, > 0.
        top_k: keep this many likeliest tokens (None: all). top_p: keep the fewest likeliest tokens whose probabilities reach top_p.
        generator: a `torch.Generator` on the model's device.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        require(temperature > 0, "temperature", temperature, "a number > 0")
        require(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
        if top_k is not None:
            require_int("top_k", top_k, 1)
        self.do_sample, self.temperature, self.top_k, self.top_p = do_sample, temperature, top_k, top_p
        self.generator = generator

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,) token ids."""
        if not self.do_sample:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) of what is drawn from, at least float32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            values, order = logits.sort(-1, descending=True)
            weights = values.softmax(-1)
            reached = weights.cumsum(-1) - weights >= self.top_p
            logits = logits.masked_fill(reached.scatter(-1, order, reached), float("-inf"))
        return logits.softmax(-1)
