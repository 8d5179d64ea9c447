"""Merging similar tokens of an image before an attention and spreading the result after it; and a coarser merge of the same, for agents.

Token Merging for Fast Stable Diffusion (Bolya and Hoffman, 2023, arXiv 2303.17604), with the second set of Agent Attention (Han et al.,
2023, arXiv 2312.08874); code read for numbers: LeapLabTHU/Agent-Attention @ 207ce3e, `agentsd/merge.py` (no licence: numbers only).
What differs: nothing to merge is a merge of nothing and not another kind of answer; agents are made on request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_fraction, require_int, require_tensor

__all__ = ["TokenMerge", "token_merge"]


class TokenMerge:
    """How `token_merge` groups the N tokens of each sample.

    Attributes: length, N. kept: tokens that `merge` leaves. agents_kept: tokens that `agents` leaves, or None.
    """

    def __init__(
        self, sources: Tensor, targets: Tensor, order: Tensor, nearest: Tensor, merged: int, agents: int | None
    ) -> None:
        self.sources, self.targets = sources, targets  # (S,), (T,) places in the grid
        self._order, self._nearest = (
            order,
            nearest,
        )  # (B, S): sources by falling similarity; each one's most similar target
        self._merged, self._agents = merged, agents
        self.length = len(sources) + len(targets)
        self.kept = self.length - merged
        self.agents_kept = None if agents is None else self.length - agents

    def merge(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, kept, C): sources that stay alone, then targets, each the mean of itself and what was merged into it."""
        return self._merge(x, self._merged)

    def agents(self, x: Tensor) -> Tensor | None:
        """x (B, N, C) -> (B, agents_kept, C), merged further; None where no number of agents was asked for."""
        return None if self._agents is None else self._merge(x, self._agents)

    def unmerge(self, x: Tensor) -> Tensor:
        """x (B, kept, C), in the order of `merge` -> (B, N, C): merged tokens get a copy of their target's."""
        require_tensor("x", x, dims=3)
        require(x.shape[1] == self.kept, "x", f"shape {tuple(x.shape)}", f"(B, {self.kept}, C)")
        alone = len(self.sources) - self._merged
        of_targets = x[:, alone:]
        gone = self._order[:, : self._merged]
        copies = _take(of_targets, self._nearest.gather(1, gone))
        by_order = torch.cat((copies, x[:, :alone]), dim=1)
        out = x.new_empty(x.shape[0], self.length, x.shape[2])
        out[:, self.targets] = of_targets
        places = self.sources[self._order][..., None].expand_as(by_order)
        return out.scatter(1, places, by_order)

    def _merge(self, x: Tensor, count: int) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[1] == self.length, "x", f"shape {tuple(x.shape)}", f"(B, {self.length}, C)")
        sources, targets = x[:, self.sources], x[:, self.targets]
        gone, stays = self._order[:, :count], self._order[:, count:]
        into = self._nearest.gather(1, gone)[..., None].expand(-1, -1, x.shape[2])
        means = targets.scatter_reduce(1, into, _take(sources, gone), reduce="mean", include_self=True)
        return torch.cat((_take(sources, stays), means), dim=1)

    def __repr__(self) -> str:
        return f"<TokenMerge of {self.length} tokens to {self.kept}, agents {self.agents_kept}>"


@torch.no_grad()
def token_merge(
    metric: Tensor,
    grid: tuple[int, int],
    ratio: float = 0.5,
    agent_ratio: float | None = None,
    *,
    stride: tuple[int, int] = (2, 2),
    random: bool = False,
    generator: torch.Generator | None = None,
) -> TokenMerge:
    """Which tokens of an image to merge: the most similar to one of a few spread over it.

    One token of each cell of `stride` is a target (the top left one, or a random one, the same for all samples); the others are
    sources. The `ratio` of all tokens whose cosine with their nearest target is largest are merged into that.

    Args:
        metric: (B, N, C), what similarity is measured on. grid: (height, width), N tokens, rows first.
        ratio: share of the N tokens to merge away, in [0, 1]; at most all sources are.
        agent_ratio: share to merge away for agents; None: no agents. Where agents would not be fewer than half of the merged tokens, there
            are none either (AgentSD).
        stride: (height, width) of a cell; cells that do not fit at the right and bottom have no target.
        random, generator: a random target in each cell.

    Raises:
        ValueError, TypeError: a grid that is not N, shares outside [0, 1].
    """
    require_tensor("metric", metric, dims=3, floating=True)
    height, width = (require_int("grid", side, 1) for side in grid)
    length = metric.shape[1]
    require(height * width == length, "grid", grid, f"height * width = {length}, the tokens of metric")
    rows, columns = (require_int("stride", side, 1) for side in stride)
    require(rows <= height and columns <= width, "stride", stride, f"at most the grid's {grid}")
    require_fraction("ratio", ratio)
    device = metric.device
    shape = (height // rows, width // columns)
    offset = torch.zeros(shape, dtype=torch.long)
    if random:
        offset = torch.randint(
            rows * columns, (*shape, 1), generator=generator, device=getattr(generator, "device", None)
        )
        offset = offset[..., 0].cpu()
    row = torch.arange(shape[0])[:, None] * rows + offset // columns
    column = torch.arange(shape[1]) * columns + offset % columns
    is_target = torch.zeros(height, width, dtype=torch.bool)
    is_target[row, column] = True
    targets, sources = (where.nonzero()[:, 0].to(device) for where in (is_target.flatten(), ~is_target.flatten()))
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    likeness = unit[:, sources] @ unit[:, targets].mT
    best, nearest = likeness.max(-1) if len(sources) else (likeness.sum(-1), likeness.sum(-1).long())
    order = best.argsort(dim=-1, descending=True)
    merged = min(len(sources), int(length * ratio))
    agents = None
    if agent_ratio is not None:
        require_fraction("agent_ratio", agent_ratio)
        agents = min(len(sources), int(length * agent_ratio))
        agents = agents if (length - agents) * 2 < length - merged else None
    return TokenMerge(sources, targets, order, nearest, merged, agents)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x (B, N, C) at places (B, n) -> (B, n, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
