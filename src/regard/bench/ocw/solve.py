"""Solvers that need no language model: clusters of equal size among the words' embeddings; and walls made to try them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor
from .walls import SIDE, Wall

__all__ = ["equal_kmeans", "made_walls", "solve_by_embeddings"]


def equal_kmeans(x: Tensor, k: int = 4, *, starts: int = 10, rounds: int = 100, seed: int = 0) -> Tensor:
    """k-means with clusters of equal size: x (n, dim), n a multiple of k -> labels (n,) int64.

    Each round assigns all points at once at the least sum of squared distances (scipy's assignment) and moves the means; the best of
    `starts` beginnings counts. Needs scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("equal_kmeans: needs scipy (pip install scipy)") from error
    require_tensor("x", x, dims=2, floating=True)
    require_int("k", k, 1)
    count = len(x)
    require(count > 0 and count % k == 0, "x", f"{count} points", f"a multiple of k ({k})")
    points = x.detach().double().cpu()
    chance = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(count, dtype=torch.int64), float("inf")
    for _ in range(require_int("starts", starts, 1)):
        means, labels = points[torch.randperm(count, generator=chance)[:k]], None
        for _ in range(require_int("rounds", rounds, 1)):
            cost = torch.cdist(points, means).square().repeat_interleave(count // k, dim=1)
            place = torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) // (count // k)
            if labels is not None and torch.equal(place, labels):
                break
            labels = place
            means = torch.stack([points[labels == i].mean(0) for i in range(k)])
        assert labels is not None
        total = float((points - means[labels]).square().sum())
        if total < least - 1e-12:
            best, least = labels, total
    return best


def solve_by_embeddings(
    wall: Wall, embed: Callable[[Sequence[str]], Tensor], *, starts: int = 10, seed: int = 0
) -> list[list[str]]:
    """Groups of a wall: clusters of equal size among `embed(words) -> (16, dim)`."""
    labels = equal_kmeans(embed(wall.words), SIDE, starts=starts, seed=seed)
    return [[word for word, label in zip(wall.words, labels.tolist()) if label == i] for i in range(SIDE)]


def made_walls(
    count: int, herrings: int = 3, *, dim: int = 16, spread: float = 0.5, seed: int = 0
) -> tuple[list[Wall], dict[str, Tensor]]:
    """Walls of made-up words with embeddings (dim,), in which `herrings` words of the later groups lie between their group and the first's.

    Each group has a random direction and its words lie around it; a red herring lies halfway to another group of the same wall, a little
    nearer to that one. In walls randomised afterwards that group is somewhere else. Returns (walls, word -> embedding).
    """
    require_int("count", count, 1)
    require(require_int("herrings", herrings, 0) <= 12, "herrings", herrings, "at most 12, the words of three groups")
    chance = torch.Generator().manual_seed(seed)
    walls, vectors = [], dict[str, Tensor]()
    for number in range(count):
        centres = torch.nn.functional.normalize(torch.randn(SIDE, dim, generator=chance), dim=1)
        around = centres[:, None] + spread * torch.randn(SIDE, SIDE, dim, generator=chance) / dim**0.5
        misled = torch.randperm(12, generator=chance)[:herrings]
        for place in misled.tolist():
            group, word = 1 + place // SIDE, place % SIDE
            other = (group + 1 + int(torch.randint(3, (1,), generator=chance))) % SIDE
            around[group, word] += 0.55 * (centres[other] - centres[group])
        groups = tuple(tuple(f"w{number}g{g}n{n}" for n in range(SIDE)) for g in range(SIDE))
        for g, group in enumerate(groups):
            vectors.update(zip(group, around[g]))
        flat = [word for group in groups for word in group]
        words = tuple(flat[i] for i in torch.randperm(16, generator=chance))
        walls.append(
            Wall(
                f"{number:04d}",
                words,
                groups,
                tuple(f"c{number}g{g}" for g in range(SIDE)),
                tuple(f"{number}.{g}" for g in range(SIDE)),
            )
        )
    return walls, vectors
