"""004 MoH: tokens need only some of the heads, and the length of the query says which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...methods.call import AttentionCall, Method
from ...methods.edits.query_norm_heads import QueryNormHeads
from ...nn.sequence.mixture_of_heads import MixtureOfHeadAttention
from ..text import token_windows
from .claim import Outcome, Scale
from .language import token_log_probs
from .timing import times

PAPER, SLUG = "004", "moh"
SAYS = (
    "MoH: each token needs only 50 to 90 % of the heads, chosen by the length of its query in a pretrained LLM (the paper tunes the "
    "model on; here it is untouched)."
)


@dataclass
class RandomHeads(QueryNormHeads):
    """The baseline: as many heads, drawn for each token."""

    seed: int = 0

    def _queries(self, call: AttentionCall) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + call.layer)
        return torch.rand(call.q.shape, generator=generator).to(call.q)


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
            f"{active} of {heads} by query norm", figure, "", perplexities(QueryNormHeads(shared, active)), "all heads"
        )
        drawn = [perplexities(RandomHeads(shared, active, seed=seed)) for seed in range(seeds)]
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
    _skipping(out, scale)
    return out


def _skipping(out: Outcome, scale: Scale) -> None:
    """Time of a layer that computes the heads in use alone, beside all heads with the others multiplied by zero (the authors' code)."""
    length, heads, rounds = scale.pick((3136, 8, 5), (64, 8, 2))
    torch.manual_seed(0)
    x = torch.randn(1, length, 64 * heads)
    figure = f"time of a layer, {length} tokens"
    for shared, active in ((1, 3), (2, 6)):
        layers = {
            skip: MixtureOfHeadAttention(64 * heads, heads, shared, active, skip_inactive=skip).eval()
            for skip in (False, True)
        }
        layers[True].load_state_dict(layers[False].state_dict())
        with torch.no_grad():
            gap = float((layers[True](x) - layers[False](x)).abs().max() / layers[False](x).abs().max())
            found = times({str(skip): partial(layer, x) for skip, layer in layers.items()}, rounds)
        base, label = f"{active} of {heads} heads, all computed", f"{active} of {heads} heads, the others skipped"
        out.add(base, figure, "s", found["False"])
        row = out.add(label, figure, "s", found["True"], against=base)
        what = f"{active} of {heads} heads: time of skipping over computing all"
        out.check(what, row.ratio or float("nan"), at_most=1.0, spread=row.spread)
        out.check(f"{active} of {heads} heads: largest difference of the outputs", gap, at_most=1e-5)
