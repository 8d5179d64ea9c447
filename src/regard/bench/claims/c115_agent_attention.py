"""115 agent attention: with a fixed number of agents time grows linearly with the image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...integrations.agent_diffusion import AgentDiffusion
from ...ops.agent import agent_attention
from ...ops.attention import attention
from .claim import Outcome, Scale
from .timing import slope, times

PAPER, SLUG = "115", "agent-attention"
SAYS = (
    "Agent attention: with a fixed number of agents the cost grows linearly with the number of tokens, where softmax attention's "
    "is quadratic; put into a diffusion model with merged tokens, it is faster than merging alone."
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
    _diffusion(out, scale)
    return out


def _diffusion(out: Outcome, scale: Scale) -> None:
    """A U-Net of Stable Diffusion's kind with random weights: as it is, with tokens merged, and with agents at the same ratio."""
    from diffusers import UNet2DConditionModel

    side, width = scale.pick((64, 64), (16, 16))
    torch.manual_seed(0)
    ends = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet: Any = UNet2DConditionModel(
        sample_size=side, layers_per_block=1, block_out_channels=(width, width), norm_num_groups=8, down_block_types=ends[0],
        up_block_types=ends[1], cross_attention_dim=32, attention_head_dim=8, mid_block_type=None,
    )  # fmt: skip
    unet.eval()
    given = torch.randn(2, 4, side, side), 10, torch.randn(2, 8, 32)

    def run(ratio: float | None, agents: float | None) -> Tensor:
        if ratio is None:
            return unet(*given).sample
        with AgentDiffusion(unet, ratio, agents, (4, 4), random=False):
            return unet(*given).sample

    figure, base, drift = f"time of a forward, {side} x {side} latents", "U-Net", "distance from the U-Net's output"
    ways = {base: (None, None), "40 % of the tokens merged": (0.4, None), "and 5 % as agents": (0.4, 0.95)}
    found = times(
        {name: partial(run, *way) for name, way in ways.items()}, rounds=scale.pick(3, 1), inner=scale.pick(2, 1)
    )
    with torch.no_grad():
        made = {name: run(*way) for name, way in ways.items()}
    for name in ways:
        out.add(name, figure, "s", found[name], against=None if name == base else base)
        out.add(name, drift, "share of its norm", float((made[name] - made[base]).norm() / made[base].norm()))
    merged, agents = (out.row(name, figure) for name in list(ways)[1:])
    lead = [one / other for one, other in zip(agents.values, merged.values)]
    half = (max(lead) - min(lead)) / 2
    out.check(
        "U-Net with merging and agents: time over that of merging alone",
        sum(lead) / len(lead),
        at_most=1.0,
        spread=half,
    )
    out.check("over that of the U-Net", agents.ratio or float("nan"), at_most=1.0, spread=agents.spread)


def _agents(q: Tensor, k: Tensor, v: Tensor, side: int, pool: int) -> Tensor:
    """With agents as the module makes them: queries pooled over the image."""
    agents = torch.nn.functional.adaptive_avg_pool2d(q[0].transpose(1, 2).unflatten(-1, (side, side)), pool)
    return agent_attention(q, k, v, agents.flatten(2).transpose(1, 2)[None])
