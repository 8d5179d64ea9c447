"""050 Combiner: summaries of what lies outside make up for local attention, in less time than full attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...lens.needle import haystack_text
from ...nn.sequence.combiner_attention import CombinerBlock
from ...ops import masks
from ...ops.attention import attention
from ...ops.combiner import combiner_attention
from .claim import Outcome, Scale
from .timing import slope, times

PAPER, SLUG = "050", "combiner"
SAYS = (
    "Combiner: full attention at sparse cost. Language models with it come close to those with full attention and beat local and other "
    "sparse patterns of the same cost; time grows as n^1.5 (fixed, axial) or n log n (logsparse)."
)
LOSS = "loss on held-out bytes"
LOCAL, FULL = "own segment alone", "full attention"
PATTERNS = ("fixed", "axial_mixture", "logsparse")


def measure(scale: Scale) -> Outcome:
    length, steps = scale.pick((256, 120), (48, 2))
    lengths = scale.pick((2048, 4096, 8192, 16384), (256, 512))
    out = Outcome(
        f"byte models of 2 layers, {length} bytes of prose, {steps} steps (loss); 4 heads of 64 up to {lengths[-1]} tokens (time)",
        "a round",
    )
    _loss(out, scale, length, steps)
    _time(out, scale, lengths)
    return out


class _Model(nn.Module):
    """A small causal byte model; `segment` tokens are seen directly."""

    def __init__(self, length: int, segment: int, pattern: str) -> None:
        super().__init__()
        dim = 64
        self.embed, self.place = nn.Embedding(256, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        # one segment over everything is full attention
        shape: dict[str, Any] = {"pattern": pattern, "segment": segment}
        if pattern == FULL:
            shape = {"pattern": "fixed", "segment": length}
        self.local = segment if pattern == LOCAL else 0
        if self.local:
            shape = {"pattern": "fixed", "segment": segment}
        self.blocks = nn.ModuleList([CombinerBlock(dim, 4, mlp_dim=128, **shape) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        if self.local:  # segments as a batch of their own: nothing is seen outside
            x = x.unflatten(1, (-1, self.local)).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x))
        return x.unflatten(0, (ids.shape[0], -1)).flatten(1, 2) if self.local else x


def _loss(out: Outcome, scale: Scale, length: int, steps: int) -> None:
    data = torch.tensor(list(haystack_text().encode("ascii", "replace")), dtype=torch.long)
    split = len(data) * 9 // 10
    segment = scale.pick(16, 8)
    found: dict[str, float] = {}
    for name in (FULL, LOCAL, *PATTERNS):
        torch.manual_seed(0)
        found[name] = _trained(_Model(length, segment, name), data, split, length, steps, 0)
    for name, loss in found.items():
        out.add(name, LOSS, "nats a byte", loss, against=None if name == FULL else FULL)
    for name in PATTERNS:
        ahead = out.row(LOCAL, LOSS).mean - out.row(name, LOSS).mean
        out.check(f"{name}: loss, lead over the {LOCAL}", ahead, at_least=0.0, digits=3)
        out.check(
            f"{name}: loss, of that of full attention", out.row(name, LOSS).ratio or math.inf, at_most=1.03, digits=3
        )
    out.note = "Logsparse sees one token directly and so at lower cost than the others. Training is short: the order may change with more."


def _trained(model: nn.Module, data: Tensor, split: int, length: int, steps: int, seed: int) -> float:
    g = torch.Generator().manual_seed(seed)

    def batch(first: int, last: int, size: int) -> tuple[Tensor, Tensor]:
        start = torch.randint(first, last - length - 1, (size,), generator=g)
        rows = data[start[:, None] + torch.arange(length + 1)]
        return rows[:, :-1], rows[:, 1:]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    for _ in range(steps):
        ids, wanted = batch(0, split, 8)
        F.cross_entropy(model(ids).flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        g.manual_seed(1)  # the same held-out texts for all
        ids, wanted = batch(split, len(data), 32)
        return float(F.cross_entropy(model(ids).flatten(0, 1), wanted.flatten()))


def _time(out: Outcome, scale: Scale, lengths: tuple[int, ...]) -> None:
    heads = scale.pick(4, 1)
    things = {}
    for n in lengths:
        q, k, v = torch.randn(3, 1, heads, n, 64, generator=torch.Generator().manual_seed(n))
        segment = 1 << round(math.log2(n) / 2)
        things[f"{FULL}, {n} tokens"] = partial(attention, q, k, v, mask=masks.causal)
        for pattern in PATTERNS:
            things[f"{pattern}, {n} tokens"] = partial(combiner_attention, q, k, v, pattern=pattern, segment=segment)
    found = times(things, rounds=scale.pick(2, 1), inner=1)
    for name in (FULL, *PATTERNS):
        for n in lengths:
            base = None if name == FULL else f"{FULL}, {n} tokens"
            out.add(f"{name}, {n} tokens", "time", "s", found[f"{name}, {n} tokens"], against=base)
    for pattern, bound in (("fixed", 1.65), ("axial_mixture", 1.65), ("logsparse", 1.35)):
        seconds = [out.row(f"{pattern}, {n} tokens", "time").mean for n in lengths]
        out.check(
            f"{pattern}: exponent of the growth of time with length", slope(list(lengths), seconds), at_most=bound
        )
        ratio = out.row(f"{pattern}, {lengths[-1]} tokens", "time").ratio or math.inf
        out.check(f"{pattern}: time, of that of full attention at {lengths[-1]} tokens", ratio, at_most=1.0)
