"""088 Attention sink: it grows in training, softmax's sum to one makes it, a key bias takes it over."""

from __future__ import annotations

from typing import Any

import torch

from ...lens.record import record
from ...lens.sink import column_importance, model_weights, sink_rate
from ...models.small_lm import SmallLM
from ...testbeds.sinks import BackcopyText, SinkPoint, train_watching_sinks
from ...testbeds.texts import ByteText
from ..text import token_windows
from .claim import Outcome, Scale

PAPER, SLUG = "088", "attention-sink"
SAYS = (
    "Attention sinks: the first token's share of the attention is not there at the start and grows in training; sigmoid attention without "
    "a normaliser has no sink at like loss, with one it has; a learned key before the text takes the sink over, a bias on values does not."
)
RATE, SLOT = "sink rate of the first token", "sink rate of the slot"
DRAWN, RAW = "its share of attention", "its weight on values"
LOSS, STEP = "loss", "after steps"

# The paper's text models are 60M parameters on 5 B tokens. A sink that shows in a minute wants a task on which a head must mostly do
# nothing, and a start token (see `BackcopyText`); on plain text, softmax and sigmoid are trained beside it.
ROSTER: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"similarity": "sigmoid", "normalize": "none"},
    "sigmoid, normalised": {"similarity": "sigmoid"},
    "elu+1, not normalised": {"similarity": "elu+1", "normalize": "none"},
    "softmax, sum + 1": {"normalize": "sum+1"},
    "softmax, K bias": {"slot": "k"},
    "softmax, KV bias": {"slot": "kv"},
    "softmax, V bias": {"value_bias": True},
}
LM_TEXT, LM_RANDOM, LM_UNTRAINED = "LM, text", "LM, random tokens", "LM, untrained"


def measure(scale: Scale) -> Outcome:
    dim, length, steps, every = scale.pick((64, 64, 320, 32), (16, 16, 4, 2))
    text_steps = scale.pick(160, 2)
    out = Outcome(
        f"a pretrained language model; one head of width {dim}, {steps} steps of 32 x {length} on bigrams of Python's prose with "
        f"back-copies; and 4 layers on the prose itself, {text_steps} steps of 16 x {length}",
        f"look, every {every} steps",
    )
    _pretrained(out, scale)
    task, text = BackcopyText(start=True), ByteText()
    held_out = task.batch(64, length, torch.Generator().manual_seed(9))
    for label, options in ROSTER.items():
        torch.manual_seed(0)
        model, slots = SmallLM(task.vocab_size, dim, 1, 1, "similarity", mixer_options=options), int("slot" in options)
        points = train_watching_sinks(
            model, task.batches(32, length, seed=1), held_out, steps=steps, every=every, slots=slots, lr=4e-3, progress=False
        )  # fmt: skip
        _add(out, label, points, slots)
        raw = column_importance(model_weights(model.eval(), held_out, normalized=False)[0])
        out.add(label, RAW, "weight", float(raw[..., 0].mean()))
    kept = text.held_out(32, length)
    for name in ("softmax", "sigmoid"):
        torch.manual_seed(0)
        model = SmallLM(256, dim, 4, 4, name)
        points = train_watching_sinks(
            model, text.batches(16, length, seed=1), kept, steps=text_steps, every=max(1, text_steps // 4), lr=4e-3, progress=False
        )  # fmt: skip
        _add(out, f"text, {name}", points, 0)
    _check(out)
    return out


def _check(out: Outcome) -> None:
    def last(label: str, figure: str = RATE) -> float:
        return out.row(label, figure).values[-1]

    known = {label: out.row(label, RATE).mean for label in (LM_TEXT, LM_RANDOM, LM_UNTRAINED)}
    out.check("sink rate, language model on text", known[LM_TEXT], at_least=30.0, digits=0)
    out.check("on random tokens over on text", known[LM_RANDOM] / max(known[LM_TEXT], 1e-9), at_most=1.0)
    out.check("sink rate, the same model untrained", known[LM_UNTRAINED], at_most=5.0, digits=0)
    out.check(
        "trained here, softmax: end less start",
        last("softmax") - out.row("softmax", RATE).values[0],
        at_least=30.0,
        digits=0,
    )
    out.check("sink rate, sigmoid", last("sigmoid"), at_most=5.0, digits=0)
    out.check("loss, sigmoid over softmax", last("sigmoid", LOSS) / last("softmax", LOSS), at_most=1.02, digits=3)
    out.check("sink rate, elu+1 not normalised", last("elu+1, not normalised"), at_most=5.0, digits=0)
    half = 0.5 * last("softmax")
    out.check("sink rate, sigmoid normalised", last("sigmoid, normalised"), at_least=half, digits=0)
    for label in ("softmax, K bias", "softmax, KV bias"):
        out.check(f"sink rate of the first token, {label}", last(label), at_most=half, digits=0)
        out.check(f"sink rate of the slot, {label}", last(label, SLOT), at_least=half, digits=0)
    out.check("sink rate of the first token, softmax, V bias", last("softmax, V bias"), at_least=half, digits=0)
    out.note = (
        f"Whole curves are in the rows. On plain text models of this size grow none: {last('text, softmax'):.0f} % with softmax, "
        f"{last('text, sigmoid'):.0f} % with sigmoid. The metric divides rows by their sum, as the authors' code does; undivided, the "
        f"sigmoid's weight on the first token is {last('sigmoid', RAW):.2f}, the softmax's {last('softmax', RAW):.2f}. The task's start "
        "token is itself a learned key, which leaves a key bias little to take over; without that token no sink forms here."
    )


def _pretrained(out: Outcome, scale: Scale) -> None:
    """Sink rates of a language model on text and on random tokens, and of its like with random weights, texts of 64 tokens."""
    model, tokenizer = scale.language_model()
    windows = [torch.tensor([ids]) for ids in token_windows(tokenizer, 64, scale.pick(16, 2))]
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(model.get_input_embeddings().num_embeddings, ids.shape, generator=generator) for ids in windows
    ]
    torch.manual_seed(0)
    fresh = type(model)(model.config).eval()
    for label, one, texts in ((LM_TEXT, model, windows), (LM_RANDOM, model, noise), (LM_UNTRAINED, fresh, windows)):
        out.add(label, RATE, "percent", [sink_rate(record(one, ids)) for ids in texts])


def _add(out: Outcome, label: str, points: list[SinkPoint], slots: int) -> None:
    """The curve of a training as rows; the loss of the first point, before training, is left out."""
    out.add(label, STEP, "steps", [point.step for point in points])
    out.add(label, RATE, "percent", [point.rates[slots] for point in points])
    out.add(label, DRAWN, "share", [point.importance[slots] for point in points])
    if slots:
        out.add(label, SLOT, "percent", [point.rates[0] for point in points])
    out.add(label, LOSS, "nats per token", [point.loss for point in points[1:]])
