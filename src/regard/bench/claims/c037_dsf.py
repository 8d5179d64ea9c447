"""037 DSF: a larger state, a learned normaliser and a reversed gate are what recall wants."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...models.small_lm import SmallLM
from ...testbeds import tasks
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "037", "dsf"
SAYS = (
    "DSF: seen as linear systems, layers differ by state size and gate; on associative recall linear attention nears softmax as its "
    "queries and keys widen, a learned normaliser betters it at equal width, and an LSTM betters when its forget gate is reversed."
)
FOUND = "values recalled"
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "linear, narrow": ("linear", {"key_dim": 8}),
    "linear, wide": ("linear", {"key_dim": 64}),
    "learned normaliser, narrow": ("linear_normalized", {"key_dim": 8}),
    "qLSTM": ("qlstm", {"reverse": False}),
    "qLSTM, reversed gate": ("qlstm", {"reverse": True}),
}


def measure(scale: Scale) -> Outcome:
    dim, length, pairs, words, steps = scale.pick((64, 32, 6, 128, 500), (16, 16, 2, 32, 3))
    out = Outcome(
        f"two layers of width {dim} trained here for {steps} steps on multi-query recall, {pairs} pairs in {length} tokens, {words} words",
        "test batch",
    )
    make = tasks.batches(tasks.mqar, 32, length, pairs, words, seed=1)
    tests = [tasks.mqar(64, length, pairs, words, generator=torch.Generator().manual_seed(10**9 + n)) for n in range(4)]
    for label, (mixer, options) in LAYERS.items():
        torch.manual_seed(0)
        # an LSTM has a convolution of its own; attention here gets one in place of learned positions
        conv = 0 if mixer == "qlstm" else 3
        build = partial(SmallLM, words, dim, 2, 1, mixer, positions="none", short_conv=conv)
        model = build(mixer_options=options, mlp_ratio=0 if mixer == "qlstm" else 2)
        train(model, make, steps=steps, lr=4e-3, progress=False)
        model.eval()
        with torch.no_grad():
            found = [tasks.accuracy(model(ids), labels) for ids, labels in tests]
        out.add(label, FOUND, "share", found, against=None if label == "softmax" else "softmax")
    mean = {label: out.row(label, FOUND).mean for label in LAYERS}
    out.check("wide above narrow linear attention", mean["linear, wide"] - mean["linear, narrow"], at_least=0.02)
    out.check("wide linear attention of softmax", mean["linear, wide"] / max(mean["softmax"], 1e-9), at_least=0.9)
    gain = mean["learned normaliser, narrow"] - mean["linear, narrow"]
    out.check("learned normaliser above the sum of weights, both narrow", gain, at_least=0.0)
    out.check("reversed above plain gate", mean["qLSTM, reversed gate"] - mean["qLSTM"], at_least=0.0)
    out.note = "One learning rate for all; the paper takes the best of four and trains for 64 epochs."
    return out
