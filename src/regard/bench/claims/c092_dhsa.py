"""092 DHSA: chunks cut where attention changes serve better than even chunks, and both better than a window."""

from __future__ import annotations

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
    budget, local, sink = context // 8, context // 24, context // 48
    # every query is treated (as published, the last 64 see everything, which would leave a needle nothing to fail at)
    shared = dict(budget=budget, block_q=32, local=local, sink=sink, chunks_per_block=2, theta=None, instruction=0)
    ways: dict[str, Method | None] = {
        "dense": None,
        LABELS: DHSA(**shared, predictor="attention", nms=4, share_boundaries=False),
        EVEN: DHSA(**shared),
        WINDOW: SlidingWindow(budget - sink, sink=sink),
    }
    out = Outcome(
        f"{context} tokens, {budget} keys a query (an eighth), blocks of 32 queries, {local} local, {sink} sinks",
        "a prompt",
    )
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
    means = {label: (out.row(label, KL).mean, out.row(label, NEEDLE).mean) for label in ways}
    out.check(
        "KL from dense, attention-cut chunks over even ones", means[LABELS][0] / max(means[EVEN][0], 1e-12), at_most=1.0
    )
    out.check("KL, even chunks over window", means[EVEN][0] / max(means[WINDOW][0], 1e-12), at_most=1.0)
    out.check(
        "needle log-prob, lead of attention-cut chunks over even ones, nats",
        means[LABELS][1] - means[EVEN][1],
        at_least=0.0,
    )
    out.check("lead of even chunks over window, nats", means[EVEN][1] - means[WINDOW][1], at_least=0.0)
    out.note = (
        f"Needle: {means['dense'][1]:.2f} nats dense, {means[LABELS][1]:.2f} attention-cut, {means[EVEN][1]:.2f} even, "
        f"{means[WINDOW][1]:.2f} window. Boundaries are the training labels, not a trained predictor."
    )
    return out
