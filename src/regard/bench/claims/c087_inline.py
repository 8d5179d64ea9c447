"""087 InLine: a ratio of sums gives different queries the same weights, subtraction does not; local modelling helps; linear time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...nn.spatial.inline_attention import InLineAttention
from ...ops.attention import attention
from ...ops.state.global_linear import global_linear_attention, global_linear_weights, ratio
from .claim import Outcome, Scale
from .glyphs import SIDE, accuracy
from .timing import slope, times

PAPER, SLUG = "087", "inline"
SAYS = (
    "InLine: normalised linear attention is not injective, so it confuses queries; subtracting the mean in place of dividing makes it "
    "injective, and with local modelling linear attention does better than softmax attention at linear cost."
)
CONFUSED = "pairs of queries with nearly equal weights"


class _OnMap(nn.Module):
    """A mixer of tokens on maps; `rule` in place of the subtraction."""

    def __init__(self, dim: int, residual: bool, rule: str) -> None:
        super().__init__()
        self.layer, self.rule = InLineAttention(dim, 2, SIDE, residual=residual, feature_map="relu"), rule

    def forward(self, x: Tensor) -> Tensor:
        grid, tokens = (x.shape[2], x.shape[3]), x.flatten(2).transpose(1, 2)
        if self.rule == "subtract":
            mixed = self.layer(tokens, grid)
        else:
            q, k, v = (self.layer._heads(part) for part in self.layer.qkv(tokens).chunk(3, dim=-1))
            if self.rule == "softmax":
                out = attention(q, k, v)
            else:
                out = global_linear_attention(q, k, v, normaliser=ratio(eps=1e-6), feature_map="relu", scale=1.0)
            mixed = self.layer.proj(out.transpose(1, 2).flatten(2))
        return mixed.transpose(1, 2).unflatten(2, grid)


def measure(scale: Scale) -> Outcome:
    steps, seeds, sides = scale.pick(300, 3), scale.pick((0, 1), (0,)), scale.pick((28, 56, 84), (8, 16))
    out = Outcome(
        "1024 queries in 2 dimensions through a relu map; a retrieval task on rendered glyphs, 2 blocks of 48 channels, "
        f"{steps} steps; times at {', '.join(f'{n} x {n}' for n in sides)}",
        "a draw, a seed or a round",
    )
    counts: dict[str, list[float]] = {"ratio": [], "InLine": [], "softmax": []}
    for seed in range(scale.pick(5, 1)):
        q, k = torch.randn(2, 1, 1, 1024, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        q, k = q.abs(), k.abs()  # the relu map kept whole: no query is zero
        counts["ratio"].append(_confused(global_linear_weights(q, k, normaliser=ratio())))
        counts["InLine"].append(_confused(global_linear_weights(q, k, normaliser="subtract")))
        counts["softmax"].append(_confused((q @ k.mT * 2**-0.5).softmax(-1)))
    for name, values in counts.items():
        out.add(name, CONFUSED, "pairs", values, against="ratio" if name != "ratio" else None)
    share = out.row("InLine", CONFUSED).mean / max(out.row("ratio", CONFUSED).mean, 1e-9)
    out.check("confused pairs of queries, InLine's over the ratio's", share, at_most=0.5)

    kinds: dict[str, Callable[[int], nn.Module]] = {
        "ratio": partial(_OnMap, residual=False, rule="ratio"),
        "InLine without the residual": partial(_OnMap, residual=False, rule="subtract"),
        "InLine": partial(_OnMap, residual=True, rule="subtract"),
        "softmax": partial(_OnMap, residual=False, rule="softmax"),
    }
    for name, make in kinds.items():
        found = [accuracy(make, steps, seed)[0] for seed in seeds]
        base = "layer: ratio" if name != "ratio" else None
        out.add(f"layer: {name}", "right answers", "", found, against=base)
    right = {name: out.row(f"layer: {name}", "right answers").mean for name in kinds}
    lead = right["InLine without the residual"] - right["ratio"]
    out.check("share of right answers, lead of subtraction over the ratio", lead, at_least=0.0)
    lead = right["InLine"] - right["InLine without the residual"]
    out.check("lead of the local residual over none", lead, at_least=0.0)
    out.check("lead of InLine over softmax attention", right["InLine"] - right["softmax"], at_least=0.0)

    things = {}
    for side in sides:
        q, k, v = torch.randn(3, 1, 6, side * side, 32, generator=torch.Generator().manual_seed(side))
        things[f"softmax (SDPA), {side} x {side}"] = partial(attention, q, k, v)
        things[f"InLine, {side} x {side}"] = partial(global_linear_attention, q, k, v, normaliser="subtract")
    seconds = times(things, rounds=scale.pick(4, 2), inner=scale.pick(2, 1))
    for side in sides:
        base = f"softmax (SDPA), {side} x {side}"
        out.add(base, "time", "s", seconds[base])
        out.add(f"InLine, {side} x {side}", "time", "s", seconds[f"InLine, {side} x {side}"], against=base)
    grown = slope([side * side for side in sides], [min(seconds[f"InLine, {side} x {side}"]) for side in sides])
    out.check("exponent of InLine's time in the number of tokens", grown, at_most=1.2)
    return out


def _confused(weights: Tensor, near: float = 1e-3) -> float:
    """Pairs of rows closer than `near` of the mean size of a row."""
    rows = weights[0, 0]
    distance = torch.cdist(rows, rows)
    close = distance < near * rows.norm(dim=-1).mean()
    return float((close.sum() - len(rows)) / 2)
