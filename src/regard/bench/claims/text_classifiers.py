"""Small text classifiers for claims about attention: trained alike but for the loss, and read the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lens.agreement import attention_agreement, rationale_agreement
from ...losses.attention_perturbation import classification_loss
from ...models.attention_classifier import AttentionClassifier
from ...testbeds.text_classification import LabelledTexts, TextBatch, Vocabulary, text_batch, text_batches
from ...testbeds.training import train

__all__ = ["Task", "plain_loss", "read", "trained"]

Loss = Callable[[Any, Any], Tensor]
"""(AttentionClassifier, TextBatch) -> scalar."""


@dataclass(frozen=True)
class Task:
    """Texts to learn from and to test on, with the vocabulary of the first."""

    learn: LabelledTexts
    test: LabelledTexts
    vocabulary: Vocabulary
    max_len: int = 60

    @classmethod
    def of(cls, data: LabelledTexts, share: float = 0.3, seed: int = 0, min_count: int = 2, max_len: int = 60) -> Task:
        learn, test = data.split(share, seed)
        return cls(learn, test, Vocabulary(learn.texts, min_count), max_len)


def plain_loss(model: Any, batch: TextBatch) -> Tensor:
    return classification_loss(model(**batch.inputs).logits, batch.labels)


def trained(
    task: Task,
    loss: Loss = plain_loss,
    *,
    epochs: int = 8,
    batch: int = 32,
    seed: int = 0,
    embed_dim: int = 64,
    hidden: int = 32,
    steps: int | None = None,
    **options: Any,
) -> AttentionClassifier:
    """A BiLSTM with additive attention, Adam (amsgrad) at 1e-3, as 003 trains it but smaller; in eval mode."""
    torch.manual_seed(seed)
    model = AttentionClassifier(len(task.vocabulary), len(task.learn.names), embed_dim, hidden, **options)
    make = text_batches(task.learn, task.vocabulary, batch, task.max_len, seed)
    count = epochs * -(-len(task.learn) // batch) if steps is None else steps
    train(
        model, make, steps=count, loss=loss, schedule="constant", warmup=0, clip=None, seed=seed, progress=False,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, weight_decay=1e-5, amsgrad=True),
    )  # fmt: skip
    return model.eval()


def read(model: AttentionClassifier, task: Task) -> dict[str, float]:
    """On the test texts: accuracy, mean correlation of attention with gradients, and agreement with rationales if there are any."""
    batch = text_batch(task.test, task.vocabulary, max_len=task.max_len)
    with torch.no_grad():
        made = model(**batch.inputs)
    found = {"accuracy": float((made.logits.argmax(1) == batch.labels).float().mean())}
    for kind, values in attention_agreement(model, batch.inputs).items():
        if kind != "spearman":
            found[f"attention and gradients, {kind}"] = float(values.nanmean())
    if batch.rationales is not None:
        figures = rationale_agreement(made.attention, batch.rationales, batch.attention_mask)
        found["attention and rationale, auprc"] = figures["auprc"]
    return found
