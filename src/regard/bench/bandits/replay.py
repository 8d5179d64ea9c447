"""Letting a policy play, on an environment or on a log that holds every arm's reward, and its regret."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import require, require_tensor
from .policies import Policy

__all__ = ["Played", "play", "replay", "win_rate"]


@dataclass
class Played:
    """What a policy did.

    Attributes:
        arms (T,) int64, rewards (T,): round by round. regret (T,): cumulative, beside the arm that was best on the whole (None where
        only the played arm's reward is known). oracle_regret (T,): beside the best arm of each round.
    """

    arms: Tensor
    rewards: Tensor
    regret: Tensor | None = None
    oracle_regret: Tensor | None = None

    @property
    def total(self) -> float:
        return float(self.rewards.sum())


def play(policy: Policy, queries: Iterable[tuple[Tensor | None, Any]], reward: Callable[[Any, int], float]) -> Played:
    """Round by round: the policy picks an arm for a query's features, `reward(query, arm)` is found out, the policy is told.

    queries: (features (F,), query). Rewrite, answer and score inside `reward`, with `rewrite_prompt` and `qa_reward`.
    """
    arms, rewards = [], []
    for x, query in queries:
        arm = policy.select(x)
        value = float(reward(query, arm))
        policy.update(x, arm, value)
        arms.append(arm)
        rewards.append(value)
    return Played(torch.tensor(arms, dtype=torch.int64), torch.tensor(rewards, dtype=torch.float64))


def replay(policy: Policy, features: Tensor | None, rewards: Tensor) -> Played:
    """`play` on a log: features (T, F) or None, rewards (T, num_arms) of every arm in every round; with regrets."""
    require_tensor("rewards", rewards, dims=2, floating=True)
    fits = rewards.shape[1] == policy.num_arms
    require(fits, "rewards", f"shape {tuple(rewards.shape)}", f"(T, {policy.num_arms})")
    if features is not None:
        require_tensor("features", features, dims=2)
        require(len(features) == len(rewards), "features", f"{len(features)} rows", f"{len(rewards)}, as `rewards`")
    rows = [None] * len(rewards) if features is None else list(features)
    done = play(policy, ((x, number) for number, x in enumerate(rows)), lambda number, arm: float(rewards[number, arm]))
    table = rewards.double()
    best = int(table.sum(0).argmax()) if len(table) else 0
    done.regret = (table[:, best] - done.rewards).cumsum(0)
    done.oracle_regret = (table.max(1).values - done.rewards).cumsum(0) if len(table) else done.rewards
    return done


def win_rate(ours: Tensor, baseline: Tensor) -> float:
    """Share of places where ours is larger, equal ones counted as a half: per query, or per data set with sums in place of rewards."""
    require(
        ours.shape == baseline.shape and ours.numel() > 0,
        "ours",
        tuple(ours.shape),
        f"{tuple(baseline.shape)}, not empty",
    )
    return float(((ours > baseline).double() + 0.5 * (ours == baseline)).mean())
