"""MoA's search: which span rule each head gets, so that little influence is dropped at a given density.

Fu et al. 2024 (arXiv 2406.14909). Numbers from thu-nics/MoA @ e224fe3 (MIT), `elastic_block_sparse.py` and `elastic_generate.py`;
their optimiser needs Gurobi, here it is HiGHS through scipy (`solver="milp"`) or a Lagrangian search of our own ("lagrange").

A candidate is a rule alpha + beta * N. At length N, in blocks of `block` tokens, it keeps the first column of blocks and a band of
floor(alpha // block + beta * N / block) blocks, own block included; its loss is the absolute influence of the blocks that it drops,
its density the most blocks that a row keeps, of all. One candidate a head, at most `max_rules` different ones a layer, mean density
within bounds at every length. Several lengths are several objectives: the plans that no other beats at all lengths are kept.

Differs: with `num_kv_heads`, influence is the maximum over the query heads that really share a kv head (the released reshape takes
heads with equal rest instead). Without it every query head has a rule of its own, as the authors' conversion to full heads has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from ..methods.plans import HeadPlan
from .span_solvers import SOLVERS, Problem, solve

__all__ = ["FoundPlan", "span_candidates", "span_densities", "span_losses", "span_plan", "span_plans"]


@dataclass(frozen=True)
class FoundPlan:
    """One plan of the search. `losses`: length -> influence dropped, summed over heads. `densities`: length -> mean density."""

    plan: HeadPlan
    losses: dict[int, float]
    densities: dict[int, float]


def span_candidates(
    lengths: Sequence[int], extend: Sequence[int] = (), *, alpha_interval: int = 1024, num_betas: int = 9
) -> tuple[Tensor, Tensor]:
    """The rules to choose from: (alphas, betas), each (C,) float32, by growing span at the longest length.

    Args:
        lengths: profiled lengths. extend: further lengths that the plan is to hold at.
        alpha_interval: tokens between alphas, which run from -(least length) to the longest profiled one. num_betas: betas, from 0 to 1.
    """
    require(len(lengths) > 0, "lengths", list(lengths), "at least one")
    require_int("alpha_interval", alpha_interval, 1)
    require_int("num_betas", num_betas, 1)
    profiled, longest, least = max(lengths), max(*lengths, *extend, 0), min([*lengths, *extend])
    alphas = torch.linspace(-least, profiled, (profiled + least) // alpha_interval + 1)
    alpha, beta = (t.reshape(-1) for t in torch.meshgrid(alphas, torch.linspace(0.0, 1.0, num_betas), indexing="ij"))
    fits = (alpha + beta * profiled <= profiled) & (alpha + beta * longest <= longest) & (alpha + beta * least > 0)
    alpha, beta = alpha[fits], beta[fits]
    order = torch.sort(alpha + beta * longest, stable=True).indices
    return alpha[order], beta[order]


def _band(alphas: Tensor, betas: Tensor, blocks: int, block: int) -> Tensor:
    """Blocks of the band of each candidate, own block included, at a length of `blocks` blocks: int64 (C,), at least 1."""
    wide = torch.div(alphas.double(), block, rounding_mode="floor") + betas.double() * blocks
    return wide.trunc().long().clamp(min=1)


def span_losses(influence: Tensor, alphas: Tensor, betas: Tensor, block: int = 64) -> Tensor:
    """Absolute influence that each candidate drops: influence (..., nb, nb) of blocks -> (..., C)."""
    blocks = influence.shape[-1]
    size = influence.abs().tril()
    size = torch.cat([torch.zeros_like(size[..., :1]), size[..., 1:]], dim=-1)  # the first column is always kept
    far = torch.stack([size.diagonal(-d, -2, -1).sum(-1) for d in range(blocks)], dim=-1)  # by distance in blocks
    beyond = torch.cat([far.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(far[..., :1])], dim=-1)
    return beyond[..., _band(alphas, betas, blocks, block).clamp(max=blocks)]


def span_densities(alphas: Tensor, betas: Tensor, length: int, block: int = 64) -> Tensor:
    """The most blocks that a row of each candidate keeps, of all blocks: (C,) float64."""
    blocks = length // block
    band = _band(alphas, betas, blocks, block).clamp(max=blocks)
    return (band + (band < blocks).long()).double() / blocks


def span_plans(
    influence: Mapping[int, Tensor],
    density: float = 0.5,
    *,
    extend: Sequence[int] = (),
    num_kv_heads: int | None = None,
    max_rules: int = 2,
    block: int = 64,
    alpha_interval: int = 1024,
    num_betas: int = 9,
    lower: float = 0.9,
    points: int = 5,
    solver: str = "auto",
    time_limit: float = 10.0,
) -> list[FoundPlan]:
    """All plans found that no other one beats at every length, least total loss first.

    Args:
        influence: length -> (layers, H, nb, nb) from `attention_influence`; lengths are whole blocks.
        density: bound on the mean density at every profiled and extended length. lower: the least share of it to be used.
        extend: lengths beyond the profiled ones at which the density has to hold too (the paper: 16384).
        num_kv_heads: one rule a kv head, for models with grouped queries; None: one a query head.
        max_rules: different rules in a layer, at most. block: tokens a block. alpha_interval, num_betas: see `span_candidates`.
        points: with several lengths, each other length's loss is held to one of `points - 1` ranges in turn: with three lengths and
            the default, as the authors have it, that is 48 programs to solve.
        solver: "milp" (scipy's HiGHS), "lagrange" (no dependency; near the optimum), "auto": milp where scipy is installed.
        time_limit: seconds for one solution by "milp"; the best found by then counts.

    Raises `ValueError` when no choice of candidates meets the density at all lengths.
    """
    require(0.0 < density <= 1.0, "density", density, "a share in (0, 1]")
    require(0.0 <= lower <= 1.0, "lower", lower, "a share in [0, 1]")
    require_int("max_rules", max_rules, 1)
    require_int("points", points, 2)
    require_name("solver", solver, SOLVERS)
    lengths = sorted(influence)
    profiles = [_per_rule(length, influence[length], block, num_kv_heads) for length in lengths]
    layers, heads = profiles[0].shape[:2]
    require(all(p.shape[:2] == (layers, heads) for p in profiles), "influence", "other layers or heads", "equal ones")
    alphas, betas = span_candidates(lengths, extend, alpha_interval=alpha_interval, num_betas=num_betas)
    require(len(alphas) > 0, "alpha_interval", alpha_interval, "one that leaves candidates at these lengths")
    losses = torch.stack([span_losses(p.double(), alphas, betas, block) for p in profiles])  # (T, layers, heads, C)
    bounded = [*lengths, *(length for length in extend if length not in lengths)]
    costs = torch.stack([span_densities(alphas, betas, length, block) for length in bounded])
    problem = Problem(losses, costs, density, lower * density, max_rules)
    chosen = _sweep(problem, points, solver, time_limit)
    found = []
    for choice in chosen:
        plan = HeadPlan.from_spans(
            alphas.double()[choice], betas.double()[choice], block=block, sink=block, minimum=2 * block
        )
        by_length = losses.gather(-1, choice.expand(len(lengths), -1, -1)[..., None])[..., 0].sum((1, 2))
        density_at = costs[:, choice].mean((1, 2))
        found.append(FoundPlan(plan, dict(zip(lengths, by_length.tolist())), dict(zip(bounded, density_at.tolist()))))
    return sorted(_unbeaten(found), key=lambda one: sum(one.losses.values()))


def span_plan(
    influence: Mapping[int, Tensor],
    density: float = 0.5,
    *,
    validate: Callable[[HeadPlan], float] | None = None,
    **options: object,
) -> HeadPlan:
    """The best of `span_plans`: least `validate(plan)` (the paper: loss at a length that was not profiled), else least total loss.

    Other arguments: see `span_plans`. The plan's rules have `sink` = one block and a minimum of two, as the authors' caches do.
    """
    found = span_plans(influence, density, **options)  # type: ignore[arg-type]
    if validate is None:
        return found[0].plan
    return min((one.plan for one in found), key=validate)


def _per_rule(length: int, influence: Tensor, block: int, num_kv_heads: int | None) -> Tensor:
    require_tensor("influence", influence, dims=4, floating=True)
    heads, rows, columns = influence.shape[1:]
    need = f"(layers, heads, {length // block}, {length // block}), blocks of {block} tokens"
    require(rows == columns == length // block > 0, "influence", f"shape {tuple(influence.shape)} at {length}", need)
    if num_kv_heads is None:
        return influence.abs()
    require_int("num_kv_heads", num_kv_heads, 1)
    require(heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"a divisor of {heads} heads")
    return influence.abs().unflatten(1, (num_kv_heads, -1)).amax(2)


def _sweep(problem: Problem, points: int, solver: str, time_limit: float) -> list[Tensor]:
    """Solutions for each objective alone, and for each with the others held to ranges between their extremes."""
    objectives = problem.losses.shape[0]
    alone = [solve(problem, i, {}, solver, time_limit) for i in range(objectives)]
    if any(choice is None for choice in alone):
        least, most = problem.reach()
        raise bad_value("density", problem.upper, f"a density that candidates can meet: they reach {least} to {most}")
    choices = [choice for choice in alone if choice is not None]
    if objectives == 1:
        return choices
    together = solve(replace(problem, losses=problem.losses.sum(0, keepdim=True)), 0, {}, solver, time_limit)
    if together is not None:  # not among the authors' objectives; it is what the default choice asks for
        choices.append(together)
    values = torch.stack([problem.values(choice) for choice in choices])
    marks = [torch.linspace(float(values[:, i].min()), float(values[:, i].max()), points) for i in range(objectives)]
    for i in range(objectives):
        others = [j for j in range(objectives) if j != i]
        for ranges in product(range(points - 1), repeat=len(others)):
            held = {j: (float(marks[j][r]), float(marks[j][r + 1])) for j, r in zip(others, ranges)}
            choice = solve(problem, i, held, solver, time_limit)
            if choice is not None:
                choices.append(choice)
    return choices


def _unbeaten(found: list[FoundPlan]) -> list[FoundPlan]:
    distinct = list({one.plan: one for one in found}.values())

    def beaten(one: FoundPlan) -> bool:
        mine = list(one.losses.values())
        return any(
            all(a <= b for a, b in zip(other.losses.values(), mine)) and list(other.losses.values()) != mine
            for other in distinct
        )

    return [one for one in distinct if not beaten(one)]
