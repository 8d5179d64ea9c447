"""074 Gated Attention: a gate behind attention lowers the loss and dissolves the attention sink."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...models.small_lm import SmallLM
from ...nn.sequence.gated_attention import GatedAttention
from ...nn.sequence.softmax_attention import SoftmaxAttention
from ...testbeds.texts import ByteText
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "074", "gated-attention"
SAYS = (
    "Gated Attention: a sigmoid gate on the heads' outputs lowers a language model's loss more than the same parameters in the MLPs, "
    "its gates are sparse, and the first token no longer draws the attention."
)
LOSS, FIRST, GATE = "held-out loss", "attention on the first token", "mean gate"


def measure(scale: Scale) -> Outcome:
    dim, length, layers, steps = scale.pick((96, 128, 3, 320), (16, 16, 1, 3))
    out = Outcome(
        f"{layers} layers of width {dim} trained here on Python's own prose as bytes, {steps} steps of 16 x {length}",
        "held-out part",
    )
    text = ByteText()
    # the elementwise gate has dim * dim weights a layer; an MLP gets as many by half a dim more of hidden width
    roster: dict[str, tuple[str, float]] = {
        "softmax": ("softmax", 2.5),
        "headwise gate": ("gated_headwise", 2.5),
        "elementwise gate": ("gated", 2.0),
    }
    for label, (mixer, ratio) in roster.items():
        torch.manual_seed(0)
        model = SmallLM(256, dim, layers, 4, mixer, mlp_ratio=ratio)
        train(model, text.batches(16, length, seed=1), steps=steps, lr=4e-3, progress=False)
        losses, first, gates = _look(model.eval(), [text.held_out(32, length + 1)[i::4] for i in range(4)])
        base = None if label == "softmax" else "softmax"
        out.add(label, LOSS, "nats per byte", losses, against=base)
        out.add(label, FIRST, "share", first, against=base)
        if gates:
            out.add(label, GATE, "share", gates)
    for label in ("headwise gate", "elementwise gate"):
        out.check(f"loss, {label} over softmax", out.row(label, LOSS).ratio or 1.0, at_most=1.0, digits=3)
        out.check(f"first token's attention, {label} over softmax", out.row(label, FIRST).ratio or 1.0, at_most=1.0)
    out.check("mean elementwise gate (0.5 when untrained)", out.row("elementwise gate", GATE).mean, at_most=0.45)
    out.note = (
        "A sink of the paper's strength (47 % of the attention) takes larger models and longer training than these."
    )
    return out


@torch.no_grad()
def _look(model: SmallLM, parts: list[torch.Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Loss, attention of later tokens on the first one and mean gate, each for every part."""
    seen: list[tuple[Any, torch.Tensor]] = []
    mixers: list[Any] = [block.mixer for block in model.blocks]
    hooks = [mixer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0]))) for mixer in mixers]
    losses, first, gates = [], [], []
    try:
        for ids in parts:
            seen.clear()
            losses.append(float(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())))
            sinks = [
                layer.attention_weights(x)[:, :, 1:, 0].mean()
                for layer, x in seen
                if isinstance(layer, SoftmaxAttention)
            ]
            first.append(float(torch.stack(sinks).mean()))
            opened = [layer.gates(x).mean() for layer, x in seen if isinstance(layer, GatedAttention)]
            gates += [float(torch.stack(opened).mean())] if opened else []
    finally:
        for hook in hooks:
            hook.remove()
    return losses, first, gates
