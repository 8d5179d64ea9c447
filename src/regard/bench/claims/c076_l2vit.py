"""076 L2ViT: linear attention spreads where softmax concentrates; local concentration and a floored denominator make up for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...nn.spatial.l2vit_blocks import LocalConcentration, ReluLinearAttention
from ...nn.spatial.window_attention import WindowSoftmaxAttention
from ...ops.attention import attention
from ...ops.state.global_linear import global_linear_attention, global_linear_weights, ratio
from .claim import Outcome, Scale
from .glyphs import SIDE, accuracy
from .timing import slope, times

PAPER, SLUG = "076", "l2vit"
SAYS = (
    "L2ViT: relu linear attention spreads its weights more evenly than softmax attention; a local concentration module after it makes "
    "up for that, so that accuracy rises with it, at a cost linear in the number of tokens."
)
TOP = "weight on a query's five keys of most weight"


class _OnMap(nn.Module):
    """Attention of tokens on maps, with the concentration module after it where asked for."""

    def __init__(self, dim: int, kind: str, concentrate: bool = False) -> None:
        super().__init__()
        self.attn: nn.Module
        if kind == "softmax":
            self.attn = WindowSoftmaxAttention(dim, 2, SIDE, relative_bias=False)
        else:
            self.attn = ReluLinearAttention(dim, 2, floor=100.0 if kind == "floor" else None)
        self.norm = nn.LayerNorm(dim) if concentrate else None
        self.local = LocalConcentration(dim) if concentrate else None

    def forward(self, x: Tensor) -> Tensor:
        grid, tokens = (x.shape[2], x.shape[3]), x.flatten(2).transpose(1, 2)
        mixed = self.attn(tokens)
        if self.local is not None and self.norm is not None:  # the block's own order: attention is added first
            mixed = mixed + self.local(self.norm(tokens + mixed), grid)
        return mixed.transpose(1, 2).unflatten(2, grid)


def measure(scale: Scale) -> Outcome:
    steps, seeds, sides = scale.pick(300, 3), scale.pick((0, 1), (0,)), scale.pick((28, 56, 84), (8, 16))
    out = Outcome(
        "random features of 196 tokens; a retrieval task on rendered glyphs, 2 blocks of 48 channels, "
        f"{steps} steps; times at {', '.join(f'{n} x {n}' for n in sides)}",
        "a draw, a seed or a round",
    )
    tops: dict[str, list[float]] = {"softmax": [], "relu linear": []}
    for seed in range(scale.pick(5, 1)):
        q, k = 2 * torch.randn(2, 1, 4, 196, 32, generator=torch.Generator().manual_seed(seed))
        made = {
            "softmax": (q @ k.mT * 32**-0.5).softmax(-1),
            "relu linear": global_linear_weights(q, k, normaliser=ratio(floor=1e-6), feature_map="relu", scale=1.0),
        }
        for name, weights in made.items():
            tops[name].append(float(weights.topk(5, dim=-1).values.sum(-1).mean()))
    for name, values in tops.items():
        out.add(name, TOP, "", values, against="softmax" if name != "softmax" else None)
    out.check(
        "weight on the top five keys, relu linear over softmax", out.row("relu linear", TOP).ratio or 1.0, at_most=0.5
    )

    kinds: dict[str, Callable[[int], nn.Module]] = {
        "linear, floor of 100": partial(_OnMap, kind="floor"),
        "linear, no floor": partial(_OnMap, kind="no floor"),
        "linear, floor of 100, concentration": partial(_OnMap, kind="floor", concentrate=True),
        "softmax": partial(_OnMap, kind="softmax"),
    }
    for name, make in kinds.items():
        found = [accuracy(make, steps, seed)[0] for seed in seeds]
        out.add(
            name, "right answers", "", found, against=None if name == "linear, floor of 100" else "linear, floor of 100"
        )
    right = {name: out.row(name, "right answers").mean for name in kinds}
    lead = right["linear, floor of 100, concentration"] - right["linear, floor of 100"]
    out.check("share of right answers, lead of concentration over none", lead, at_least=0.0)
    lead = right["linear, floor of 100"] - right["linear, no floor"]
    out.check("lead of the floor over none", lead, at_least=0.0)

    things = {}
    for side in sides:
        q, k, v = torch.randn(3, 1, 6, side * side, 32, generator=torch.Generator().manual_seed(side))
        things[f"softmax (SDPA), {side} x {side}"] = partial(attention, q, k, v)
        things[f"relu linear, {side} x {side}"] = partial(
            global_linear_attention, q, k, v, normaliser=ratio(floor=100.0), feature_map="relu", scale=1.0
        )
    seconds = times(things, rounds=scale.pick(4, 2), inner=scale.pick(2, 1))
    for side in sides:
        base = f"softmax (SDPA), {side} x {side}"
        out.add(base, "time", "s", seconds[base])
        out.add(f"relu linear, {side} x {side}", "time", "s", seconds[f"relu linear, {side} x {side}"], against=base)
    grown = slope([side * side for side in sides], [min(seconds[f"relu linear, {side} x {side}"]) for side in sides])
    out.check("exponent of relu linear attention's time in the number of tokens", grown, at_most=1.2)
    return out
