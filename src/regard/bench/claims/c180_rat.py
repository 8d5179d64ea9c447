"""180 RAT: longer chunks cost less; a recurrence in chunks with attention across them recalls what a recurrence alone forgets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...models.small_lm import SmallLM
from ...nn.mixers import state_bytes
from ...ops import masks
from ...ops.attention import attention
from ...ops.chunk_recurrence import chunk_recurrent_attention
from ...testbeds import tasks
from ...testbeds.training import train
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "180", "rat"
SAYS = (
    "RAT: with a recurrence within chunks of 16 and softmax attention across them, training is 7 times and decoding 9 times as fast as "
    "attention at 100k and 4k tokens, at nearly its accuracy; the chunk size trades between a recurrence and attention."
)
DENSE, FOUND = "causal softmax", "values recalled"


def measure(scale: Scale) -> Outcome:
    heads, dim = scale.pick((8, 64), (2, 16))
    length = scale.pick(16384, 512)
    steps, width = scale.pick((500, 64), (3, 16))
    pairs, tokens, words = scale.pick((6, 64, 64), (2, 16, 16))
    out = Outcome(
        f"{heads} heads of {dim}, float32, {length} tokens; two layers of width {width} trained here for {steps} steps to recall "
        f"{pairs} pairs in {tokens} tokens",
        "a round of timing, a test batch",
    )
    _speed(out, scale, heads, dim, length)
    _recall(out, steps, width, pairs, tokens, words)
    return out


def _speed(out: Outcome, scale: Scale, heads: int, dim: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, gate = torch.randn(4, 1, heads, length, dim, generator=generator).unbind()
    gate = gate.sigmoid()
    sizes = (16, 64)
    things: dict[str, Any] = {f"RAT({size})": partial(chunk_recurrent_attention, q, k, v, gate, size) for size in sizes}
    things[DENSE] = partial(attention, q, k, v, mask=masks.causal)
    found = times(things, rounds=scale.pick(3, 2), inner=1)
    out.add(DENSE, "time of a forward", "s", found[DENSE])
    for size in sizes:
        out.add(f"RAT({size})", "time of a forward", "s", found[f"RAT({size})"], against=DENSE)
    _faster(out, f"RAT(16): times faster than softmax at {length} tokens", found[DENSE], found["RAT(16)"], 5.0)
    _faster(out, "RAT(64): times faster than RAT(16)", found["RAT(16)"], found["RAT(64)"], 1.0)

    past = length - 5  # in the middle of a chunk
    states = {}
    for size in sizes:
        begun = (t[:, :, :past] for t in (q, k, v, gate))
        states[size] = chunk_recurrent_attention(*begun, chunk_size=size, return_state=True)[1]  # type: ignore[misc, arg-type]
    one = [t[:, :, -1:] for t in (q, k, v, gate)]
    step = partial(chunk_recurrent_attention, one[0], one[1], one[2], one[3], return_state=True)
    things = {f"RAT({size})": partial(step, size, state=states[size]) for size in sizes}
    things[DENSE] = partial(attention, one[0], k, v)
    found = times(things, rounds=scale.pick(5, 2), inner=scale.pick(20, 2))
    out.add(DENSE, "time of a decoding step", "s", found[DENSE])
    out.add(DENSE, "bytes kept", "", k.nbytes + v.nbytes)
    for size in sizes:
        out.add(f"RAT({size})", "time of a decoding step", "s", found[f"RAT({size})"], against=DENSE)
        out.add(f"RAT({size})", "bytes kept", "", state_bytes(states[size]), against=DENSE)
    _faster(out, "RAT(16), a decoding step: times faster than softmax", found[DENSE], found["RAT(16)"], 5.0)
    share = out.row("RAT(16)", "bytes kept").ratio
    out.check("RAT(16): bytes kept, of a key-value cache", share or float("nan"), at_most=1 / 15)


def _faster(out: Outcome, what: str, slow: list[float], fast: list[float], bound: float) -> None:
    ratios = [s / f for s, f in zip(slow, fast)]
    spread = (max(ratios) - min(ratios)) / 2
    out.check(what, sum(ratios) / len(ratios), at_least=bound, spread=spread, digits=1)


def _recall(out: Outcome, steps: int, width: int, pairs: int, tokens: int, words: int) -> None:
    make = tasks.batches(tasks.mqar, 32, tokens, pairs, words, seed=1)
    tests = [tasks.mqar(64, tokens, pairs, words, generator=torch.Generator().manual_seed(10**9 + n)) for n in range(4)]
    layers: dict[str, tuple[str, dict[str, Any]]] = {
        "softmax": ("softmax", {}),
        "RAT(2)": ("rat", {"chunk_size": 2}),
        "RAT(8)": ("rat", {"chunk_size": 8}),
        "recurrence": ("gated_recurrence", {}),
    }
    for label, (mixer, options) in layers.items():
        torch.manual_seed(0)
        model = SmallLM(words, width, 2, 2, mixer, mixer_options=options, mlp_ratio=2, short_conv=3)
        train(model, make, steps=steps, lr=4e-3, progress=False)
        model.eval()
        with torch.no_grad():
            found = [tasks.accuracy(model(ids), labels) for ids, labels in tests]
        out.add(label, FOUND, "share", found)
    mean = {label: out.row(label, FOUND).mean for label in layers}
    out.check("values recalled, RAT(2) above the recurrence alone", mean["RAT(2)"] - mean["recurrence"], at_least=0.05)
    out.check("values recalled, RAT(8) above the recurrence alone", mean["RAT(8)"] - mean["recurrence"], at_least=0.0)
    out.check("values recalled, RAT(2) of softmax", mean["RAT(2)"] / max(mean["softmax"], 1e-9), at_least=0.8)
