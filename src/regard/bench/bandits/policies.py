"""Policies: `select(x) -> arm`, `update(x, arm, reward)`. Those without a context ignore x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import require, require_fraction, require_int, require_tensor

__all__ = [
    "UCB",
    "BetaThompson",
    "EpsilonGreedy",
    "Exp3",
    "FollowTheLeader",
    "LinUCB",
    "LinearThompson",
    "Policy",
    "Static",
]


class Policy:
    """What all have: `num_arms`, a generator of their own (`seed`), and counts and sums of rewards of each arm."""

    def __init__(self, num_arms: int, seed: int = 0) -> None:
        self.num_arms = require_int("num_arms", num_arms, 1)
        self.generator = torch.Generator().manual_seed(require_int("seed", seed, 0))
        self.counts = torch.zeros(num_arms, dtype=torch.float64)
        self.sums = torch.zeros(num_arms, dtype=torch.float64)

    def select(self, x: Tensor | None = None) -> int:
        """The arm to play for a query with features x (F,)."""
        return self._best(self.values(x))

    def values(self, x: Tensor | None = None) -> Tensor:
        """(num_arms,): what the arms are worth now, draws and bonuses included."""
        raise NotImplementedError

    def update(self, x: Tensor | None, arm: int, reward: float) -> None:
        """The reward in [0, 1] that `arm` had for x."""
        require(0 <= arm < self.num_arms, "arm", arm, f"an arm in [0, {self.num_arms})")
        require(math.isfinite(reward), "reward", reward, "a finite number")
        self.counts[arm] += 1
        self.sums[arm] += reward

    def _best(self, values: Tensor) -> int:
        """The largest; of equals, one at random."""
        best = (values == values.max()).nonzero()[:, 0]
        return int(best[torch.randint(len(best), (1,), generator=self.generator)])

    def _means(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1)


class Static(Policy):
    """Always the same arm."""

    def __init__(self, num_arms: int, arm: int = 0) -> None:
        super().__init__(num_arms)
        require(0 <= arm < num_arms, "arm", arm, f"an arm in [0, {num_arms})")
        self.arm = arm

    def select(self, x: Tensor | None = None) -> int:
        return self.arm


class EpsilonGreedy(Policy):
    """The best mean so far, or with chance `epsilon` any arm."""

    def __init__(self, num_arms: int, epsilon: float = 0.1, seed: int = 0) -> None:
        super().__init__(num_arms, seed)
        self.epsilon = require_fraction("epsilon", epsilon)

    def select(self, x: Tensor | None = None) -> int:
        if float(torch.rand(1, generator=self.generator)) < self.epsilon:
            return int(torch.randint(self.num_arms, (1,), generator=self.generator))
        return self._best(torch.where(self.counts == 0, math.inf, self._means()))


class UCB(Policy):
    """UCB1: mean + c sqrt(2 ln t / n); each arm once first."""

    def __init__(self, num_arms: int, c: float = 1.0, seed: int = 0) -> None:
        super().__init__(num_arms, seed)
        require(c >= 0, "c", c, "a number >= 0")
        self.c = c

    def values(self, x: Tensor | None = None) -> Tensor:
        bonus = self.c * (2 * self.counts.sum().clamp(min=1).log() / self.counts.clamp(min=1)).sqrt()
        return torch.where(self.counts == 0, math.inf, self._means() + bonus)


class BetaThompson(Policy):
    """Draws from Beta(1 + rewards, 1 + what is missing to 1) of each arm."""

    def update(self, x: Tensor | None, arm: int, reward: float) -> None:
        require(0.0 <= reward <= 1.0, "reward", reward, "a number in [0, 1]")
        super().update(x, arm, reward)

    def values(self, x: Tensor | None = None) -> Tensor:
        rest = self.counts - self.sums
        both = torch.stack([1 + self.sums, 1 + rest])
        drawn = torch._standard_gamma(both, generator=self.generator)
        return drawn[0] / drawn.sum(0)


class Exp3(Policy):
    """Exponential weights for rewards that an adversary may choose, in [0, 1]. gamma: the share of even choice."""

    def __init__(self, num_arms: int, gamma: float = 0.1, seed: int = 0) -> None:
        super().__init__(num_arms, seed)
        require(0 < gamma <= 1, "gamma", gamma, "a number in (0, 1]")
        self.gamma, self.logs = gamma, torch.zeros(num_arms, dtype=torch.float64)

    def probabilities(self) -> Tensor:
        return (1 - self.gamma) * self.logs.softmax(0) + self.gamma / self.num_arms

    def select(self, x: Tensor | None = None) -> int:
        return int(torch.multinomial(self.probabilities(), 1, generator=self.generator))

    def update(self, x: Tensor | None, arm: int, reward: float) -> None:
        super().update(x, arm, reward)
        self.logs[arm] += self.gamma * reward / float(self.probabilities()[arm]) / self.num_arms


class _Linear(Policy):
    """Ridge regression of each arm's reward on the features, kept up to date by rank-one updates of the inverse.

    Args:
        num_arms: arms. num_features: F, without the 1 that `bias` adds. ridge: lambda of B = lambda I + sum x x^T.
        bias: whether a feature that is always 1 is added.
    """

    def __init__(self, num_arms: int, num_features: int, ridge: float = 1.0, bias: bool = True, seed: int = 0) -> None:
        super().__init__(num_arms, seed)
        require(ridge > 0, "ridge", ridge, "a number > 0")
        self.num_features, self.bias = require_int("num_features", num_features, 1), bias
        size = num_features + bias
        self.inverse = (torch.eye(size, dtype=torch.float64) / ridge).repeat(num_arms, 1, 1)
        self.moments = torch.zeros(num_arms, size, dtype=torch.float64)

    def weights(self) -> Tensor:
        """(num_arms, F [+ 1]): the ridge solution of each arm, the bias last: how much a feature speaks for it."""
        return (self.inverse @ self.moments[..., None])[..., 0]

    def _features(self, x: Tensor | None) -> Tensor:
        x = require_tensor("x", x, dims=1).double()
        require(x.shape[0] == self.num_features, "x", f"shape {tuple(x.shape)}", f"({self.num_features},)")
        return torch.cat([x, x.new_ones(1)]) if self.bias else x

    def update(self, x: Tensor | None, arm: int, reward: float) -> None:
        super().update(x, arm, reward)
        row = self._features(x)
        turned = self.inverse[arm] @ row
        self.inverse[arm] -= torch.outer(turned, turned) / (1 + row @ turned)
        self.moments[arm] += reward * row


class LinearThompson(_Linear):
    """Linear Thompson sampling: weights drawn from N(ridge solution, v^2 B^-1) for each arm; the largest value wins.

    Args: as the ridge policies; v: width of the draws, 0 is greedy.
    """

    def __init__(
        self, num_arms: int, num_features: int, v: float = 0.25, ridge: float = 1.0, bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__(num_arms, num_features, ridge, bias, seed)
        require(v >= 0, "v", v, "a number >= 0")
        self.v = v

    def values(self, x: Tensor | None = None) -> Tensor:
        row = self._features(x)
        means = self.weights() @ row
        # a draw of the weights, times x, is a draw from N(mean, v^2 x B^-1 x)
        widths = (row @ self.inverse @ row).clamp(min=0).sqrt()
        return means + self.v * widths * torch.randn(self.num_arms, generator=self.generator, dtype=torch.float64)


class LinUCB(_Linear):
    """Ridge solution times x, plus alpha sqrt(x B^-1 x)."""

    def __init__(
        self, num_arms: int, num_features: int, alpha: float = 0.5, ridge: float = 1.0, bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__(num_arms, num_features, ridge, bias, seed)
        require(alpha >= 0, "alpha", alpha, "a number >= 0")
        self.alpha = alpha

    def values(self, x: Tensor | None = None) -> Tensor:
        row = self._features(x)
        return self.weights() @ row + self.alpha * (row @ self.inverse @ row).clamp(min=0).sqrt()


class FollowTheLeader(_Linear):
    """Follow the regularised leader with squared loss: the ridge solution, greedy; `l1` takes as much off every weight's size."""

    def __init__(
        self, num_arms: int, num_features: int, l1: float = 0.0, ridge: float = 1.0, bias: bool = True, seed: int = 0
    ) -> None:
        super().__init__(num_arms, num_features, ridge, bias, seed)
        require(l1 >= 0, "l1", l1, "a number >= 0")
        self.l1 = l1

    def values(self, x: Tensor | None = None) -> Tensor:
        weights = self.weights()
        return (weights.sign() * (weights.abs() - self.l1).clamp(min=0)) @ self._features(x)
