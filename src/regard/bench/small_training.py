"""Small trainings inside benchmarks: bytes of real text, and one loop for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .._checks import require, require_int
from ..lens.needle import haystack_text

__all__ = ["ByteText", "train"]


class ByteText:
    """The prose of `pydoc_data.topics` as bytes: the last tenth is held out.

    >>> text = ByteText()
    >>> text.batch(8, 256, torch.Generator().manual_seed(0)).shape
    torch.Size([8, 256])
    """

    def __init__(self) -> None:
        whole = torch.frombuffer(bytearray(haystack_text().encode()), dtype=torch.uint8).long()
        cut = len(whole) * 9 // 10
        self.learn, self.kept = whole[:cut], whole[cut:]

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """(batch, length) int64 bytes from random places of the part to learn from."""
        require(length <= len(self.learn), "length", length, f"at most {len(self.learn)} bytes")
        starts = torch.randint(len(self.learn) - length + 1, (batch,), generator=generator)
        return self.learn[starts[:, None] + torch.arange(length)]

    def held_out(self, count: int, length: int) -> Tensor:
        """(count, length) bytes from the held-out part, spread evenly over it."""
        require(length <= len(self.kept), "length", length, f"at most {len(self.kept)} bytes")
        room = len(self.kept) - length
        starts = torch.tensor([round(room * i / max(1, count - 1)) for i in range(count)])
        return self.kept[starts[:, None] + torch.arange(length)]


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float = 2e-3,
    warmup: float = 0.1,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """AdamW over `steps` steps of `loss(step)`, warm-up and cosine decay to a tenth, gradients cut at norm 1; the last loss."""
    require_int("steps", steps, 1)
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rising = max(1, round(warmup * steps))
    last = math.nan
    for step in range(steps):
        share = min(1.0, (step + 1) / rising)
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share * decay
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = float(value.detach())
        if on_step is not None:
            on_step(step, last)
    return last
