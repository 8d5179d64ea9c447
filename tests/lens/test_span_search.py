"""The search for spans: its integer program against brute force, its bounds, and what the plans are good for."""

import itertools

import pytest
import torch

from regard.lens import span_plan, span_plans
from regard.lens.span_search import span_candidates, span_densities, span_losses
from regard.lens.span_solvers import Problem, solve


def small_problem(seed, rules=4, max_rules=2, objectives=1):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(2, rules, generator=generator, dtype=torch.float64).sort(1).values
    losses = torch.rand(objectives, 2, 3, rules, generator=generator, dtype=torch.float64).cumsum(-1).flip(-1)
    return Problem(losses, costs, 0.6, 0.3, max_rules)


def brute_force(problem, objective=0, held=None):
    _, layers, heads, rules = problem.losses.shape
    best = None
    for numbers in itertools.product(range(rules), repeat=layers * heads):
        choice = torch.tensor(numbers).view(layers, heads)
        if problem.feasible(choice, held or {}):
            value = float(problem.values(choice)[objective])
            best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("max_rules", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_solvers_against_brute_force(seed, max_rules):
    problem = small_problem(seed, max_rules=max_rules)
    best = brute_force(problem)
    exact, near = (solve(problem, 0, {}, name, 10.0) for name in ("milp", "lagrange"))
    if best is None:
        assert exact is None and near is None
        return
    assert problem.feasible(exact, {}) and problem.feasible(near, {})
    assert float(problem.values(exact)[0]) == pytest.approx(best, rel=1e-4)
    assert best <= float(problem.values(near)[0]) <= 1.1 * best


def test_other_objectives_are_held():
    problem = small_problem(2, objectives=2)
    alone = [solve(problem, i, {}, "milp", 10.0) for i in range(2)]
    low, high = sorted(float(problem.values(choice)[1]) for choice in alone)
    middle = (low, (low + high) / 2)
    for name in ("milp", "lagrange"):
        choice = solve(problem, 0, {1: middle}, name, 10.0)
        assert problem.feasible(choice, {1: middle})
        best = brute_force(problem, 0, {1: middle})
        assert best - 1e-9 <= float(problem.values(choice)[0]) <= best * (1.0001 if name == "milp" else 1.2)


def influences(lengths=(256, 512), layers=3, heads=4, block=32, seed=0):
    """Half the heads look near, the other half far."""
    out = {}
    for length in lengths:
        generator = torch.Generator().manual_seed(seed)
        size = length // block
        distance = (torch.arange(size)[:, None] - torch.arange(size)).clamp(min=0).float()
        near, far = (-distance).exp(), 0.5 + 0.5 * torch.rand(size, size, generator=generator)
        maps = torch.stack([far if head % 2 else near for head in range(heads)]).tril()
        out[length] = maps.expand(layers, -1, -1, -1) * (1 + torch.arange(layers).view(-1, 1, 1, 1))
    return out


OPTIONS = {"block": 32, "alpha_interval": 128, "num_betas": 5, "extend": (1024,)}


@pytest.mark.parametrize("solver", ["milp", "lagrange"])
def test_plans_keep_their_bounds_and_give_far_heads_more(solver):
    found = span_plans(influences(), 0.5, solver=solver, points=3, **OPTIONS)
    for one in found:
        assert all(0.45 - 1e-6 <= density <= 0.5 + 1e-6 for density in one.densities.values()), one.densities
        assert set(one.densities) == {256, 512, 1024} and set(one.losses) == {256, 512}
        assert all(len(set(rules)) <= 2 for rules in one.plan.layers)
    losses = [tuple(one.losses.values()) for one in found]
    assert not any(a != b and all(x <= y for x, y in zip(a, b)) for a in losses for b in losses)
    alphas, betas = found[0].plan.spans()
    span = alphas + betas * 512
    assert span[:, 1::2].mean() > span[:, ::2].mean() + 64


def test_a_plan_beats_a_uniform_span_of_the_same_density():
    profile = influences()
    best = span_plans(profile, 0.5, points=2, **OPTIONS)[0]
    uniform = {
        n: span_losses(t, torch.tensor([-32.0]), torch.tensor([0.5]), 32).sum().item() for n, t in profile.items()
    }  # with its sinks half
    assert all(best.losses[n] < uniform[n] for n in uniform)


def test_validation_chooses_among_the_plans():
    profile = influences()
    found = span_plans(profile, 0.5, points=3, **OPTIONS)
    assert span_plan(profile, 0.5, points=3, **OPTIONS) == found[0].plan
    wanted = found[-1].plan
    assert span_plan(profile, 0.5, points=3, validate=lambda plan: plan != wanted, **OPTIONS) == wanted


def test_grouped_queries_take_the_maximum_of_their_own_group():
    profile = {256: torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5}
    plan = span_plan(profile, 0.5, num_kv_heads=2, block=32, alpha_interval=64, num_betas=5)
    assert all(len(rules) == 2 for rules in plan.layers)
    by_hand = {256: torch.stack([profile[256][:, i : i + 2].abs().amax(1) for i in (0, 2)], 1)}
    assert plan == span_plan(by_hand, 0.5, block=32, alpha_interval=64, num_betas=5)


def test_candidates_and_their_cost():
    alphas, betas = span_candidates([256, 512], [1024], alpha_interval=128, num_betas=5)
    spans = alphas + betas * 1024
    assert (spans[1:] >= spans[:-1]).all() and (spans <= 1024).all() and (alphas + betas * 256 > 0).all()
    blocks = 16
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)
    for alpha, beta, density in zip(alphas, betas, span_densities(alphas, betas, 512, 32)):
        band = max(1, int(alpha // 32 + beta * blocks))
        kept = ((i - j < band) | (j == 0)) & (j <= i)
        assert float(density) == float(kept.sum(-1).max()) / blocks
        ones = torch.ones(1, blocks, blocks)
        assert float(span_losses(ones, alpha[None], beta[None], 32)) == float((~kept & (j <= i)).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density: got 0.0"),
        ({"density": 0.01}, "density: got 0.01, need a density that candidates can meet"),
        ({"lower": 1.5}, "lower: got 1.5"),
        ({"max_rules": 0}, "max_rules: got 0"),
        ({"points": 1}, "points: got 1"),
        ({"solver": "gurobi"}, "solver: unknown name 'gurobi'"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3, need a divisor of 4 heads"),
        ({"block": 16}, "influence: got"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        span_plans(influences(), **({"density": 0.5} | OPTIONS | options))
