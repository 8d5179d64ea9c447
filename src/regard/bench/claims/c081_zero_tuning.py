"""081 ZeroTuning: the first token is the strongest single lever."""

from __future__ import annotations

from ...integrations.transformers import attach
from ...methods.edits import ZeroTuning
from ..tasks import divergence
from ..text import token_windows
from .claim import Outcome, Scale
from .language import next_log_probs

PAPER, SLUG = "081", "zero-tuning"
SAYS = "ZeroTuning: rescaling the attention to the first token moves the output more than rescaling that to any other single token."


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context, prompts = scale.pick(256, 64), scale.pick(4, 2)
    gammas = scale.pick((0.3, 0.6, 2.0, 4.0), (0.5, 4.0))
    rows = context // 2
    places = {"first": 0, "middle": context // 4, "last of the prompt's first half": context // 2 - 1}
    out = Outcome(
        f"{prompts} prompts of {context} tokens, next-token distributions of the second half, gamma {', '.join(map(str, gammas))}",
        "a prompt",
    )
    windows = token_windows(tokenizer, context, prompts)
    dense = [next_log_probs(model, ids, rows) for ids in windows]
    for gamma in gammas:
        for label, key in places.items():
            with attach(model, ZeroTuning(gamma=gamma, key=key)):
                moved = [divergence(before, next_log_probs(model, ids, rows)) for before, ids in zip(dense, windows)]
            out.add(f"{label} key x {gamma:g}", "KL from the model as it is", "nats", moved)
    for gamma in gammas:
        kl = [out.row(f"{label} key x {gamma:g}", "KL from the model as it is").mean for label in places]
        lead = kl[0] / max(*kl[1:], 1e-12)
        out.check(f"KL of the first key over the larger of the others', x {gamma:g}", lead, at_least=2.0, digits=1)
    return out
