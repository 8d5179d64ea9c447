"""084 MALA: weights that sharpen as the query grows, as softmax's do, where a ratio's cannot; better at equal size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...nn.spatial.magnitude_attention import MagnitudeAwareAttention
from ...ops.attention import attention
from ...ops.state.global_linear import global_linear_attention, global_linear_weights
from .claim import Outcome, Scale
from .glyphs import accuracy
from .timing import slope, times

PAPER, SLUG = "084", "mala"
SAYS = (
    "MALA: normalised linear attention forgets how large a query is; with the magnitude kept, weights become more uneven as the "
    "query grows, as softmax's do, and vision models are better at linear cost."
)
FACTORS = (1.0, 2.0, 4.0, 8.0)
SPREAD = "spread of a row's weights over their mean"


class _Ratio(MagnitudeAwareAttention):
    """The same layer with the plain ratio of sums in place of the affine rule."""

    def forward(self, x: Tensor) -> Tensor:
        projected = self.qkvo(x)
        q, k, v = self._heads(projected)
        out = global_linear_attention(q, k, v, normaliser="ratio", feature_map="elu+1", rotate=self._turn(x))
        out = out.transpose(2, 3).flatten(1, 2).unflatten(2, tuple(x.shape[2:]))
        local = self.lepe(projected[:, 2 * self.dim : 3 * self.dim])
        return self.proj((out + local) * projected[:, 3 * self.dim :])


def measure(scale: Scale) -> Outcome:
    steps, seeds = scale.pick(300, 3), scale.pick((0, 1), (0,))
    sides = scale.pick((28, 56, 84), (8, 16))
    out = Outcome(
        "random features of 196 tokens with queries 1 to 8 times as large; a retrieval task on rendered glyphs, 2 blocks of "
        f"48 channels, {steps} steps; "
        f"times at {', '.join(f'{n} x {n}' for n in sides)}",
        "a draw, a seed or a round",
    )
    spreads: dict[tuple[str, float], list[float]] = {}
    for seed in range(scale.pick(5, 1)):
        q, k = torch.randn(2, 1, 4, 196, 32, generator=torch.Generator().manual_seed(seed))
        features = torch.nn.functional.elu(q) + 1
        for factor in FACTORS:
            bigger = factor * features
            keys = torch.nn.functional.elu(k) + 1
            made = {
                "softmax": (factor * q @ k.mT * 32**-0.5).softmax(-1),
                "ratio": global_linear_weights(bigger, keys, normaliser="ratio"),
                "MALA": global_linear_weights(bigger, keys, normaliser="magnitude"),
            }
            for name, weights in made.items():
                spreads.setdefault((name, factor), []).append(float((weights.std(-1) * 196).mean()))
    for (name, factor), values in spreads.items():
        base = f"{name}, query x 1"
        out.add(f"{name}, query x {factor:g}", SPREAD, "", values, against=base if factor != 1.0 else None)
    last = f"query x {FACTORS[-1]:g}"
    for name in ("softmax", "MALA", "ratio"):
        grown_by = out.row(f"{name}, {last}", SPREAD).ratio or 0.0
        what = f"spread of {name}'s weights with queries {FACTORS[-1]:g} times as large, over that at 1"
        if name == "ratio":
            out.check(what, grown_by, at_most=1.01)
        else:
            out.check(what, grown_by, at_least=1.5)

    makers: dict[str, Callable[[int], nn.Module]] = {
        "ratio": partial(_Ratio, num_heads=2),
        "MALA": partial(MagnitudeAwareAttention, num_heads=2),
        "softmax": partial(MagnitudeAwareAttention, num_heads=2, linear=False),
    }
    for name, make in makers.items():
        found = [accuracy(make, steps, seed)[0] for seed in seeds]
        out.add(f"layer: {name}", "right answers", "", found, against="layer: ratio" if name != "ratio" else None)
    lead = out.row("layer: MALA", "right answers").mean - out.row("layer: ratio", "right answers").mean
    out.check("share of right answers, lead of MALA over the ratio in the same layer", lead, at_least=0.0)

    things = {}
    for side in sides:
        q, k, v = torch.randn(3, 1, 6, side * side, 32, generator=torch.Generator().manual_seed(side))
        things[f"softmax (SDPA), {side} x {side}"] = partial(attention, q, k, v)
        things[f"MALA, {side} x {side}"] = partial(
            global_linear_attention, q, k, v, normaliser="magnitude", feature_map="elu+1"
        )
    found_times = times(things, rounds=scale.pick(4, 2), inner=scale.pick(2, 1))
    for side in sides:
        base = f"softmax (SDPA), {side} x {side}"
        out.add(base, "time", "s", found_times[base])
        out.add(f"MALA, {side} x {side}", "time", "s", found_times[f"MALA, {side} x {side}"], against=base)
    grown = slope([side * side for side in sides], [min(found_times[f"MALA, {side} x {side}"]) for side in sides])
    out.check("exponent of MALA's time in the number of tokens", grown, at_most=1.2)
    return out
