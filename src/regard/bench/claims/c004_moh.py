"""004 MoH: tokens need only some of the heads, and the length of the query says which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...methods.call import AttentionCall, Method
from ...ops import route_by_query_norm
from ..text import token_windows
from .claim import Outcome, Scale
from .language import token_log_probs

PAPER, SLUG = "004", "moh"
SAYS = (
    "MoH: each token needs only 50 to 90 % of the heads, chosen by the length of its query in a pretrained LLM (the paper tunes the "
    "model on; here it is untouched)."
)


@dataclass
class RoutedHeads(Method):
    """Switch off, for each token, all but `active` heads (the first `shared` always stay): by query norm, or at random."""

    active: int = 1
    shared: int = 0
    seed: int | None = None

    def edit(self, call: AttentionCall) -> None:
        queries = call.q
        if self.seed is not None:
            generator = torch.Generator().manual_seed(1000 * self.seed + call.layer)
            queries = torch.rand(queries.shape, generator=generator).to(queries)

        def route(out: Tensor) -> Tensor:
            return route_by_query_norm(queries, out, shared=self.shared, active=self.active)

        call.on_output(route)


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    heads = model.config.get_text_config().num_attention_heads
    context, prompts, seeds = scale.pick(384, 64), scale.pick(4, 1), scale.pick(3, 2)
    shared = heads // 2
    windows = token_windows(tokenizer, context, prompts)
    out = Outcome(f"{prompts} texts of {context} tokens, {heads} heads of which {shared} shared", "a text")

    def perplexities(method: Method | None) -> list[float]:
        with attach(model, *([method] if method else [])):
            return [float((-token_log_probs(model, ids, context // 2).mean()).exp()) for ids in windows]

    figure = "perplexity of the second half"
    out.add("all heads", figure, "", perplexities(None))
    for share in (0.9, 0.75, 0.5):
        active = max(shared + 1, round(share * heads))
        routed = out.add(
            f"{active} of {heads} by query norm", figure, "", perplexities(RoutedHeads(active, shared)), "all heads"
        )
        drawn = [perplexities(RoutedHeads(active, shared, seed)) for seed in range(seeds)]
        random = [sum(column) / seeds for column in zip(*drawn)]
        out.add(f"{active} of {heads} at random", figure, "", random, "all heads")
        lead = [value / other for value, other in zip(routed.values, random)]
        out.check(
            f"{active} of {heads} heads: perplexity over that of random heads",
            sum(lead) / len(lead),
            at_most=1.0,
            spread=(max(lead) - min(lead)) / 2,
        )
        if share == 0.75:
            what = f"{active} of {heads} heads: perplexity over that of all"
            out.check(what, routed.ratio or float("nan"), at_most=1.1, spread=routed.spread)
    return out
