"""The integer program of MoA's search: one candidate a head, few different ones a layer, mean cost within bounds."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SOLVERS = ("auto", "milp", "lagrange")
Held = Mapping[int, tuple[float, float]]
_SLACK = 1e-9


@dataclass(frozen=True)
class Problem:
    """Attributes:
    losses: (T, layers, heads, C) float64, what each candidate costs each head at T lengths (T objectives).
    costs: (S, C) float64, density of each candidate at S lengths; the same for every head.
    upper, lower: bounds of the mean density, at each of the S lengths. max_rules: different candidates in a layer, at most.
    """

    losses: Tensor
    costs: Tensor
    upper: float
    lower: float
    max_rules: int

    def values(self, choice: Tensor) -> Tensor:
        """The T objectives of choice (layers, heads)."""
        return self.losses.gather(-1, choice.expand(self.losses.shape[0], -1, -1)[..., None]).sum((1, 2, 3))

    def mean_costs(self, choice: Tensor) -> Tensor:
        """Mean density at the S lengths, (S,)."""
        return self.costs[:, choice].mean((1, 2))

    def feasible(self, choice: Tensor, held: Held) -> bool:
        costs, values = self.mean_costs(choice), self.values(choice)
        inside = bool((costs <= self.upper + _SLACK).all() and (costs >= self.lower - _SLACK).all())
        few = all(len(set(row)) <= self.max_rules for row in choice.tolist())
        return inside and few and all(a - _near(a) <= float(values[i]) <= b + _near(b) for i, (a, b) in held.items())

    def reach(self) -> tuple[float, float]:
        """Least and greatest density of a candidate over the lengths, rounded."""
        return round(float(self.costs.amin(1).max()), 3), round(float(self.costs.amax(1).min()), 3)


def _near(value: float) -> float:
    return 1e-6 * abs(value) + 1e-12


def solve(problem: Problem, objective: int, held: Held, solver: str, time_limit: float) -> Tensor | None:
    """The choice (layers, heads) int64 with the least loss at `objective`, other objectives held to ranges; None where there is none."""
    if solver == "auto":
        solver = "milp" if importlib.util.find_spec("scipy") is not None else "lagrange"
    if solver == "milp":
        return _milp(problem, objective, held, time_limit)
    return _lagrange(problem, objective, held)


def _milp(problem: Problem, objective: int, held: Held, time_limit: float) -> Tensor | None:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ImportError as error:
        raise ImportError("solver='milp' needs scipy: pip install scipy, or solver='lagrange'") from error
    _, layers, heads, rules = problem.losses.shape
    bags = layers * heads
    n = bags * rules
    scale = float(problem.losses[objective].amax()) or 1.0
    flat = problem.losses.reshape(problem.losses.shape[0], n).numpy() / scale
    x = np.arange(n)
    layer_of, rule_of = x // (heads * rules), x % rules
    y = n + layer_of * rules + rule_of
    total = n + layers * rules
    one = coo_matrix((np.ones(n), (x // rules, x)), (bags, total))
    linked = coo_matrix((np.r_[np.ones(n), -np.ones(n)], (np.r_[x, x], np.r_[x, y])), (n, total))
    few = coo_matrix(
        (np.ones(layers * rules), (np.arange(layers * rules) // rules, np.arange(n, total))), (layers, total)
    )
    mean = np.zeros((problem.costs.shape[0], total))
    mean[:, :n] = np.tile(problem.costs.numpy(), (1, bags)) / bags
    constraints = [
        LinearConstraint(one.tocsr(), 1, 1),
        LinearConstraint(linked.tocsr(), -np.inf, 0),
        LinearConstraint(few.tocsr(), 0, problem.max_rules),
        LinearConstraint(mean, problem.lower, problem.upper),
    ]
    for i, (low, high) in held.items():
        row = np.zeros((1, total))
        row[0, :n] = flat[i]
        constraints.append(LinearConstraint(row, (low - _near(low)) / scale, (high + _near(high)) / scale))
    goal = np.zeros(total)
    goal[:n] = flat[objective]
    options = {"time_limit": time_limit, "mip_rel_gap": 1e-4}
    found = milp(goal, constraints=constraints, integrality=np.ones(total), bounds=Bounds(0, 1), options=options)
    if found.x is None:
        return None
    return torch.from_numpy(found.x[:n].reshape(layers, heads, rules).argmax(-1))


# Without scipy


def _lagrange(problem: Problem, objective: int, held: Held, rounds: int = 200) -> Tensor | None:
    """Bounds are priced into the losses, layers are then independent; prices move towards what is violated. Every layer's choices seen
    on the way, and those along a scale of prices, are its options; options of one or two layers are exchanged as long as it helps."""
    losses = problem.losses
    goal, even = losses[objective], problem.costs.mean(0)
    cheap = (goal.amax() - goal.amin()) / (even.amax() - even.amin()).clamp(min=1e-12)
    options = [_best_by_layer(goal + price * cheap * even, problem.max_rules) for price in _scale_of_prices()]
    options += [torch.full_like(options[0], rule) for rule in range(losses.shape[-1])]
    for i in held:
        options += [_best_by_layer(losses[i] + price * goal, problem.max_rules) for price in (0.0, 0.1, 0.5, 1, 2, 10)]
    options += _priced(problem, objective, held, rounds)
    per_layer = [_layer_options(problem, layer, options) for layer in range(losses.shape[1])]
    return _exchange(problem, objective, held, per_layer)


def _scale_of_prices() -> list[float]:
    return [0.0, *(10.0 ** (power / 4) for power in range(-12, 9))]


def _priced(problem: Problem, objective: int, held: Held, rounds: int) -> list[Tensor]:
    """The choices that subgradient steps on the prices of all bounds come by."""
    losses = problem.losses
    uses, rooms = [], []  # every bound as: sum over heads of use[h, c] <= room
    for cost in problem.costs:
        even = cost.expand(losses.shape[1:]) / (losses.shape[1] * losses.shape[2])
        uses += [even, -even]
        rooms += [problem.upper, -problem.lower]
    for i, (low, high) in held.items():
        size = max(float(losses[i].amax()), 1e-30)
        uses += [losses[i] / size, -losses[i] / size]
        rooms += [(high + _near(high)) / size, -(low - _near(low)) / size]
    use, room = torch.stack(uses), torch.tensor(rooms, dtype=losses.dtype)
    prices = torch.zeros(len(room), dtype=losses.dtype)
    step = float(losses[objective].amax()) * losses.shape[1] * losses.shape[2] or 1.0
    seen = []
    for number in range(rounds):
        choice = _best_by_layer(losses[objective] + torch.einsum("k,klhc->lhc", prices, use), problem.max_rules)
        seen.append(choice)
        spent = use.gather(-1, choice.expand(len(room), -1, -1)[..., None]).sum((1, 2, 3))
        prices = (prices + step / math.sqrt(1 + number) * (spent - room)).clamp(min=0)
    return seen


def _best_by_layer(priced: Tensor, max_rules: int) -> Tensor:
    """For each layer the at most `max_rules` candidates that serve its heads at the least sum: (layers, heads, C) -> (layers, heads)."""
    layers, heads, rules = priced.shape
    if max_rules >= min(heads, rules):
        return priced.argmin(-1)
    if max_rules == 1:
        return priced.sum(1).argmin(-1)[:, None].expand(layers, heads).clone()
    pairs = torch.minimum(priced[..., None], priced[..., None, :]).sum(1).flatten(1).argmin(-1)
    kept = torch.zeros(layers, rules, dtype=torch.bool)
    kept[torch.arange(layers), pairs // rules] = True
    kept[torch.arange(layers), pairs % rules] = True
    for _ in range(max_rules - 2):  # beyond two: the candidate that helps most, one after the other
        now = priced.masked_fill(~kept[:, None], float("inf")).amin(-1)
        gain = (now[..., None] - priced).clamp(min=0).sum(1)
        kept[torch.arange(layers), gain.argmax(-1)] = True
    return priced.masked_fill(~kept[:, None], float("inf")).argmin(-1)


_MOST_OPTIONS = 256


def _layer_options(problem: Problem, layer: int, choices: list[Tensor]) -> Tensor:
    """Different choices for one layer, (K, heads); all there are where they are few."""
    heads, rules = problem.losses.shape[2:]
    if rules**heads <= _MOST_OPTIONS:
        every = torch.cartesian_prod(*[torch.arange(rules)] * heads).view(-1, heads)
        ordered = every.sort(1).values
        return every[1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1) <= problem.max_rules]
    options = torch.stack([choice[layer] for choice in choices]).unique(dim=0)
    return options[torch.linspace(0, len(options) - 1, min(len(options), _MOST_OPTIONS)).long()]


def _exchange(problem: Problem, objective: int, held: Held, options: list[Tensor]) -> Tensor | None:
    """Least violation first, then least loss, by exchanging the options of one or two layers at a time."""
    losses, heads = problem.losses, problem.losses.shape[1] * problem.losses.shape[2]
    values = [
        losses[:, layer].gather(-1, kept.T.expand(len(losses), -1, -1)).sum(1).T for layer, kept in enumerate(options)
    ]
    costs = [problem.costs[:, kept].sum(-1).T / heads for kept in options]  # (K, S)
    lowest = torch.full((len(losses),), -math.inf, dtype=losses.dtype)
    highest = -lowest
    for i, (low, high) in held.items():
        lowest[i], highest[i] = low - _near(low), high + _near(high)
    size = losses.flatten(1).amax(1).clamp(min=1e-30)

    def worth(value: Tensor, cost: Tensor) -> Tensor:
        over = (cost - problem.upper - _SLACK).clamp(min=0) + (problem.lower - _SLACK - cost).clamp(min=0)
        off = ((value - highest).clamp(min=0) + (lowest - value).clamp(min=0)) / size
        return (over.sum(-1) + off.sum(-1)) * 1e9 + value[..., objective] / size[objective]

    layers = len(options)
    now = [int(torch.argmin((cost.mean(1) - problem.upper / layers).abs())) for cost in costs]
    value = torch.stack([values[layer][now[layer]] for layer in range(layers)]).sum(0)
    cost = torch.stack([costs[layer][now[layer]] for layer in range(layers)]).sum(0)
    best, improved = float(worth(value, cost)), True
    while improved:
        improved = False
        for one in range(layers):
            for two in range(one + 1, layers) if layers > 1 else [one]:
                rest = {one, two}
                less = [sum(part[k][now[k]] for k in rest) for part in (values, costs)]
                if one == two:
                    tried = [value - less[0] + values[one], cost - less[1] + costs[one]]
                else:
                    tried = [
                        whole - minus + part[one][:, None] + part[two][None]
                        for whole, minus, part in ((value, less[0], values), (cost, less[1], costs))
                    ]
                found = worth(*tried)
                at = int(found.argmin())
                if float(found.flatten()[at]) < best - 1e-12 * abs(best):
                    best, improved = float(found.flatten()[at]), True
                    value, cost = (part.flatten(0, -2)[at] for part in tried)
                    now[one] = at // found.shape[1] if one != two else at
                    if one != two:
                        now[two] = at % found.shape[1]
    choice = torch.stack([options[layer][now[layer]] for layer in range(layers)])
    return choice if problem.feasible(choice, held) else None
