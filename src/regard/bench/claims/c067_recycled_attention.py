"""067 Recycled attention: what one token reads most serves the tokens after it, better than a window of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers import attach
from ...methods import H2O, RecycledAttention
from ...methods.caches import RecycledLayer
from ...methods.call import AttentionCall, Method
from ..tasks import divergence, read
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "067", "recycled-attention"
SAYS = (
    "Recycled attention: tokens that a full step reads most are what the next steps need; at the same speed as methods that keep "
    "local context it keeps far more of the long-context quality (twice the RULER score)."
)
RECYCLED, WINDOW, DENSE = "recycled", "sinks and window", "dense"


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context, steps = scale.pick(768, 128), scale.pick(32, 6)
    needles, long = scale.pick(512, 128), scale.pick(16384, 1024)
    out = Outcome(
        f"{context} tokens and {steps} steps after them (mass, KL), {needles} (code), {long} (time); "
        "small caches of 1/16 of it (code: 1/4)",
        "a prompt, or a round",
    )
    _mass(out, model, tokenizer, context, steps, scale.pick(3, 1))
    _quality(out, model, tokenizer, context, steps, scale.pick(2, 1))
    _needle(out, model, tokenizer, needles, scale)
    _time(out, long, scale)
    return out


@dataclass
class _Mass(Method):
    """Looks at the last `steps` rows of a prompt: how much of each falls on what the first of them reads most, or on a window."""

    kept: int = 64
    steps: int = 50
    shares: dict[str, list[Tensor]] = field(default_factory=lambda: {RECYCLED: [], WINDOW: []})

    def edit(self, call: AttentionCall) -> None:
        length, group = call.kv_len, call.num_heads // call.num_kv_heads
        first = length - self.steps
        weights = call.weights(rows=range(first, length))[0]  # (H, steps, M)
        joined = weights[:, 0].unflatten(0, (-1, group)).amax(1)
        chosen = torch.zeros_like(joined, dtype=torch.bool).scatter_(1, joined.topk(self.kept).indices, True)
        key = torch.arange(length)
        for step in range(1, self.steps):
            row = weights[:, step]
            since = (key > first) & (key <= first + step)
            window = (key < 4) | (key > first + step - (self.kept - 4 + step))
            self.shares[RECYCLED].append((row * (chosen.repeat_interleave(group, 0) | since)).sum(-1).mean())
            self.shares[WINDOW].append((row * window).sum(-1).mean())


def _mass(out: Outcome, model: Any, tokenizer: Any, context: int, steps: int, prompts: int) -> None:
    found: dict[str, list[float]] = {RECYCLED: [], WINDOW: []}
    for ids in token_windows(tokenizer, context + steps, prompts):
        method = _Mass(context // 16, steps)
        with attach(model, method), torch.no_grad():
            model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
        for label, shares in method.shares.items():
            found[label].append(float(torch.stack(shares).mean()))
    figure = "share of the attention mass covered"
    out.add(WINDOW, figure, "of 1", found[WINDOW])
    out.add(RECYCLED, figure, "of 1", found[RECYCLED], against=WINDOW)
    missed = [(1 - a) / (1 - b) for a, b in zip(found[RECYCLED], found[WINDOW])]
    out.check("attention mass missed, of a window's", sum(missed) / len(missed), at_most=1.0)


def _ways(kept: int) -> dict[str, Method | None]:
    return {
        DENSE: None,
        f"{RECYCLED}, every 10th step full": RecycledAttention(kept, 10),
        f"{RECYCLED}, every 50th step full": RecycledAttention(kept, 50),
        f"{RECYCLED}, by query similarity": RecycledAttention(kept, 50, trigger="similarity", threshold=0.8),
        WINDOW: RecycledAttention(kept, 1 << 30, choice="recent"),
        "H2O": H2O(kept),
    }


def _quality(out: Outcome, model: Any, tokenizer: Any, context: int, steps: int, prompts: int) -> None:
    """Divergence from dense while decoding real text after a prompt read in full."""
    ways = _ways(context // 16)
    found: dict[str, list[float]] = {label: [] for label in ways}
    for ids in token_windows(tokenizer, context + steps, prompts):
        dense = None
        for label, method in ways.items():
            with attach(model, *([method] if method else [])):
                rows = read(model, ids[:context], ids[context:]).log_probs
            dense = rows if dense is None else dense
            found[label].append(divergence(dense, rows))
    figure = "KL from dense, decoded text"
    for label in [WINDOW, *(label for label in ways if label not in (WINDOW, DENSE))]:
        out.add(label, figure, "nats", found[label], against=None if label == WINDOW else WINDOW)
    for label in (f"{RECYCLED}, every 10th step full", f"{RECYCLED}, every 50th step full"):
        out.check(f"KL from dense, {label}, of a window's", out.row(label, figure).ratio, at_most=1.0)  # type: ignore[arg-type]


def _needle(out: Outcome, model: Any, tokenizer: Any, context: int, scale: Scale) -> None:
    """A code of ten digits in the middle of the prompt, asked for at its end; digits after the first are decoded."""
    ways = _ways(context // 4)  # 1/16 of so short a prompt would be 32 tokens
    found: dict[str, list[float]] = {label: [] for label in ways}
    prompts = scale.pick(2, 1)
    generator = torch.Generator().manual_seed(0)
    for hay in token_windows(tokenizer, context, prompts):
        code = "".join(str(digit) for digit in torch.randint(0, 10, (10,), generator=generator).tolist())
        needle, question, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"\nThe code of the north gate is {code}.\n", "\nThe code of the north gate is ", code)
        )
        room = context - len(needle) - len(question)
        prompt = hay[: room // 2] + needle + hay[room // 2 : room] + question
        for label, method in ways.items():
            with attach(model, *([method] if method else [])):
                rows = read(model, prompt, answer).log_probs[1:]
            found[label].append(float(sum(row[token] for row, token in zip(rows, answer[1:]))))
    figure = "log-probability of a decoded code"
    for label in ways:
        out.add(label, figure, "nats", found[label])
    recycled = f"{RECYCLED}, every 50th step full"
    lead = out.row(recycled, figure).mean - out.row(WINDOW, figure).mean
    out.check("log-prob of a code, lead over a window, nats", lead, at_least=1.0)
    lost = out.row(DENSE, figure).mean - out.row(recycled, figure).mean
    out.note = f"Code: {lost:.2f} nats behind dense. The window is the same cache with first and recent tokens in place of the most read."


@torch.no_grad()
def _time(out: Outcome, context: int, scale: Scale) -> None:
    """One attention layer of SmolLM2's shape, decoding: 50 steps of which one is full, against the full ones."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, context, 64, generator=generator) for heads in (9, 3, 3))
    steps, things = scale.pick(50, 4), {}
    for label, stride in ((DENSE, 1), (f"{RECYCLED}, stride {steps}", steps)):
        layer = RecycledLayer(RecycledAttention(context // 16, stride))
        layer.update(k, v)
        call = _call(layer, q, k, v)
        layer.begin(call, *layer.take(call)[:2])
        things[label] = _stepper(layer, q, k, v, steps)
    measured = times(things, scale.pick(4, 1), scale.pick(2, 1))
    figure = "attention time per token"
    for label, seconds in measured.items():
        out.add(label, figure, "s", [s / steps for s in seconds], against=None if label == DENSE else DENSE)
    row = out.row(f"{RECYCLED}, stride {steps}", figure)
    out.check("attention time per token, of full steps", row.ratio, at_most=scale.pick(0.3, 1.5), spread=row.spread)  # type: ignore[arg-type]


def _stepper(layer: RecycledLayer, q: Tensor, k: Tensor, v: Tensor, steps: int) -> Callable[[], None]:
    def decode() -> None:
        for at in range(steps):
            one = slice(at, at + 1)
            _attend(layer, q[:, :, one], k[:, :, one], v[:, :, one])

    return decode


@torch.no_grad()
def _attend(layer: RecycledLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    layer.update(k, v)
    return layer.attend(_call(layer, q, k, v))


def _call(layer: RecycledLayer, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
    return AttentionCall(nn.Identity(), 0, q, k, v, causal=True, cache=layer, num_layers=1)
