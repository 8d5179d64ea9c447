"""016 retrieval heads: few heads copy from the context, and without them the needle is lost."""

from __future__ import annotations

from ...integrations.transformers import attach
from ...lens.needle import NeedleHaystack
from ...lens.retrieval_heads import retrieval_heads
from ...methods.edits import MaskHeads
from ..text import needle_prompt
from .claim import Outcome, Scale
from .language import decoded_log_prob, filled_cache

PAPER, SLUG = "016", "retrieval-heads"
SAYS = (
    "Retrieval heads: fewer than 5 % of the heads score above 0.1 (a copying score), and masking them loses the needle while masking "
    "as many random heads does not."
)


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    lengths, context = scale.pick((256, 512), (220,)), scale.pick(512, 200)
    hay = NeedleHaystack(lengths=lengths, depths=(20, 60))
    scores = retrieval_heads(model, tokenizer, hay, decode="forced")
    out = Outcome(
        f"{scores.num_layers * scores.num_heads} heads, haystacks of {', '.join(map(str, lengths))} tokens", "a prompt"
    )
    share = scores.share_above(0.1)
    out.add("heads with a score above 0.1", "share of all heads", "", share)
    out.add("the best head", "retrieval score", "", scores[scores.top(1)[0]])
    short = NeedleHaystack(lengths=lengths[:1], depths=scale.pick((20, 60), (60,)))
    sets = retrieval_heads(model, tokenizer, short, decode="forced", count="set")
    out.add("heads with a score above 0.1, tokens counted once", "share of all heads", "", sets.share_above(0.1))

    count = scale.pick(0.05, 0.25)
    ways = {"nothing masked": [], "top heads masked": scores.top(count)}
    seeds = scale.pick(5, 2)
    ways |= {f"random heads masked {seed}": scores.random(count, exclude=count, seed=seed) for seed in range(seeds)}
    prompts = [needle_prompt(tokenizer, context, depth, number) for number in range(3) for depth in (0.2, 0.5, 0.8)]
    found: dict[str, list[float]] = {label: [] for label in ways}
    for prompt, answer in prompts[: scale.pick(9, 2)]:
        cache = filled_cache(model, prompt[:-1])  # heads are masked while decoding only, so one prefill serves all
        for label, heads in ways.items():
            with attach(model, *([MaskHeads(heads)] if heads else [])):
                found[label].append(decoded_log_prob(model, cache, prompt[-1], answer))
    for label in ways:
        out.add(label, "needle log-probability", "nats", found[label])
    whole = out.row("nothing masked", "needle log-probability").mean
    top = whole - out.row("top heads masked", "needle log-probability").mean
    random = [whole - sum(v) / len(v) for label, v in found.items() if label.startswith("random")]
    masked = len(ways["top heads masked"])
    out.check("share of heads with a score above 0.1", share, at_most=0.05, digits=3)
    out.check("the same with each copied token counted once", sets.share_above(0.1), at_most=0.05, digits=3)
    alike = scores.correlation(sets)
    out.check("rank correlation of the two counts", alike if alike == alike else 0.0, at_least=0.8)
    out.check(f"needle log-prob lost with the top {masked} heads masked, nats", top, at_least=1.0)
    spread = (max(random) - min(random)) / 2
    mean = sum(random) / len(random)
    out.check(f"lost with {masked} random heads masked (mean of {seeds} draws)", mean, at_most=top / 4, spread=spread)
    out.note = "Scores and masking use different needles; scoring feeds the needle's answer (a model this small does not always find it)."
    return out
