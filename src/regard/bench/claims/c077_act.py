"""077 ACT: sinks stand in the middle of the text too, and taking weight from them in chosen heads makes answers better."""

from __future__ import annotations

import random

from ...lens.head_search import next_token_objective, search_heads
from ...lens.record import record
from ...methods.edits import ACT
from ...ops.sink_calibration import sink_keys
from ..text import token_windows
from .claim import Outcome, Scale
from .sentiment import reviews

PAPER, SLUG = "077", "act"
SAYS = (
    "ACT: attention sinks are found beyond the first token, and calibrating them away in heads chosen on labelled prompts raises "
    "accuracy without training, more than doing so in as many random heads."
)


def measure(scale: Scale) -> Outcome:
    import torch

    model, tokenizer = scale.language_model()
    layers = scale.pick(range(2, 29, 3), range(2))
    learn, learn_labels, answers = reviews(tokenizer, scale.pick(16, 4), part=0)
    test, test_labels, _ = reviews(tokenizer, scale.pick(96, 8), part=1)
    depth, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    layers = [layer for layer in layers if layer < depth]
    out = Outcome(
        f"{len(layers) * heads} heads of {len(layers)} layers tried on {scale.pick(16, 4)} reviews, "
        f"tested on {scale.pick(96, 8)} of other words; beta 0.4, threshold 0.1",
        "a prompt",
    )
    shares = []
    for ids in token_windows(tokenizer, scale.pick(128, 48), scale.pick(4, 1)):
        made = record(model, torch.tensor([ids], device=model.device))
        shares.append(
            sum(float((sink_keys(made.weights(layer))[0, :, 1:].any(-1)).float().sum()) for layer in made.layers)
            / (depth * heads)
        )
    out.add("heads with a sink beyond the first token", "share of heads on prose", "", shares)
    searched = next_token_objective(model, learn, learn_labels, objective="log-probability", choices=answers)
    gains = search_heads(model, ACT, searched, layers=layers)
    chosen = gains.above(0.0)
    judged = next_token_objective(model, test, test_labels, choices=answers)
    plain = judged(None)
    out.add("as it is", "accuracy", "", plain)
    found = judged(ACT(chosen)) if chosen else plain
    out.add(f"ACT in the {len(chosen)} chosen heads", "accuracy", "", found, against="as it is")
    tried = [(layer, head) for layer in layers for head in range(heads)]
    seeds = scale.pick(5, 1)
    control = [judged(ACT(random.Random(seed).sample(tried, len(chosen)))) for seed in range(seeds)]
    out.add("ACT in as many random heads", "accuracy (a draw)", "", control)
    mean = sum(control) / len(control)
    out.check("share of heads with a sink beyond the first token", sum(shares) / len(shares), at_least=0.1)
    out.check("accuracy gained on other words", found - plain, at_least=0.02, digits=3)
    out.check(
        "accuracy above that of as many random heads", found - mean, at_least=0.01, digits=3,
        spread=(max(control) - min(control)) / 2,
    )  # fmt: skip
    out.note = (
        "Heads are chosen by the label's log-probability, as 16 prompts are too few for accuracy (the authors use 900)."
    )
    return out
