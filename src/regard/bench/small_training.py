"""Small trainings inside benchmarks, of which nothing is kept. Texts, and training with checkpoints, are in `regard.testbeds`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .._checks import require_int
from ..losses.runner import fit
from ..testbeds.texts import ByteText

__all__ = ["ByteText", "train"]


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float = 2e-3,
    warmup: float = 0.1,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """AdamW over `steps` steps of `loss(step)`, warm-up and cosine decay to a tenth, gradients cut at norm 1; the last loss.

    Random numbers inside the loss follow from torch's seed here. A loss that is no number ends it (`TrainingStopped`).
    """
    require_int("steps", steps, 1)
    rising = max(1, round(warmup * steps))

    def factor(step: int, steps: int) -> float:
        return min(1.0, (step + 1) / rising) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))

    trained = nn.ParameterList(p for p in parameters if p.requires_grad)
    fitted = fit(
        trained, loss, lambda step: step, steps=steps, lr=lr, schedule=factor, weight_decay=0.01, clip=1.0, on_step=on_step,
        seed=torch.initial_seed() % 2**31, progress=False,
    )  # fmt: skip
    return fitted.losses[-1]
