"""058 SSA: temperatures that follow position and token against plain attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...models.small_lm import SmallLM
from ...nn.sequence.selective_attention import position_temperature, spikiness
from ...testbeds.texts import ByteText
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "058", "selective-attention"
SAYS = (
    "Selective attention: with inverse temperatures of queries and values that grow with position and follow the token, attention does "
    "not thin out over long contexts, and language models have a lower loss for less than half a percent more parameters."
)
LOSS, SPREAD = "held-out loss", "spread of a row of random scores over its keys (1: even)"
ROSTER: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "position": ("selective_position", {}),
    "token and position, queries alone": ("selective", {"value": False}),
    "token and position": ("selective", {}),
}


def measure(scale: Scale) -> Outcome:
    dim, length, layers, steps, longest = scale.pick((96, 128, 2, 320, 8192), (16, 16, 1, 3, 128))
    out = Outcome(
        f"rows of random scores, and {layers} layers of width {dim} trained here on Python's own prose as bytes, {steps} steps "
        f"of 16 x {length}",
        "row or held-out part",
    )
    scores = 1.5 * torch.randn(8, longest, generator=torch.Generator().manual_seed(0))
    sharper = position_temperature(torch.tensor(longest - 1), torch.tensor(0.0), "sigmoid")
    for label, factor in (("softmax", 1.0), ("token and position", float(sharper))):
        values = spikiness((scores * factor).softmax(-1)).tolist()
        out.add(label, SPREAD, "share", values, against=None if label == "softmax" else "softmax")
    text = ByteText()
    parts = [text.held_out(32, length + 1)[i::4] for i in range(4)]
    size: dict[str, int] = {}
    for label, (mixer, options) in ROSTER.items():
        torch.manual_seed(0)
        model = SmallLM(256, dim, layers, 4, mixer, mixer_options=options, mlp_ratio=2)
        size[label] = sum(p.numel() for p in model.parameters())
        train(model, text.batches(16, length, seed=1), steps=steps, lr=4e-3, progress=False)
        model.eval()
        with torch.no_grad():
            losses = [float(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())) for ids in parts]
        out.add(label, LOSS, "nats per byte", losses, against=None if label == "softmax" else "softmax")
    ratio = out.row("token and position", SPREAD).ratio or 1.0
    out.check("spread of a long row, with the temperature over without", ratio, at_most=0.5)
    for label in ("position", "token and position, queries alone", "token and position"):
        out.check(f"loss, {label} over softmax", out.row(label, LOSS).ratio or 1.0, at_most=1.0, digits=3)
    more = size["token and position"] / size["softmax"] - 1
    out.check("parameters more", more, at_most=0.005, digits=4)
    return out
