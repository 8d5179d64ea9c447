"""052 circuit reuse: two tasks share most of their heads, and forcing a few of them to look where they should repairs one task."""

from __future__ import annotations

import time

from ...integrations.transformers import attach
from ...lens.head_scores import HeadScores
from ...lens.patch_effects import path_effects, total_effects
from ...methods.edits import SetAttention
from ...testbeds.circuits import colored_objects, indirect_object
from ...testbeds.pairs import PairBatch
from .circuit_models import answered, circuit_model
from .claim import Outcome, Scale

PAPER, SLUG = "052", "circuit-reuse"
SAYS = (
    "Circuit reuse: the circuits of indirect object identification and of coloured objects share about 78 % of their heads; making four "
    "heads of the first task attend to the wrong colours, as there to the wrong name, lifts coloured objects from 49.6 % to 93.7 %."
)
COUNT = 14  # 5 % of the 270 heads, a step of the circuit


def _circuit(model: object, batch: PairBatch) -> tuple[HeadScores, HeadScores]:
    """Path effects on the logits, and on the queries of the three heads that matter most there."""
    metric = batch.logit_difference()
    movers = path_effects(model, batch.clean, batch.corrupted, metric, progress=False)
    best = movers.top(3)
    senders = path_effects(
        model, batch.clean, batch.corrupted, metric, best, component="q", truncate=False, progress=False
    )
    return movers, senders


def measure(scale: Scale) -> Outcome:
    model, tokenizer = circuit_model(scale)
    pairs, asked = scale.pick((8, 48), (2, 4))
    ioi = answered(scale, model, indirect_object(tokenizer, 4 * pairs), pairs, "pair")
    colors = answered(scale, model, colored_objects(tokenizer, 8 * pairs), pairs, "pair")
    found = {name: _circuit(model, batch) for name, batch in (("names", ioi), ("colours", colors))}
    movers, senders = zip(found["names"], found["colours"])
    heads = movers[0].scores.numel()
    count = min(COUNT, heads // 4)
    out = Outcome(
        f"{heads} heads; circuits from {len(ioi)} and {len(colors)} pairs answered right, repair on {asked} coloured-object prompts",
        "step of the circuit",
    )
    shared = [first.overlap(second, count) for first, second in (movers, senders)]
    whole = [set(found[name][0].top(count)) | set(found[name][1].top(count)) for name in found]
    both = len(whole[0] & whole[1]) / min(map(len, whole))
    out.add("movers; senders to their queries", f"share of the best {count} heads that both tasks have", "", shared)
    chance = max(map(len, whole)) / heads
    out.add("random heads", f"share of the best {count} heads that both tasks have", "", [chance, chance])

    test = colored_objects(tokenizer, asked, seed=1)
    repair = senders[0].top(min(4, count))
    draws = [senders[0].random(4, exclude=repair, seed=seed) for seed in range(3)]
    plain = test.accuracy(model, among_choices=True)
    out.add("untouched", "accuracy among the three colours", "", plain)

    def forced(chosen: list[tuple[int, int]]) -> float:
        return _forced(model, test, chosen)

    fixed, controls = forced(repair), [forced(draw) for draw in draws]
    out.add("four inhibiting heads forced", "accuracy among the three colours", "", fixed)
    out.add("four random heads forced", "accuracy among the three colours", "", controls)

    one = colors.rows([0])
    began = time.perf_counter()
    total_effects(
        model,
        one.clean,
        one.corrupted,
        one.logit_difference(),
        nodes=scale.pick(None, [(0, 0), (1, 1)]),
        progress=False,
    )
    seconds = time.perf_counter() - began
    out.add(
        f"total effects, all positions of {one.clean['input_ids'].shape[1]} tokens", "patching all heads", "s", seconds
    )

    out.check("share of heads in both circuits (both steps)", both, at_least=0.5)
    out.check("beside random heads, times as much", both / chance, at_least=3.0)
    out.check("accuracy gained by forcing four heads", fixed - plain, at_least=0.2)
    mean = sum(controls) / len(controls) - plain
    out.check("accuracy gained with four random heads (mean of 3 draws)", mean, at_most=max(0.0, (fixed - plain) / 2))
    out.check("seconds to patch all heads on one pair", seconds, at_most=180.0, digits=0)
    out.note = "The paper's model is GPT-2 medium; this one hardly does better than chance at coloured objects with one example."
    return out


def _forced(model: object, test: PairBatch, chosen: list[tuple[int, int]]) -> float:
    """Accuracy with the heads' last row split over the wrong colours; prompts one by one, as spans belong to a batch."""
    right = 0.0
    for row in range(len(test)):
        one = test.rows([row])
        with attach(model, SetAttention(dict.fromkeys(chosen, "distractors")), spans=one.spans):  # type: ignore[arg-type]
            right += one.accuracy(model, among_choices=True)
    return right / len(test)
