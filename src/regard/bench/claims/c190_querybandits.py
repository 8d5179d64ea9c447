"""190 QueryBandits: policies that see a query's features against those that do not and against one fixed rewrite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..bandits import (
    FEATURES,
    REWRITES,
    UCB,
    BetaThompson,
    EpsilonGreedy,
    FollowTheLeader,
    LinearThompson,
    LinUCB,
    Static,
    replay,
    win_rate,
)
from ..bandits.policies import Policy
from .claim import Outcome, Scale

PAPER, SLUG = "190", "querybandits"
SAYS = (
    "QueryBandits: a linear Thompson sampler on 17 features of the query picks rewrites that win over no rewriting 87.5 % of the time, "
    "better than bandits without context and than any fixed rewrite, some of which are worse than none; its regret grows sub-linearly."
)
REWARD, REGRET, SLOPE = "mean reward", "regret beside each round's best arm", "slope of log regret over log rounds"
CONTEXT = "linear Thompson"


def measure(scale: Scale) -> Outcome:
    rounds, seeds = scale.pick((4000, 10), (60, 2))
    arms, width = len(REWRITES), len(FEATURES)
    out = Outcome(
        f"simulated: {rounds} queries with random features, rewards of the {arms} arms linear in them with noise, weights of each feature "
        "+-0.05 to 0.15 for a third of the features of every rewrite; the language model is not in it",
        "seed",
    )
    makers: dict[str, Callable[[int], Policy]] = {
        "no rewriting": lambda seed: Static(arms, 0),
        **{f"always {name}": (lambda seed, arm=arm: Static(arms, arm)) for arm, name in enumerate(REWRITES) if arm},  # type: ignore[misc]
        "epsilon-greedy": lambda seed: EpsilonGreedy(arms, seed=seed),
        "UCB": lambda seed: UCB(arms, c=0.5, seed=seed),
        "Beta Thompson": lambda seed: BetaThompson(arms, seed),
        "LinUCB": lambda seed: LinUCB(arms, width, seed=seed),
        "follow the regularised leader": lambda seed: FollowTheLeader(arms, width, seed=seed),
        CONTEXT: lambda seed: LinearThompson(arms, width, seed=seed),
    }
    slopes, wins = [], []
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in makers}
    for seed in range(seeds):
        drawn = torch.Generator().manual_seed(seed)
        x = (torch.rand(rounds, width, generator=drawn) < 0.3).float()
        sizes = 0.05 + 0.1 * torch.rand(arms, width, generator=drawn)
        signs = torch.randint(2, (arms, width), generator=drawn) * 2.0 - 1.0
        kept = torch.rand(arms, width, generator=drawn) < 1 / 3
        means = 0.5 + x @ (sizes * signs * kept * (torch.arange(arms) > 0)[:, None]).T
        rewards = (means + 0.1 * torch.randn(rounds, arms, generator=drawn)).clamp(0, 1)
        base = rewards[:, 0].double()
        for label, make in makers.items():
            done = replay(make(seed), x, rewards)
            gap = (
                means.max(1).values - means.gather(1, done.arms[:, None])[:, 0]
            )  # without the noise, which no policy can know
            regret = gap.double().cumsum(0)
            found[label].append((done.total / rounds, float(regret[-1])))
            if label == CONTEXT:
                early = max(1, rounds // 10)
                slopes.append(math.log(float(regret[-1] / regret[early - 1])) / math.log(rounds / early))
                wins.append(win_rate(done.rewards, base))
    for label, values in found.items():
        against = None if label == "no rewriting" else "no rewriting"
        out.add(label, REWARD, "", [reward for reward, _ in values], against)
        out.add(label, REGRET, "", [regret for _, regret in values], against)
    out.add(CONTEXT, SLOPE, "", slopes)
    out.add(CONTEXT, "queries won over no rewriting, ties half", "share", wins)
    mean = lambda label: out.row(label, REWARD).mean  # noqa: E731
    blind = max(mean(label) for label in ("epsilon-greedy", "UCB", "Beta Thompson"))
    fixed = [mean(f"always {name}") for name in REWRITES if name != "none"]
    out.check("slope of log regret", sum(slopes) / len(slopes), at_most=0.8)
    out.check(
        "mean reward, linear Thompson above the best without context", mean(CONTEXT) - blind, at_least=0.0, digits=3
    )
    out.check(
        "mean reward, linear Thompson above the best fixed rewrite", mean(CONTEXT) - max(fixed), at_least=0.0, digits=3
    )
    out.check(
        "mean reward, worst fixed rewrite less no rewriting", min(fixed) - mean("no rewriting"), at_most=0.0, digits=3
    )
    pairs = zip(found[CONTEXT], found["no rewriting"])
    won = sum(ours[0] > none[0] for ours, none in pairs) / seeds
    out.check("scenarios (seeds) won over no rewriting, by their sums", won, at_least=0.875, digits=3)
    out.check("queries won over no rewriting", sum(wins) / len(wins), at_least=0.875, digits=3)
    return out
