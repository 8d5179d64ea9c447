"""015 Based: recall grows with the state, which one number dials; a decoding step costs the same at any length."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...models.small_lm import SmallLM
from ...ops.attention import attention
from ...ops.state import LinearState, TaylorExp, linear_attention_decode
from ...testbeds import tasks
from ...testbeds.training import train
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "015", "based"
SAYS = (
    "Based: what a layer recalls grows with the state that it keeps; linear attention with the exponential's second-order Taylor features "
    "dials that state by the width of queries and keys, comes near softmax, and decodes at a cost that does not grow with the text."
)
FOUND, STATE, TIME = "values recalled", "state at the end", "time of a decoding step"
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "window of 8": ("sliding_window", {"window": 8}),
    "elu+1, width 8": ("linear", {"key_dim": 8}),
    "Taylor, width 2": ("based", {"feature_dim": 2}),
    "Taylor, width 4": ("based", {"feature_dim": 4}),
    "Taylor, width 8": ("based", {"feature_dim": 8}),
}


def measure(scale: Scale) -> Outcome:
    dim, length, pairs, words, steps = scale.pick((64, 32, 6, 128, 600), (16, 16, 2, 32, 3))
    contexts = scale.pick((1024, 16384), (64, 256))
    out = Outcome(
        f"two layers of width {dim}, one head, trained here for {steps} steps on multi-query recall, {pairs} pairs in {length} tokens, "
        f"{words} words; decoding steps of 8 heads of width 64 (Taylor width 16) after {contexts[0]} and {contexts[1]} tokens",
        "test batch or round",
    )
    make = tasks.batches(tasks.mqar, 32, length, pairs, words, seed=1)
    tests = [tasks.mqar(64, length, pairs, words, generator=torch.Generator().manual_seed(10**9 + n)) for n in range(4)]
    for label, (mixer, options) in LAYERS.items():
        torch.manual_seed(0)
        build = partial(SmallLM, words, dim, 2, 1, mixer, positions="none", short_conv=3, mlp_ratio=2)
        model = build(mixer_options=options)
        train(model, make, steps=steps, lr=4e-3, progress=False)
        model.eval()
        with torch.no_grad():
            found = [tasks.accuracy(model(ids), labels) for ids, labels in tests]
        against = None if label == "softmax" else "softmax"
        out.add(label, FOUND, "share", found, against=against)
        out.add(label, STATE, "bytes", [float(model.state_nbytes(length) or 0)], against=against)
    mean = {label: out.row(label, FOUND).mean for label in LAYERS}
    out.check("Taylor: width 8 above width 2", mean["Taylor, width 8"] - mean["Taylor, width 2"], at_least=0.02)
    out.check("Taylor of width 8, of softmax", mean["Taylor, width 8"] / max(mean["softmax"], 1e-9), at_least=0.9)
    out.check(
        "Taylor above elu+1, both of width 8 (Taylor's state is larger)",
        mean["Taylor, width 8"] - mean["elu+1, width 8"],
        at_least=0.0,
    )

    generator = torch.Generator().manual_seed(0)
    features = TaylorExp(compact=True)
    things = {}
    for context in contexts:
        q, k, v = (torch.randn(1, 8, 1, width, generator=generator) for width in (16, 16, 64))
        state = LinearState.zeros(1, 8, features.width(16), 64, normalize=True)
        things[f"Taylor, {context} tokens"] = partial(
            linear_attention_decode, q, k, v, state, feature_map=features, normalize=True
        )
        q = torch.randn(1, 8, 1, 64, generator=generator)
        keys, values = torch.randn(2, 1, 8, context, 64, generator=generator)
        things[f"softmax, {context} tokens"] = partial(attention, q, keys, values)
    found_times = times(things, rounds=scale.pick(5, 2), inner=scale.pick(20, 2))
    for context in contexts:
        base = f"softmax, {context} tokens"
        out.add(base, TIME, "s", found_times[base])
        out.add(f"Taylor, {context} tokens", TIME, "s", found_times[f"Taylor, {context} tokens"], against=base)
    least = {name: min(values) for name, values in found_times.items()}
    short, long = (f"Taylor, {context} tokens" for context in contexts)
    out.check("Taylor: a step after many tokens over one after few", least[long] / least[short], at_most=1.25)
    gain = least[f"softmax, {contexts[1]} tokens"] / least[long]
    out.check("softmax's step over Taylor's after many tokens", gain, at_least=1.0)
    return out
