"""051 TransNormerLLM: one speed at any length, decoding from a state of one size, and text learned as well as with softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models.small_lm import SmallLM
from ...models.transnormer_llm import TransNormerLLM
from ...testbeds.texts import ByteText
from ...testbeds.training import token_loss, train
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "051", "transnormer-llm"
SAYS = (
    "TransNormerLLM: training speed per token stays the same at every length, where softmax's falls; at equal size it learns text at "
    "least as well as a softmax transformer; heads that forget more slowly in later layers are better than one rate for all."
)
TNL, FLAT, SOFTMAX = "TransNormerLLM", "TransNormerLLM, one decay for all layers", "softmax"
LOSS = "bits a byte, held out"
_NO_MORE: dict[str, Any] = {"at_most": 1.25}
_MORE: dict[str, Any] = {"at_least": 1.5}


def measure(scale: Scale) -> Outcome:
    dim, layers, heads = scale.pick((96, 4, 4), (16, 2, 2))
    steps, batch, context = scale.pick((110, 8, 256), (3, 2, 32))
    out = Outcome(
        f"models of {layers} layers of width {dim}, {heads} heads, trained here for {steps} steps of {batch} times {context} bytes of "
        "Python's documentation; training steps of equally many tokens, in fewer and longer texts",
        "a round of timing, a held-out text",
    )
    makers: dict[str, Callable[[], SmallLM]] = {
        SOFTMAX: partial(SmallLM, 256, dim, layers, heads, "softmax", mlp_ratio=4.5, mlp_bias=False, tie=False),
        TNL: partial(
            TransNormerLLM, 256, dim, layers, heads, glu_dim=8 * dim // 3, lrpe=[True] + [False] * (layers - 1)
        ),
    }  # equal numbers of weights: 12 dim^2 + dim^2 a layer either way
    _speed(out, scale, makers)
    _text(out, makers, steps, batch, context, scale.pick(24, 2))
    return out


def _speed(out: Outcome, scale: Scale, makers: dict[str, Callable[[], SmallLM]]) -> None:
    lengths, total = scale.pick(((256, 1024, 4096), 4096), ((16, 64), 64))
    models = {}
    for label, make in makers.items():
        torch.manual_seed(0)
        models[label] = make()
    ids = torch.randint(256, (total,), generator=torch.Generator().manual_seed(0))

    @torch.enable_grad()  # timing is without
    def step(model: nn.Module, length: int) -> None:
        model.zero_grad(set_to_none=True)
        rows = ids.view(-1, length)
        token_loss(model, (rows, rows)).backward()

    things: dict[str, Any] = {
        f"{label}, {n} tokens a text": partial(step, model, n) for label, model in models.items() for n in lengths
    }
    found = times(things, rounds=scale.pick(3, 2), inner=1)
    for label in makers:
        for n in lengths:
            base = None if n == lengths[0] else f"{label}, {lengths[0]} tokens a text"
            name = f"{label}, {n} tokens a text"
            out.add(name, "training time a token", "s", [t / total for t in found[name]], against=base)
    much = lengths[-1] // lengths[0]
    for label, before, bound in ((TNL, "", _NO_MORE), (SOFTMAX, "softmax: ", _MORE)):
        row = out.row(f"{label}, {lengths[-1]} tokens a text", "training time a token")
        what = f"{before}training time a token at {much} times the length, of the shortest"
        out.check(what, row.ratio or math.nan, spread=row.spread, **bound)
    _decoding(out, scale, models[TNL].eval(), lengths)


@torch.no_grad()
def _decoding(out: Outcome, scale: Scale, model: SmallLM, lengths: tuple[int, ...]) -> None:
    token = torch.zeros(1, 1, dtype=torch.long)
    states = {n: model(torch.zeros(1, n, dtype=torch.long), return_state=True)[1] for n in (lengths[0], lengths[-1])}
    things: dict[str, Any] = {
        f"{TNL}, after {n} tokens": partial(model, token, state, return_state=True) for n, state in states.items()
    }
    found = times(things, rounds=scale.pick(5, 2), inner=scale.pick(10, 1))
    short, long = things
    for name, n in zip((short, long), states):
        base = None if name == short else short
        out.add(name, "time of a decoding step", "s", found[name], against=base)
        out.add(name, "bytes kept", "", states[n].nbytes, against=base)
    row = out.row(long, "time of a decoding step")
    out.check(
        "decoding step after many tokens, of one after few", row.ratio or math.nan, at_most=1.25, spread=row.spread
    )
    out.check(
        "bytes kept after many tokens, of those after few", out.row(long, "bytes kept").ratio or math.nan, at_most=1.0
    )


def _text(out: Outcome, makers: dict[str, Any], steps: int, batch: int, context: int, count: int) -> None:
    text = ByteText()
    held_out = text.held_out(count, context + 1)
    for label in (SOFTMAX, TNL, FLAT):
        torch.manual_seed(0)
        model = makers[TNL if label == FLAT else label]()
        if label == FLAT:
            for block in model.blocks:
                block.mixer.log_decay = model.blocks[0].mixer.log_decay
        train(model, text.batches(batch, context), steps=steps, lr=3e-3, progress=False)
        out.add(label, LOSS, "", _bits(model.eval(), held_out), against=None if label == SOFTMAX else SOFTMAX)
    mean = {label: out.row(label, LOSS).mean for label in (SOFTMAX, TNL, FLAT)}
    out.check("bits a byte, TransNormerLLM's of softmax's", mean[TNL] / mean[SOFTMAX], at_most=1.02, digits=3)
    out.check(
        "bits a byte, slower forgetting in later layers, of one decay for all",
        mean[TNL] / mean[FLAT],
        at_most=1.0,
        digits=3,
    )


@torch.no_grad()
def _bits(model: nn.Module, texts: Tensor) -> list[float]:
    """Bits a byte of each text."""
    logits = model(texts[:, :-1]).float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none")
    return (losses.mean(-1) / math.log(2)).tolist()
