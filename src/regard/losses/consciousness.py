"""Training signals of the consciousness prior: a thought names few variables and says what they will be.

The Consciousness Prior (Bengio 2017, arXiv 1709.08568) proposes them in words; the estimators are OUR CHOICE (the skeleton
AI-ON/TheConsciousnessPrior @ 5f30aae has empty functions where they would be).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bad_type, require, require_tensor

__all__ = ["factor_contrast", "key_usage_entropy", "named_prediction", "thought_contrast"]


def named_prediction(
    mean: Tensor, target: Tensor, gates: Tensor, *, std: float = 1.0, stop_gradient: bool = True
) -> Tensor:
    """-log N(target; mean, std^2) of the named variables alone, weighted by their gates: a scalar, the mean over the batch.

    Args:
        mean, target: (B, n) or (B, n, d) (summed over d): what was predicted for the variables, and what they came to be.
        gates: (B, n), how much the earlier thought named each (`ConsciousState.gates()`), 0 for those unnamed: they cost nothing.
        stop_gradient: whether the target is a fact, so that the state cannot be made dull to be predictable.

    Gates in the loss draw attention to what can be predicted. Alone that ends in naming one easy thing: see `key_usage_entropy`.
    """
    require_tensor("mean", mean, floating=True)
    require_tensor("target", target, floating=True)
    require(mean.dim() in (2, 3), "mean", f"shape {tuple(mean.shape)}", "(B, n) or (B, n, d)")
    require(target.shape == mean.shape, "target", f"shape {tuple(target.shape)}", f"shape {tuple(mean.shape)}")
    _gates(gates, tuple(mean.shape[:2]))
    require(std > 0, "std", std, "a number > 0")
    target = target.detach() if stop_gradient else target
    cost = 0.5 * ((target - mean) / std).square() + math.log(std) + 0.5 * math.log(2 * math.pi)
    cost = cost if cost.dim() == 2 else cost.sum(2)
    return (gates * cost).sum(1).mean()


def key_usage_entropy(gates: Tensor) -> Tensor:
    """Entropy, over log n, of how often each of n variables is named over the batch; to be MAXIMISED. In [0, 1]; gates (B, n)."""
    require_tensor("gates", gates, dims=2, floating=True)
    require(gates.shape[0] > 0 and gates.shape[1] > 1, "gates", f"shape {tuple(gates.shape)}", "(B >= 1, n >= 2)")
    use = gates.mean(0)
    use = use / use.sum()
    return -(use * use.clamp_min(1e-30).log()).sum() / math.log(gates.shape[1])


def thought_contrast(thought: Tensor, state: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE: does a thought (B, d) tell its own later state (B, d) from those of the batch? A lower bound on their mutual information
    is log B minus this. Cosine similarity over `temperature`."""
    require_tensor("thought", thought, dims=2, floating=True)
    require_tensor("state", state, dims=2, floating=True)
    require(state.shape == thought.shape, "state", f"shape {tuple(state.shape)}", f"shape {tuple(thought.shape)}")
    require(len(thought) > 1, "thought", f"{len(thought)} rows", "at least two to tell apart")
    require(temperature > 0, "temperature", temperature, "a number > 0")
    scores = F.normalize(thought, dim=1) @ F.normalize(state, dim=1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(thought), device=thought.device))


def factor_contrast(
    energy: Callable[[Tensor], Tensor], values: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Noise contrast for an energy: data against the same variables shuffled one by one over the batch; a scalar.

    The shuffled ones have the data's own marginals, so that the energy learns what variables have to do with each other and nothing
    else; at the optimum -energy is the log ratio of the joint to the product of its marginals. values: (B, n), B >= 2.
    """
    if not callable(energy):
        raise bad_type("energy", energy, "a function (B, n) -> (B,)")
    require_tensor("values", values, dims=2, floating=True)
    require(len(values) > 1, "values", f"{len(values)} rows", "at least two to shuffle")
    order = torch.rand(values.shape, generator=generator, device=values.device).argsort(0)
    noise = values.gather(0, order)
    return F.softplus(energy(values)).mean() + F.softplus(-energy(noise)).mean()


def _gates(gates: Tensor, need: tuple[int, ...]) -> None:
    require_tensor("gates", gates, dims=2, floating=True)
    require(tuple(gates.shape) == need, "gates", f"shape {tuple(gates.shape)}", f"shape {need}")
