"""SnapKV, TOVA and key-norm eviction: well-known scores as policies of the evicting cache, with budgets in tokens also while decoding.

Li et al. 2024 (SnapKV, arXiv 2404.14469), Oren et al. 2024 (TOVA, arXiv 2401.06104), Devoto et al. 2024 (key norms, arXiv 2406.11430).
Plain baselines here, from the formulas; none of them is a paper of the catalog.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..._checks import require, require_int, require_name
from .policy import EvictingMethod, Limits, Look, check_budget


@dataclass
class SnapKV(EvictingMethod):
    """The tokens that the last `window` queries of the prompt read most, and the window itself.

    Attributes:
        budget: tokens (int) or a fraction of the prompt. window: queries that vote, kept themselves. kernel: odd width of the max pooling
            along the keys, so that neighbours of a read token stay with it. sink: first tokens that always stay.
        group: how the votes of the query heads of one kv head are joined. positions: "kept" or "cache".

    While decoding the votes of the last `window` tokens go on counting, as a running mean, so that the budget holds for endless text.
    """

    budget: int | float = 0.25
    window: int = 32
    kernel: int = 7
    sink: int = 0
    group: str = "mean"
    positions: str = "kept"

    def __post_init__(self) -> None:
        require_int("window", self.window, 1)
        require(require_int("kernel", self.kernel, 1) % 2 == 1, "kernel", self.kernel, "an odd width")
        require_name("group", self.group, ("sum", "mean", "max"))
        require_name("positions", self.positions, ("kept", "cache"))
        check_budget(self.budget, self.sink, self.window)

    def limits(self, tokens: Tensor) -> Limits:
        return Limits.of(self.budget, tokens, self.window, self.sink)

    def rescore(self, look: Look, old: Tensor) -> Tensor:
        votes = look.attention(last=self.window, group=self.group) / min(self.window, look.q_len)
        if look.q_len == 1:
            return old + (votes - old) / self.window
        before = look.position.shape[-1] - self.window
        if (
            look.q_len < look.position.shape[-1] or before <= 0
        ):  # some keys are older than this call: no neighbours to pool over
            share = min(1.0, look.q_len / self.window)
            return old + (votes - old) * share
        flat = votes[..., :before].flatten(0, -2)[:, None]
        pooled = torch.nn.functional.max_pool1d(flat, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.cat([pooled[:, 0].view(*votes.shape[:-1], before), votes[..., before:]], -1)


@dataclass
class TOVA(EvictingMethod):
    """The tokens that the newest query reads most: at each step the least read one leaves.

    Attributes: budget: tokens (int) or a fraction of the prompt. group, positions: as in `SnapKV`. sink: first tokens that always stay.
    """

    budget: int | float = 0.25
    sink: int = 0
    group: str = "mean"
    positions: str = "kept"

    def __post_init__(self) -> None:
        require_name("group", self.group, ("sum", "mean", "max"))
        require_name("positions", self.positions, ("kept", "cache"))
        check_budget(self.budget, self.sink)

    def limits(self, tokens: Tensor) -> Limits:
        return Limits.of(self.budget, tokens, 1, self.sink)

    def rescore(self, look: Look, old: Tensor) -> Tensor:
        return look.attention(last=1, group=self.group)


@dataclass
class KeyNorm(EvictingMethod):
    """The tokens whose keys have the smallest norm, which models tend to read most; needs no attention weights at all.

    Attributes: budget: tokens (int) or a fraction of the prompt. sink, recent: first and last tokens that always stay.
    """

    reads: ClassVar[bool] = False
    budget: int | float = 0.25
    sink: int = 4
    recent: int = 16
    positions: str = "kept"

    def __post_init__(self) -> None:
        require_name("positions", self.positions, ("kept", "cache"))
        check_budget(self.budget, self.sink, self.recent)

    def limits(self, tokens: Tensor) -> Limits:
        return Limits.of(self.budget, tokens, self.recent, self.sink)

    def rescore(self, look: Look, old: Tensor) -> Tensor:
        return -look.keys.float().norm(dim=-1)
