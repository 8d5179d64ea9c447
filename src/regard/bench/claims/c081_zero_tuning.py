"""081 ZeroTuning: the first token is the strongest single lever."""

from __future__ import annotations

from typing import Any

from ...integrations.transformers import attach
from ...lens.head_profile import fit_zero_tuning
from ...lens.head_search import next_token_objective
from ...methods.edits import ZeroTuning
from ..tasks import divergence
from ..text import token_windows
from .claim import Outcome, Scale
from .language import next_log_probs
from .sentiment import reviews

PAPER, SLUG = "081", "zero-tuning"
SAYS = (
    "ZeroTuning: rescaling the attention to the first token moves the output more than rescaling that to any other single token, and "
    "tuned head by head, with labels or without, it raises accuracy."
)


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
    _answers(scale, out)
    return out


def _answers(scale: Scale, out: Outcome) -> None:
    """Accuracy on labelled reviews: the factor on each key that does best, and the whole procedure without labels."""
    model, tokenizer = scale.language_model()
    count, tried = scale.pick(32, 4), scale.pick((0.25, 0.5, 2.0, 4.0), (0.5, 4.0))
    learn, learn_labels, answers = reviews(tokenizer, count, part=0)
    test, test_labels, _ = reviews(tokenizer, scale.pick(64, 8), part=1)
    judged = next_token_objective(model, test, test_labels, choices=answers)
    plain = judged(None)
    out.add("as it is", "accuracy on reviews", "", plain)
    length = min(int(batch["attention_mask"].sum(1).min()) for batch in (*learn, *test))
    found = {}
    for label, key in {"first": 0, "middle": length // 2, "last": length - 1}.items():
        best = max(tried, key=lambda gamma: _log_probability(model, learn, learn_labels, answers, gamma, key))
        found[label] = judged(ZeroTuning(best, key=key))
        out.add(f"{label} key, the best factor of the grid (x {best:g})", "accuracy on reviews", "", found[label])
    method, profile, _ = fit_zero_tuning(model, learn[:1], gammas=tried, choices=answers)
    tuned = judged(method)
    group = "up" if len(profile.up_heads) >= len(profile.down_heads) else "down"
    out.add(
        f"{len(method.heads)} {group}-effective heads, chosen and tuned by entropy (x {method.gamma:g})",
        "accuracy on reviews",
        "",
        tuned,
    )
    lead = found["first"] - max(found["middle"], found["last"])
    out.check("accuracy with the first key tuned less the better of the others", lead, at_least=0.0)
    out.check("accuracy gained by the procedure without labels", tuned - plain, at_least=0.01)


def _log_probability(model: Any, inputs: Any, labels: Any, choices: Any, gamma: float, key: int) -> float:
    return next_token_objective(model, inputs, labels, objective="log-probability", choices=choices)(
        ZeroTuning(gamma, key=key)
    )
