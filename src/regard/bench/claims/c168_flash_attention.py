"""168 FlashAttention: memory linear in the length, traffic by the formula, faster than the matrix, block-sparse by its share of tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import Selection, TileTraffic, attention, reference, tiled_attention
from .claim import Outcome, Scale
from .memory import peak_bytes
from .timing import slope, times

PAPER, SLUG = "168", "flash-attention"
SAYS = (
    "FlashAttention: exact attention with memory linear in the length, several times faster than writing the matrix (up to 7.6 times on "
    "GPT-2), by moving Theta(N^2 d^2 / M) elements to and from a fast memory of M; block-sparse, time shrinks with the share of tiles."
)
TILED, MATRIX = "attention in tiles", "attention by its matrix"


def measure(scale: Scale) -> Outcome:
    heads, dim = scale.pick((4, 64), (2, 8))
    lengths = scale.pick((1024, 2048, 4096), (64, 128, 256))
    out = Outcome(f"{heads} heads, head_dim {dim}, float32, {lengths[0]} to {lengths[-1]} tokens", "a round of timing")
    inputs = {n: torch.randn(3, 1, heads, n, dim, generator=torch.Generator().manual_seed(n)) for n in lengths}
    ways: dict[str, Callable[..., Any]] = {TILED: attention, MATRIX: partial(attention, backend="eager")}
    _memory(out, ways, inputs)
    _time(out, scale, ways, inputs[lengths[-1]])
    _sparse(out, scale, inputs[lengths[-1]])
    _traffic(out, scale)
    return out


@torch.enable_grad()
def _both(way: Callable[..., Tensor], *inputs: Tensor) -> Any:
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = way(*leaves)
    return torch.autograd.grad(made, leaves, torch.ones_like(made))


def _memory(out: Outcome, ways: dict[str, Callable[..., Any]], inputs: dict[int, Tensor]) -> None:
    lengths = list(inputs)
    for name, way in ways.items():
        peaks = [float(peak_bytes(partial(_both, way, *inputs[n]))) for n in lengths]
        for n, peak in zip(lengths, peaks):
            base = MATRIX if name == MATRIX else TILED
            against = None if n == lengths[0] else f"{base}, {lengths[0]} tokens"
            out.add(f"{name}, {n} tokens", "peak memory, forward and backward", "B", peak, against=against)
        power = slope(lengths, peaks)
        what = f"{name}: peak memory grows with the length to the power"
        if name == TILED:
            out.check(what, power, at_most=1.15)
        else:
            out.check(what, power, at_least=1.7)


def _time(out: Outcome, scale: Scale, ways: dict[str, Callable[..., Any]], inputs: Tensor) -> None:
    things = {f"{name}, forward": partial(way, *inputs) for name, way in ways.items()}
    things |= {f"{name}, forward and backward": partial(_both, way, *inputs) for name, way in ways.items()}
    found = times(things, rounds=scale.pick(3, 2), inner=scale.pick(2, 1))
    n = inputs.shape[3]
    for what in ("forward", "forward and backward"):
        for name in (MATRIX, TILED):
            against = None if name == MATRIX else f"{MATRIX}, {n} tokens"
            out.add(f"{name}, {n} tokens", f"time, {what}", "s", found[f"{name}, {what}"], against=against)
        ratios = [a / b for a, b in zip(found[f"{MATRIX}, {what}"], found[f"{TILED}, {what}"])]
        spread = (max(ratios) - min(ratios)) / 2
        mean = sum(ratios) / len(ratios)
        out.check(f"times faster than the matrix at {n} tokens, {what}", mean, at_least=1.5, spread=spread, digits=1)


def _sparse(out: Outcome, scale: Scale, inputs: Tensor) -> None:
    """Random tiles, other ones for each head; the time of a share against that of four times the share."""
    n, heads, block = inputs.shape[3], inputs.shape[2], scale.pick(64, 16)
    blocks = n // block
    rank = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1)
    few, many = scale.pick((0.125, 0.5), (0.25, 0.5))
    things = {}
    for share in (few, many):
        kept = Selection.from_block_map(rank < share * blocks, block_q=block, block_k=block, q_len=n, kv_len=n)
        things[share] = partial(attention, *inputs, selection=kept)
    found = times({str(share): thing for share, thing in things.items()}, rounds=scale.pick(3, 2), inner=2)
    for share in (many, few):
        against = None if share == many else f"block-sparse, {many:.1%} of tiles"
        out.add(f"block-sparse, {share:.1%} of tiles", "time, forward", "s", found[str(share)], against=against)
    last = out.rows[-1]
    out.check(
        f"time of {few:.1%} of the tiles, of that of {many:.1%}",
        last.ratio or float("nan"),
        at_most=1.5 * few / many,
        spread=last.spread,
    )


def _traffic(out: Outcome, scale: Scale) -> None:
    """Elements moved, counted tile by tile, over N^2 d^2 / M: the same number for every length, width and memory."""
    shapes = scale.pick(
        [(512, 32, 4096), (1024, 32, 4096), (1024, 32, 8192), (1024, 64, 8192), (1024, 64, 16384)],
        [(128, 8, 256), (256, 8, 256), (256, 8, 512), (256, 16, 1024)],
    )
    constants = []
    for n, dim, sram in shapes:
        q, k, v = torch.randn(3, 1, 1, n, dim)
        traffic = TileTraffic()
        tiled = tiled_attention(q, k, v, sram=sram, variant="paper", traffic=traffic)
        torch.testing.assert_close(
            tiled, reference.attention(q, k, v, q_offset=0, scale=dim**-0.5), rtol=1e-4, atol=1e-5
        )
        constants.append(traffic.forward / (n**2 * dim**2 / sram))
        out.add(f"N {n}, d {dim}, M {sram}", "elements moved, of N^2 d^2 / M", "", constants[-1])
        out.add(
            f"N {n}, d {dim}, M {sram}",
            "elements moved, of those with the matrix",
            "",
            traffic.forward / (4 * n * dim + 4 * n**2),
        )
    out.check("largest over smallest constant of N^2 d^2 / M", max(constants) / min(constants), at_most=1.25)
