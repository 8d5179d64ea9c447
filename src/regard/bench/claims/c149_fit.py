"""149 FIT: latents carry what local groups cannot see, at a cost that hardly grows faster than the length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import FIT, FITAR
from ..small_training import ByteText, train
from .claim import Outcome, Scale
from .memory import peak_bytes
from .timing import slope, times

PAPER, SLUG = "149", "fit"
SAYS = (
    "FIT: local attention in groups and global attention among a few latents of each group model very long inputs end to end at a "
    "cost of about L^(4/3), where the latents bring in what lies outside the group."
)
WITH, WITHOUT = "with latents", "local layers only"
BITS = "held-out bits per byte"


def measure(scale: Scale) -> Outcome:
    tokens, groups, steps = scale.pick(32, 8), scale.pick(8, 3), scale.pick(300, 3)
    lengths = scale.pick((1024, 2048, 4096, 8192), (64, 128))
    out = Outcome(
        f"byte LM: groups of {tokens}, {groups} groups, width 96, {steps} steps; time and memory: width 128, groups of 64 with 4 "
        f"latents, up to {lengths[-1]} tokens, forward",
        "a quarter of the held-out texts, or a round",
    )
    _language(out, scale, tokens, groups, steps)
    _cost(out, scale, lengths)
    return out


def _language(out: Outcome, scale: Scale, tokens: int, groups: int, steps: int) -> None:
    text, dim = ByteText(), scale.pick(96, 16)
    kept = text.held_out(scale.pick(64, 4), groups * tokens)
    first: dict[str, list[float]] = {}
    for label, layers in ((WITH, "(1)1(1)1(2)"), (WITHOUT, "(6)0")):
        torch.manual_seed(0)
        model = FITAR(256, layers, groups, tokens, 4, dim, num_heads=4)
        draw = partial(text.batch, scale.pick(4, 2), groups * tokens, torch.Generator().manual_seed(0))
        train(model.parameters(), partial(_loss, model, draw), steps, lr=4e-3)
        model.eval()
        bits = torch.stack([_bits(model, part) for part in kept.chunk(4)])  # (4, groups, tokens)
        base = None if label == WITH else WITH
        out.add(label, BITS, "bits", bits.mean((1, 2)).tolist(), against=base)
        edge = bits[:, 1:, : max(1, tokens // 8)].mean((1, 2))
        first[label] = edge.tolist()
        out.add(label, f"{BITS}, first eighth of a group", "bits", first[label], against=base)
        out.add(label, "parameters", "", sum(p.numel() for p in model.parameters()), against=base)
    row = out.row(WITHOUT, BITS)
    out.check(
        "bits per byte of local layers only, of those with latents", row.ratio or 0.0, at_least=1.0, spread=row.spread
    )
    lead = [other - own for own, other in zip(first[WITH], first[WITHOUT])]
    out.check(
        "bits saved by latents where a group begins",
        sum(lead) / len(lead),
        at_least=0.0,
        spread=(max(lead) - min(lead)) / 2,
    )


def _loss(model: FITAR, draw: Callable[[], Tensor], step: int) -> Tensor:
    return model.loss(draw())


@torch.no_grad()
def _bits(model: FITAR, ids: Tensor) -> Tensor:
    logits = model(F.pad(ids[:, :-1], (1, 0), value=model.start))
    nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return (nats / torch.log(torch.tensor(2.0))).view(-1, model.groups, model.tokens).mean(0)


def _cost(out: Outcome, scale: Scale, lengths: tuple[int, ...]) -> None:
    dim = scale.pick(128, 16)
    networks = {}
    for length in lengths:
        groups = length // 64
        x = torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))
        fit = FIT("(1)1(1)1(2)", groups, 64, 4, 8, dim, num_heads=4).eval()
        full = FIT("(6)0", 1, length, 1, 8, dim, num_heads=4).eval()
        networks[f"FIT, {length} tokens"] = partial(fit, x.view(1, groups, 64, 8))
        networks[f"full attention, {length} tokens"] = partial(full, x.view(1, 1, length, 8))
    things = times(networks, rounds=scale.pick(3, 1), inner=1)
    for label, values in things.items():
        out.add(label, "time", "s", values)
    longest = lengths[-1]
    for kind in ("full attention", "FIT"):
        peak = peak_bytes(networks[f"{kind}, {longest} tokens"])
        base = None if kind == "full attention" else f"full attention, {longest} tokens"
        out.add(f"{kind}, {longest} tokens", "peak memory", "bytes", peak, against=base)
    grown = [slope(list(lengths), [things[f"FIT, {n} tokens"][i] for n in lengths]) for i in range(scale.pick(3, 1))]
    out.check(
        f"growth of FIT's time from {lengths[0]} to {longest} tokens, as a power of the length",
        sum(grown) / len(grown),
        at_most=4 / 3,
        spread=(max(grown) - min(grown)) / 2,
    )
    pairs = zip(things[f"FIT, {longest} tokens"], things[f"full attention, {longest} tokens"])
    shares = [fit / full for fit, full in pairs]
    out.check(
        f"time at {longest} tokens, of that of as many layers of full attention",
        sum(shares) / len(shares),
        at_most=0.5,
        spread=(max(shares) - min(shares)) / 2,
    )
    out.note = (
        "Both language models have six layers; those with latents spend two of them on latents and four on tokens."
    )
