"""026 Faster Neighborhood Attention: tiled, it beats the masked matrix and one gather a query; cost follows the window, not the map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import masks
from ...ops.neighborhood import neighborhood_attention
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "026", "faster-neighborhood-attention"
SAYS = (
    "Faster Neighborhood Attention: fused N-D tiles run neighborhood attention several times faster than the naive kernels before them "
    "(2-D, half precision: on average 11 times), and its cost grows with the window instead of the square of the tokens."
)
TILED, MASKED, GATHERED = "neighborhood_attention (tiles)", "masked dense SDPA", "a gather for every query"


def measure(scale: Scale) -> Outcome:
    side, kernel, heads, dim = scale.pick((64, 13, 8, 64), (12, 5, 2, 8))
    out = Outcome(
        f"{side}x{side} tokens, window {kernel}x{kernel}, {heads} heads, head_dim {dim}, float32", "a round of timing"
    )
    q, k, v = torch.randn(3, 1, side, side, heads, dim, generator=torch.Generator().manual_seed(0))
    matrix = masks.neighborhood((side, side), kernel).materialize(side**2, side**2)
    ways: dict[str, Callable[..., Tensor]] = {
        MASKED: partial(_masked, matrix=matrix),
        GATHERED: partial(_gathered, matrix=matrix, keys=kernel**2),
        TILED: partial(_tiled, kernel=kernel),
    }
    things = {(name, "forward"): partial(way, q, k, v) for name, way in ways.items()}
    things |= {(name, "forward and backward"): partial(_both, ways[name], q, k, v) for name in (MASKED, TILED)}
    labels = {f"{name}, {what}": thing for (name, what), thing in things.items()}
    found = times(labels, rounds=scale.pick(4, 2), inner=1)
    for name, what in things:
        out.add(name, f"time, {what}", "s", found[f"{name}, {what}"], against=None if name == MASKED else MASKED)
    for what, least in (("forward", 5.0), ("forward and backward", 3.0)):
        _faster(out, found, MASKED, what, least)
    _faster(out, found, GATHERED, "forward", 2.0)
    _growth(out, scale, kernel, heads, dim)
    return out


def _faster(out: Outcome, found: dict[str, list[float]], other: str, what: str, least: float) -> None:
    ratios = [a / b for a, b in zip(found[f"{other}, {what}"], found[f"{TILED}, {what}"])]
    spread = (max(ratios) - min(ratios)) / 2
    out.check(f"times faster than {other}, {what}", sum(ratios) / len(ratios), at_least=least, spread=spread, digits=1)


def _growth(out: Outcome, scale: Scale, kernel: int, heads: int, dim: int) -> None:
    """Time per token on larger and larger maps, with one window."""
    sides = scale.pick((32, 64, 128), (12, 16, 24))
    inputs = {side: torch.randn(3, 1, side, side, heads, dim) for side in sides}
    found = times(
        {str(side): partial(_tiled, *inputs[side], kernel=kernel) for side in sides},
        rounds=scale.pick(3, 2),
        inner=scale.pick(2, 1),
    )
    for side in sides:
        base = None if side == sides[0] else f"{TILED}, {sides[0]}x{sides[0]}"
        out.add(f"{TILED}, {side}x{side}", "time per token", "s", [t / side**2 for t in found[str(side)]], against=base)
    last = out.rows[-1]
    out.check(
        f"time per token on {(sides[-1] // sides[0]) ** 2} times the tokens, of the smallest map",
        last.ratio or float("nan"),
        at_most=2.0,  # tiles at the borders have smaller halos: inside, 1.4 times the keys are read
        spread=last.spread,
    )


def _tiled(q: Tensor, k: Tensor, v: Tensor, *, kernel: int) -> Tensor:
    return neighborhood_attention(q, k, v, kernel)


def _masked(q: Tensor, k: Tensor, v: Tensor, *, matrix: Tensor) -> Tensor:
    grid = q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=matrix).transpose(1, 2).unflatten(1, grid)


def _gathered(q: Tensor, k: Tensor, v: Tensor, *, matrix: Tensor, keys: int) -> Tensor:
    """Each query picks its own keys, as unfused implementations do; head by head, for the memory's sake."""
    index = matrix[0, 0].nonzero()[:, 1].view(-1, keys)
    outs = []
    for head in range(q.shape[3]):
        one = [x[0, :, :, head].flatten(0, 1) for x in (q, k, v)]
        weights = torch.einsum("nd,nkd->nk", one[0], one[1][index]).mul(q.shape[4] ** -0.5).softmax(-1)
        outs.append(torch.einsum("nk,nkd->nd", weights, one[2][index]))
    return torch.stack(outs, dim=1).unflatten(0, q.shape[1:3])[None]


@torch.enable_grad()
def _both(way: Callable[..., Tensor], *inputs: Tensor) -> Any:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = way(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))
