"""003 Attention AT / iAT: trained against perturbations of its attention, a classifier is as good and its attention nearer to gradients."""

from __future__ import annotations

from statistics import fmean

import torch

from ...losses.attention_perturbation import AttentionAT, classification_loss
from ...models.attention_classifier import AttentionClassifier
from ...testbeds.text_classification import TextBatch, planted_sentiment, python_docs
from .claim import Outcome, Scale
from .text_classifiers import Loss, Task, plain_loss, read, trained

PAPER, SLUG = "003", "attention-at"
SAYS = (
    "Attention AT/iAT: adversarial training on the attention logits keeps or raises accuracy, makes attention correlate more with "
    "gradients, and depends little on the size of the perturbation."
)
PLAIN, AT, IAT, RELEASED = "plain", "AT", "iAT, differences over the sentence", "iAT as released"
PEARSON = "attention and gradients, pearson"


def step(**options: object) -> Loss:
    perturbed = AttentionAT(**options)  # type: ignore[arg-type]
    return lambda model, batch: perturbed(model, batch.inputs, batch.labels).total


def word_step(eps: float) -> Loss:
    """AT on the word embeddings (Miyato et al. 2017), what the paper compares the dependence on eps with."""

    def loss(model: AttentionClassifier, batch: TextBatch) -> torch.Tensor:
        embeds = model.get_input_embeddings()(batch.input_ids)  # type: ignore[misc]
        mask = batch.attention_mask
        clean = classification_loss(model(None, mask, embeds).logits, batch.labels)
        gradient = torch.autograd.grad(clean, embeds, retain_graph=True)[0]
        r = eps * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
        return clean + classification_loss(model(None, mask, embeds + r).logits, batch.labels)

    return loss


def measure(scale: Scale) -> Outcome:
    seeds, epochs, sizes = scale.pick((3, 8, (1.0, 20.0)), (2, 1, (20.0,)))
    docs = python_docs(("concurrency", "network"), (8, 40), drop=("asyncio", "http", "url", "email"))
    planted = planted_sentiment(scale.pick(800, 60), cues=10, noise=0.1, length=(8, 20))
    if scale.quick:
        docs = docs.take(range(0, len(docs), 20))
    tasks = {"docstrings": Task.of(docs), "planted": Task.of(planted, min_count=1)}
    out = Outcome(
        f"a BiLSTM of 32 with additive attention, {epochs} epochs (the second set: {2 * epochs}); {len(docs)} docstrings of Python's "
        f"standard library in two classes, and {len(planted)} texts with one planted word of 20 that decides and 10 % of random labels; "
        "perturbations of size 5",
        "a seed",
    )
    for name, task in tasks.items():
        losses: dict[str, Loss] = {PLAIN: plain_loss, AT: step(), IAT: step(interpretable=True, differences="sentence")}
        if name == "docstrings":
            losses[RELEASED] = step(interpretable=True, variant="released")
        for label, loss in losses.items():
            many = epochs * (2 if name == "planted" else 1)  # few words a text: it takes longer to learn
            runs = [read(trained(task, loss, epochs=many, seed=seed), task) for seed in range(seeds)]
            for figure in runs[0]:
                against = None if label == PLAIN else f"{name}: {PLAIN}"
                out.add(f"{name}: {label}", figure, "", [run[figure] for run in runs], against=against)
        for label in (AT, IAT):
            for figure, least, what in (
                ("accuracy", -0.005, "accuracy gained"),
                (PEARSON, 0.0, "Pearson correlation with gradients gained"),
            ):
                gain = out.row(f"{name}: {label}", figure).mean - out.row(f"{name}: {PLAIN}", figure).mean
                out.check(f"{name}, {label}: {what}", gain, at_least=least, digits=3)
    task, ranges, few = tasks["docstrings"], {}, scale.pick(2, 1)
    for label, make in (("AT", lambda eps: step(eps=eps)), ("AT on embeddings", word_step)):
        means = [fmean(out.row(f"docstrings: {AT}", "accuracy").values[:few])] if label == "AT" else []
        for eps in sizes if label == "AT" else (*sizes, 5.0):
            values = [read(trained(task, make(eps), epochs=epochs, seed=seed), task)["accuracy"] for seed in range(few)]
            means.append(out.add(f"docstrings: {label}, size {eps:g}", "accuracy", "", values).mean)
        ranges[label] = max(means) - min(means)
    out.check(
        "range of accuracy over sizes 1 to 20, AT less AT on embeddings",
        ranges["AT"] - ranges["AT on embeddings"],
        at_most=0.0,
        digits=3,
    )
    out.note = (
        f"Range over sizes: {ranges['AT']:.3f} on attention, {ranges['AT on embeddings']:.3f} on embeddings. iAT with the paper's "
        "differences normalised word by word is AT to first order, so the sentence-wise form is measured."
    )
    return out
