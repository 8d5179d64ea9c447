"""124 Lightning Attention-2: time per token does not depend on the length; memory grows linearly, and slowly."""

from __future__ import annotations

from functools import partial

import torch

from ...ops import masks
from ...ops.attention import attention
from ...ops.state.linear import linear_attention
from .claim import Outcome, Scale
from .memory import peak_bytes
from .timing import slope, times

PAPER, SLUG = "124", "lightning-attention-2"
SAYS = "Lightning Attention-2: time per token stays the same however long the sequence, where softmax attention's grows with it."
LINEAR, SOFTMAX = "Lightning Attention-2 (chunks)", "causal softmax (SDPA)"


def measure(scale: Scale) -> Outcome:
    heads, dim = scale.pick((8, 64), (2, 16))
    lengths = scale.pick((2048, 8192, 32768), (256, 512, 1024))
    dense_lengths = lengths[:2]
    decay = -torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads)
    out = Outcome(
        f"{heads} heads, head_dim {dim}, float32, {lengths[0]} to {lengths[-1]} tokens, forward", "a round of timing"
    )
    inputs = {n: torch.randn(3, 1, heads, n, dim, generator=torch.Generator().manual_seed(n)) for n in lengths}

    things = {f"{LINEAR}, {n} tokens": partial(linear_attention, *inputs[n], log_decay=decay) for n in lengths}
    things |= {f"{SOFTMAX}, {n} tokens": partial(attention, *inputs[n], mask=masks.causal) for n in dense_lengths}
    found = times(things, rounds=scale.pick(5, 2), inner=scale.pick(3, 1))
    for name, label_lengths in ((LINEAR, lengths), (SOFTMAX, dense_lengths)):
        for n in label_lengths:
            label = f"{name}, {n} tokens"
            base = None if n == lengths[0] else f"{name}, {lengths[0]} tokens"
            out.add(label, "time per token", "s", [t / n for t in found[label]], against=base)
    last = out.row(f"{LINEAR}, {lengths[-1]} tokens", "time per token")
    dense = out.row(f"{SOFTMAX}, {dense_lengths[-1]} tokens", "time per token")
    much, some = lengths[-1] // lengths[0], dense_lengths[-1] // dense_lengths[0]
    out.check(
        f"time per token at {much} times the length, of the shortest",
        last.ratio or float("nan"),
        at_most=1.25,
        spread=last.spread,
    )
    out.check(
        f"softmax: time per token at {some} times the length, of the shortest",
        dense.ratio or float("nan"), at_least=some / 2, spread=dense.spread,
    )  # fmt: skip
    long = dense_lengths[-1]
    speed = [s / t for s, t in zip(found[f"{SOFTMAX}, {long} tokens"], found[f"{LINEAR}, {long} tokens"])]
    spread = (max(speed) - min(speed)) / 2
    out.check(
        f"times faster than softmax at {long} tokens", sum(speed) / len(speed), at_least=5.0, spread=spread, digits=1
    )
    means = [sum(found[f"{LINEAR}, {n} tokens"]) for n in lengths]
    out.add("growth of the time", "exponent of the length", "", slope(list(lengths), means))
    _memory(out, lengths, heads, dim, decay)
    return out


def _memory(out: Outcome, lengths: tuple[int, ...], heads: int, dim: int, decay: torch.Tensor) -> None:
    """Peak memory of a call above what its inputs hold, in units of its own output."""
    for n in lengths:
        q, k, v = torch.randn(3, 1, heads, n, dim)
        peak = peak_bytes(partial(linear_attention, q, k, v, log_decay=decay))
        out.add(f"{LINEAR}, {n} tokens", "peak memory above the inputs, of the output's size", "", peak / v.nbytes)
    share = out.rows[-1].mean
    out.check(f"peak memory above the inputs at {lengths[-1]} tokens, of the output's size", share, at_most=2.0)
