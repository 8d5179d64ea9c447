"""MQSA-TED: queries of two lengths and distilled transitions against SASRec, on sequences whose truth is known."""

from __future__ import annotations

import torch

from ...losses.transition_distillation import TransitionDistilledLoss, transition_counts
from ...models.mqsa_ted import MQSATED
from ...testbeds.recommendation.interactions import LeaveOneOut
from ...testbeds.recommendation.metrics import rank_metrics
from ...testbeds.recommendation.sequences import evaluate_ranking, next_item_batches
from ...testbeds.recommendation.synthetic import TransitionWorld
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER = "062"
SLUG = "mqsa-ted"
SAYS = (
    "Beside short queries, long ones (the mean of the last steps) help to rank the next item, and item transitions distilled into the item "
    "vectors help further: MQSA-TED is above SASRec by several percent on every data set."
)
NDCG, HR = "NDCG@10", "HR@10"
LENGTH = 12


def measure(scale: Scale) -> Outcome:
    users, steps, seeds = scale.pick((1200, 450, 2), (60, 5, 1))
    out = Outcome(
        f"sequences of {LENGTH} items of {users} users of 10 kinds over 300 items, half of the steps a transition and half by taste; leave "
        f"one out, full ranking of items not met; 32 channels trained here for {steps} steps of 128, dropout 0.3",
        repeats="world and seed",
    )
    settings = {
        "SASRec": ((1,), (1.0,), 0.0),
        "MQSA": ((1, 3), (0.5, 0.5), 0.0),
        "MQSA-TED": ((1, 3), (0.5, 0.5), 0.1),
        "MQSA-TED, weight 1": ((1, 3), (0.5, 0.5), 1.0),
    }
    found: dict[str, list[dict[str, float]]] = {label: [] for label in (*settings, "the truth")}
    spread: list[list[float]] = [[], []]
    for seed in range(seeds):
        world = TransitionWorld(300, 10, 3, 0.5, seed=seed)
        met, kind = world.interactions(users, LENGTH, seed=seed)
        split = met.leave_one_out()
        counts = transition_counts(split.train, met.num_items)
        for label, (windows, weights, weight) in settings.items():
            torch.manual_seed(seed)
            model = MQSATED(met.num_items, 32, max_len=LENGTH, windows=windows, weights=weights, dropout=0.3)
            batches = next_item_batches(split.train, met.num_items, LENGTH, 128, seed)
            loss = TransitionDistilledLoss(counts, weight)
            train(model, batches, steps=steps, loss=loss, lr=3e-3, weight_decay=0.0, seed=seed, progress=False)
            found[label].append(evaluate_ranking(model, split, length=LENGTH, k=(10,)))
            if label == "MQSA":
                for side, weight_of in zip(spread, model.eval().attention_weights(batches(0)[0])):
                    side.append(float(torch.special.entr(weight_of[:, :, -1]).sum(-1).mean()))
        found["the truth"].append(_best(world, split, kind))
    for figure, name in ((NDCG, "ndcg@10"), (HR, "hr@10")):
        for label, each in found.items():
            out.add(label, figure, "", [one[name] for one in each], against=None if label == "SASRec" else "SASRec")
    for label, side in zip(("MQSA, short queries", "MQSA, long queries"), spread):
        out.add(label, "entropy of attention, last place", "nat", side)

    def mean(label: str) -> float:
        return out.row(label, NDCG).mean

    out.check("NDCG@10, MQSA over SASRec", mean("MQSA") / mean("SASRec"), at_least=1.0)
    out.check("NDCG@10, MQSA-TED over MQSA", mean("MQSA-TED") / mean("MQSA"), at_least=1.0)
    out.check("NDCG@10, MQSA-TED over SASRec", mean("MQSA-TED") / mean("SASRec"), at_least=1.05)
    return out


def _best(world: TransitionWorld, split: LeaveOneOut, kind: torch.Tensor) -> dict[str, float]:
    """What the true chances reach."""
    seen = torch.zeros(len(split.test), split.num_items, dtype=torch.bool)
    for row, items, last in zip(seen, split.train, split.valid):
        row[items], row[last] = True, True
    return rank_metrics(world.chances(split.valid, kind), split.test, seen, (10,))
