"""028 Attention VAT / iVAT: with few labels and much unlabelled text, perturbed attention learns more than labels alone give."""

from __future__ import annotations

import torch
from torch import Tensor

from ...losses.attention_perturbation import AttentionAT, AttentionVAT, classification_loss
from ...models.attention_classifier import AttentionClassifier
from ...testbeds.text_classification import LabelledTexts, TextBatch, planted_sentiment, text_batches
from .claim import Outcome, Scale
from .text_classifiers import Loss, Task, plain_loss, read, trained

PAPER, SLUG = "028", "attention-vat"
SAYS = (
    "Attention VAT/iVAT: unlabelled text, also from another source, makes a classifier with few labels predict better than AT on the "
    "labels does, and its attention agree more with the words that people mark."
)
PLAIN, AT, VAT, IVAT, OTHER = (
    "labels alone",
    "AT on the labels",
    "VAT",
    "iVAT, differences over the sentence",
    "VAT, text of another source",
)
AUPRC = "attention and rationale, auprc"


def semi(unlabelled: LabelledTexts, task: Task, **options: object) -> Loss:
    """Cross entropy on the labelled batch, VAT on it and on one of unlabelled text."""
    vat, make = AttentionVAT(**options), text_batches(unlabelled, task.vocabulary, 32, task.max_len, 1)  # type: ignore[arg-type]
    count = iter(range(10**9))

    def loss(model: AttentionClassifier, batch: TextBatch) -> Tensor:
        own = vat(model, batch.inputs)
        return (
            classification_loss(own.output.logits, batch.labels) + own.loss + vat(model, make(next(count)).inputs).loss
        )

    return loss


def _at(model: AttentionClassifier, batch: TextBatch) -> Tensor:
    return AttentionAT()(model, batch.inputs, batch.labels).total


def measure(scale: Scale) -> Outcome:
    seeds, count, steps = scale.pick((3, 1500, 200), (2, 120, 4))
    labelled = scale.pick(80, 12)
    out = Outcome(
        f"a BiLSTM of 32 with additive attention, {steps} steps of 32; texts with one planted word of 12 that decides, {labelled} labelled "
        f"and {count} not; perturbations of size 5, not tuned",
        "a seed",
    )
    losses: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        data = planted_sentiment(count, cues=6, length=(8, 20), seed=seed)
        other = planted_sentiment(count, cues=6, length=(20, 40), fill=100, seed=seed + 100)
        task = Task.of(data, 0.3, seed, min_count=1)
        few = Task(task.learn.take(range(labelled)), task.test, task.vocabulary)
        ways: dict[str, Loss] = {
            PLAIN: plain_loss,
            AT: _at,
            VAT: semi(task.learn, task),
            IVAT: semi(task.learn, task, interpretable=True, differences="sentence"),
            OTHER: semi(other, task),
        }
        for label, loss in ways.items():
            torch.manual_seed(seed)
            losses.setdefault(label, []).append(read(trained(few, loss, steps=steps, seed=seed), few))
    for label, runs in losses.items():
        for figure in runs[0]:
            out.add(label, figure, "", [run[figure] for run in runs], against=None if label == PLAIN else PLAIN)

    def gain(label: str, figure: str, over: str) -> float:
        return out.row(label, figure).mean - out.row(over, figure).mean

    for label in (VAT, IVAT, OTHER):
        out.check(f"{label}: accuracy gained over labels alone", gain(label, "accuracy", PLAIN), at_least=0.0, digits=3)
    out.check("VAT: accuracy gained over AT on the labels", gain(VAT, "accuracy", AT), at_least=0.0, digits=3)
    out.check(
        "VAT: agreement with planted words gained over labels alone", gain(VAT, AUPRC, PLAIN), at_least=0.0, digits=3
    )
    out.check("iVAT: agreement with planted words gained over VAT", gain(IVAT, AUPRC, VAT), at_least=0.0, digits=3)
    return out
