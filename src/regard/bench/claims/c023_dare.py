"""DARE: vectors of their own for attention and representation against shared ones, on clicks whose truth is known."""

from __future__ import annotations

import torch

from ...lens.click_models import gradient_conflict, search_quality
from ...models.dare import DARE
from ...testbeds.recommendation.clicks import ClickRows, evaluate_clicks
from ...testbeds.recommendation.metrics import auc
from ...testbeds.recommendation.synthetic import ClickWorld
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER = "023"
SLUG = "dare"
SAYS = (
    "Attention and representation pull shared vectors against each other in more than half of the steps; with vectors of their own (DARE) "
    "the search finds more of what matters and the AUC rises, which linear projections of shared vectors do not reach; attention vectors "
    "of half the width cost almost nothing."
)
AUC, QUALITY = "AUC", "worth of the places searched, of the best"
LENGTH, TOP_K = 50, 10
DIMS = (8, 8, 8)


def measure(scale: Scale) -> Outcome:
    count, steps, seeds = scale.pick((40_000, 300, 2), (1_000, 4, 1))
    out = Outcome(
        f"{count} rows with histories of up to {LENGTH} of 400 items in 20 categories, where a click hangs on the recent past of the "
        f"target's category; {DIMS[0]} channels a field, search for {TOP_K}, {steps} steps of 512",
        repeats="world and seed",
    )
    kinds = {
        "shared (TWIN)": {"tables": "twin"},
        "shared, projected": {"tables": "projection"},
        "apart (DARE)": {"tables": "dare"},
        "apart, attention half as wide": {"tables": "dare", "attention_dims": tuple(width // 2 for width in DIMS)},
    }
    areas: dict[str, list[float]] = {label: [] for label in (*kinds, "the truth")}
    found: dict[str, list[float]] = {label: [] for label in kinds}
    against: list[float] = []
    for seed in range(seeds):
        world = ClickWorld(seed=seed)
        rows, test = world.rows(count, LENGTH, seed=2 * seed + 10), world.rows(4000, LENGTH, seed=2 * seed + 11)
        areas["the truth"].append(auc(world.chances(test), test.label))
        for label, options in kinds.items():
            torch.manual_seed(seed)
            model = DARE(401, 21, DIMS, num_positions=LENGTH + 1, top_k=TOP_K, **options)  # type: ignore[arg-type]
            conflicts: list[float] = []

            def loss(
                model: torch.nn.Module,
                batch: dict[str, torch.Tensor],
                seen: list[float] | None = conflicts if label == "shared (TWIN)" else None,
            ) -> torch.Tensor:
                if seen is not None:
                    seen.append(gradient_conflict(model, batch).mean)  # type: ignore[arg-type]
                return model(batch).loss

            train(
                model,
                rows.batches(512, seed),
                steps=steps,
                loss=loss,
                lr=1e-2,
                weight_decay=0.0,
                seed=seed,
                progress=False,
            )
            areas[label].append(evaluate_clicks(model, test)["auc"])
            found[label].append(_quality(model, world, test))
            if conflicts:
                against.append(sum(one < 0 for one in conflicts) / len(conflicts))
    for label, values in areas.items():
        out.add(label, AUC, "", values, against=None if label == "shared (TWIN)" else "shared (TWIN)")
    for label, values in found.items():
        out.add(label, QUALITY, "", values, against=None if label == "shared (TWIN)" else "shared (TWIN)")
    out.add("shared (TWIN)", "steps in which attention and representation disagree", "", against)

    def gain(figure: str, one: str, other: str) -> float:
        return out.row(one, figure).mean - out.row(other, figure).mean

    out.check("AUC, apart above shared", gain(AUC, "apart (DARE)", "shared (TWIN)"), at_least=0.002, digits=3)
    out.check(
        "AUC, apart above shared and projected", gain(AUC, "apart (DARE)", "shared, projected"), at_least=0.0, digits=3
    )
    out.check(
        "AUC, half width above full",
        gain(AUC, "apart, attention half as wide", "apart (DARE)"),
        at_least=-0.005,
        digits=3,
    )
    out.check(
        "worth of the places searched, apart above shared", gain(QUALITY, "apart (DARE)", "shared (TWIN)"), at_least=0.0
    )
    out.check("share of steps that disagree", sum(against) / len(against), at_least=0.5)
    return out


@torch.no_grad()
def _quality(model: DARE, world: ClickWorld, rows: ClickRows) -> float:
    """Mean over rows of how much of the true weight the search finds."""
    scores = model.eval()(rows.batch()).attended.scores
    return float(search_quality(scores, world.weights(rows), TOP_K).nanmean())
