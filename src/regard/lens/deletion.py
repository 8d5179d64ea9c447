"""Is an explanation faithful? Take away what it calls important, first the most, and watch the model get worse.

Deletion, insertion and size as Papi et al. 2025 (arXiv 2509.18010) and SPES measure them; authors' code run for numbers:
hlt-mt/FBK-fairseq @ 4cd7c6d (Apache-2.0), `examples/speech_to_text/xai_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._checks import require, require_name, require_tensor

__all__ = ["area_under", "deletion_curve", "explained_size", "without_most_relevant"]


def without_most_relevant(
    x: Tensor, heat: Tensor, percent: int, mode: str = "deletion", baseline: float = 0.0
) -> Tensor:
    """x with cells set to the baseline. "deletion": the `percent` % of highest heat; "insertion": all but these."""
    require_name("mode", mode, ("deletion", "insertion"))
    require(heat.shape == x.shape, "heat", f"shape {tuple(heat.shape)}", f"{tuple(x.shape)}, as x")
    require(0 <= percent <= 100, "percent", percent, "a number from 0 to 100")
    order = heat.flatten().argsort()
    stays = x.numel() - x.numel() * percent // 100
    made = x.flatten().clone()
    made[order[stays:] if mode == "deletion" else order[:stays]] = baseline
    return made.view_as(x)


def deletion_curve(
    score: Callable[[Tensor], float],
    x: Tensor,
    heat: Tensor,
    percents: Sequence[int] = tuple(range(0, 101, 5)),
    mode: str = "deletion",
) -> tuple[list[float], float]:
    """(score at each percent, area under them over percents). A map is better the worse the score gets, early, under deletion.

    score: x -> word error rate, accuracy, log-probability ...
    """
    scores = [float(score(without_most_relevant(x, heat, percent, mode))) for percent in percents]
    return scores, area_under(scores, percents)


def area_under(scores: Sequence[float] | Tensor, percents: Sequence[float] | Tensor) -> float:
    """By trapezoids."""
    y, x = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(percents, dtype=torch.float64)
    require(len(y) == len(x) >= 2, "scores", f"{len(y)} values for {len(x)} percents", "as many, two or more")
    return float(torch.trapezoid(y, x))


def explained_size(heat: Tensor, threshold: float, causal: bool = False) -> tuple[int, int]:
    """(cells of a map (I, T, F) at `threshold` or above, all cells). causal: of a map over previous tokens, those up to the own."""
    require_tensor("heat", heat, dims=3, floating=True)
    if not causal:
        return int((heat >= threshold).sum()), heat.numel()
    real = torch.ones(heat.shape[:2], dtype=torch.bool).tril()
    return int((heat[real] >= threshold).sum()), int(real.sum()) * heat.shape[2]
