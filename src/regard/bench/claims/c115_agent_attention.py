"""115 agent attention: with a fixed number of agents time grows linearly with the image."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...ops.agent import agent_attention
from ...ops.attention import attention
from .claim import Outcome, Scale
from .timing import slope, times

PAPER, SLUG = "115", "agent-attention"
SAYS = (
    "Agent attention: with a fixed number of agents the cost grows linearly with the number of tokens, where softmax attention's "
    "is quadratic."
)


def measure(scale: Scale) -> Outcome:
    sides, heads, dim, pool = scale.pick((56, 84, 112), (14, 28)), scale.pick(6, 2), 32, 7
    out = Outcome(
        f"{pool * pool} agents, {heads} heads of {dim}, grids of {', '.join(f'{n} x {n}' for n in sides)}",
        "a round of timing",
    )
    things = {}
    for side in sides:
        q, k, v = torch.randn(3, 1, heads, side * side, dim, generator=torch.Generator().manual_seed(side))
        things[f"softmax (SDPA), {side} x {side}"] = partial(attention, q, k, v)
        things[f"agents, {side} x {side}"] = partial(_agents, q, k, v, side, pool)
    found = times(things, rounds=scale.pick(4, 2), inner=scale.pick(2, 1))
    for side in sides:
        base = f"softmax (SDPA), {side} x {side}"
        out.add(base, "time", "s", found[base])
        out.add(f"agents, {side} x {side}", "time", "s", found[f"agents, {side} x {side}"], against=base)
    tokens = [side * side for side in sides]
    agents = slope(tokens, [min(found[f"agents, {side} x {side}"]) for side in sides])
    dense = slope(tokens, [min(found[f"softmax (SDPA), {side} x {side}"]) for side in sides])
    out.check("exponent of agent attention's time in the number of tokens", agents, at_most=1.2)
    out.check("exponent of softmax attention's", dense, at_least=1.7)
    for side in sides[1:]:
        row = out.row(f"agents, {side} x {side}", "time")
        out.check(
            f"time over softmax attention's at {side} x {side}",
            row.ratio or float("nan"),
            at_most=0.5,
            spread=row.spread,
        )
    return out


def _agents(q: Tensor, k: Tensor, v: Tensor, side: int, pool: int) -> Tensor:
    """With agents as the module makes them: queries pooled over the image."""
    agents = torch.nn.functional.adaptive_avg_pool2d(q[0].transpose(1, 2).unflatten(-1, (side, side)), pool)
    return agent_attention(q, k, v, agents.flatten(2).transpose(1, 2)[None])
