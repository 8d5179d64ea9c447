"""162 RCMHA: convolved queries, keys and values with relative positions against each of the two alone."""

from __future__ import annotations

from typing import Any

import torch

from ...models.small_lm import SmallLM
from ...testbeds.tasks import accuracy
from ...testbeds.texts import ByteText
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "162", "rcmha"
SAYS = (
    "RCMHA: attention with both relative positions and short convolutions of queries, keys and values predicts the next character "
    "better than with relative positions alone, with convolutions alone, or plain."
)
RIGHT = "next byte right"
# name -> mixer, its options, whether its position tables stay zero
ROSTER: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("softmax", {}, False),
    "convolutions": ("relative_conv", {}, True),
    "relative positions": ("relative_conv", {"conv_on": ""}, False),
    "both": ("relative_conv", {}, False),
    "both, convolutions on keys and values": ("relative_conv", {"conv_on": "kv"}, False),
}


def measure(scale: Scale) -> Outcome:
    dim, length, layers, steps = scale.pick((64, 96, 2, 300), (16, 16, 1, 3))
    out = Outcome(
        f"{layers} layers of width {dim} trained here on Python's own prose as bytes, {steps} steps of 16 x {length}",
        "held-out part",
    )
    text = ByteText()
    parts = [text.held_out(32, length + 1)[i::4] for i in range(4)]
    for label, (mixer, options, no_positions) in ROSTER.items():
        torch.manual_seed(0)
        model = SmallLM(
            256, dim, layers, 4, mixer, mixer_options=options, positions="none", max_len=length, mlp_ratio=2
        )
        for name, p in model.named_parameters():
            if no_positions and name.rpartition(".")[2] in ("position_keys", "position_bias"):
                p.requires_grad_(False)
        train(model, text.batches(16, length, seed=1), steps=steps, lr=4e-3, progress=False)
        model.eval()
        with torch.no_grad():
            right = [accuracy(model(ids[:, :-1]), ids[:, 1:]) for ids in parts]
        out.add(label, RIGHT, "share", right, against=None if label == "plain" else "plain")
    mean = {label: out.row(label, RIGHT).mean for label in ROSTER}
    for label in ("relative positions", "convolutions", "plain"):
        out.check(f"both above {label}", mean["both"] - mean[label], at_least=0.0, digits=3)
    out.note = "Plain attention here has no positions at all but the causal mask."
    return out
