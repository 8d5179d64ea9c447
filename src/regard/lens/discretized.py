"""Integrated gradients along a path of real words: discretized integrated gradients (DIG), Sanyal and Ren 2021 (EMNLP, arXiv 2108.13654).

The straight line between a word's embedding and the baseline passes where no word is; here the path goes from neighbour to neighbour of the
embedding table, each made monotonic towards the baseline. Written from the paper's description of its greedy strategy; the gradients of a
step's two ends are averaged (theirs takes one end), so that the attributions add up sooner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int
from .saliency import Score, path_gradients

__all__ = ["discretized_gradients", "word_path"]


@torch.no_grad()
def word_path(x: Tensor, baseline: Tensor | float, table: Tensor, steps: int = 30, neighbours: int = 20) -> Tensor:
    """Points from x (B, T, D) to the baseline, (steps + 1, B, T, D), each coordinate going one way only.

    Each step looks at the nearest `neighbours` rows of `table` (V, D), bends each so that every coordinate lies between here and the
    baseline (one that does not goes its even share of the way), and goes where least bending was needed.
    """
    require_int("steps", steps, 1)
    require_int("neighbours", neighbours, 1)
    require(
        table.dim() == 2 and table.shape[1] == x.shape[-1],
        "table",
        f"shape {tuple(table.shape)}",
        f"(V, {x.shape[-1]})",
    )
    goal = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    path, here = [x.detach()], x.detach()
    for left in range(steps, 1, -1):
        near = torch.cdist(here.flatten(0, -2), table).topk(min(neighbours, len(table)), largest=False).indices
        words = table[near].unflatten(0, here.shape[:-1])  # (B, T, K, D)
        start, end = here[..., None, :], goal[..., None, :]
        inside = (words - start) * (words - end) <= 0
        bent = torch.where(inside, words, start + (end - start) / left)
        moved = (bent - start).norm(dim=-1) > 0
        cost = (bent - words).norm(dim=-1).masked_fill(~moved, torch.inf)
        best = cost.argmin(-1)[..., None, None].expand(*here.shape[:-1], 1, here.shape[-1])
        here = bent.gather(-2, best)[..., 0, :]
        path.append(here)
    return torch.stack([*path, goal])


def discretized_gradients(
    score: Score, x: Tensor, baseline: Tensor | float, table: Tensor, steps: int = 30, neighbours: int = 20
) -> Tensor:
    """DIG of each coordinate, of x's shape: gradients summed along `word_path`. Of a linear score it is gradient times (x - baseline)."""
    return path_gradients(score, word_path(x, baseline, table, steps, neighbours))
