"""092 DHSA: chunks cut where attention changes serve better than even chunks, and both better than a window."""

from __future__ import annotations

from typing import Any

from ...integrations.transformers import attach
from ...methods import SlidingWindow
from ...methods.call import Method
from ...methods.sparse.dhsa import DHSA
from ..tasks import divergence
from ..text import needle_prompt
from .claim import Outcome, Scale
from .language import next_log_probs

PAPER, SLUG = "092", "dhsa"
SAYS = "DHSA: at a small budget, chunks that follow the content choose better keys than fixed blocks, and both beat a sliding window."
LABELS, EVEN, WINDOW = "chunks cut by attention", "even chunks", "sinks and window"
KL, NEEDLE = "KL from dense, second half", "needle log-probability"


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context = scale.pick(768, 200)
    shares = {"an eighth": context // 8, "a quarter": context // 4}
    out = Outcome(f"{context} tokens, {' and '.join(shares)} of the keys read, blocks of 32 queries", "a prompt")
    ways: dict[str, Method | None] = {"dense": None}
    for share, budget in shares.items():
        ways |= {f"{label}, {share}": method for label, method in _ways(budget).items()}
    prompts = [needle_prompt(tokenizer, context, depth, number) for number in range(3) for depth in (0.3, 0.6)]
    kl: dict[str, list[float]] = {label: [] for label in ways}
    needle: dict[str, list[float]] = {label: [] for label in ways}
    for prompt, answer in prompts[: scale.pick(6, 1)]:
        ids, dense = [*prompt, *answer], None
        for label, method in ways.items():
            with attach(model, *([method] if method else [])):
                found = next_log_probs(model, ids[:-1], context // 2)
            dense = found if dense is None else dense  # which comes first
            kl[label].append(divergence(dense, found))
            needle[label].append(float(sum(row[token] for row, token in zip(found[-len(answer) :], answer))))
    for label in ways:
        out.add(label, KL, "nats", kl[label])
        out.add(label, NEEDLE, "nats", needle[label])
    said = [f"Needle: {out.row('dense', NEEDLE).mean:.2f} nats dense"]
    for share in shares:
        labels, even, window = (f"{label}, {share}" for label in (LABELS, EVEN, WINDOW))
        for better, worse in ((labels, even), (even, window)):
            names = f"{better.partition(',')[0]} over {worse.partition(',')[0]}, {share}"
            ratio = out.row(better, KL).mean / max(out.row(worse, KL).mean, 1e-12)
            out.check(f"KL from dense, {names}", ratio, at_most=1.0)
            lead = out.row(better, NEEDLE).mean - out.row(worse, NEEDLE).mean
            out.check(f"needle log-prob, lead of {names}, nats", lead, at_least=0.0)
        three = ", ".join(f"{out.row(label, NEEDLE).mean:.2f}" for label in (labels, even, window))
        said.append(f"at {share} {three} (attention-cut, even, window)")
    out.note = f"{'; '.join(said)}. Boundaries are the training labels, not a trained predictor."
    return out


def _ways(budget: int) -> dict[str, Method]:
    local, sink = budget // 3, budget // 6
    # every query is treated (as published, the last 64 see everything, which would leave a needle nothing to fail at)
    shared: dict[str, Any] = dict(budget=budget, block_q=32, local=local, sink=sink, instruction=0)
    chunks: dict[str, Any] = dict(chunks_per_block=2, theta=None)
    return {
        LABELS: DHSA(**shared, **chunks, predictor="attention", nms=4, share_boundaries=False),
        EVEN: DHSA(**shared, **chunks),
        WINDOW: SlidingWindow(budget - sink, sink=sink),
    }
