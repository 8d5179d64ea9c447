"""166 PSSAttention: words that the model found and then had to do without are taught to its attention, and it finds rare ones too."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lens.agreement import rationale_agreement
from ...losses.attention_supervision import MinedAttention, ProgressiveAttentionMiner, attention_supervision_loss
from ...models.aspect_classifier import AspectClassifier
from ...testbeds.aspects import AspectTexts, aspect_batch, planted_aspects
from ...testbeds.text_classification import Vocabulary
from .claim import Outcome, Scale

PAPER, SLUG = "166", "pss-attention"
SAYS = (
    "PSSAttention: mining influential words by masking them in turn and supervising attention with them raises accuracy in aspect-based "
    "sentiment, most where the model had learned too much from frequent words; it saturates after some rounds."
)
PLAIN = "plain"


class _Set:
    """Texts as tensors, whole."""

    def __init__(self, texts: AspectTexts, vocabulary: Vocabulary) -> None:
        self.batch, self.aspect = aspect_batch(texts, vocabulary)
        self.rare = torch.tensor([any(word.startswith("rare") for word in text) for text in texts.data.texts])


def _run(
    model: AspectClassifier, data: _Set, rows: Tensor | slice, erased: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logits, attention) of some rows, with what is erased as padding."""
    ids, mask = data.batch.input_ids[rows], data.batch.attention_mask[rows].bool()
    if erased is not None:
        ids, mask = ids.masked_fill(erased[rows], 0), mask & ~erased[rows]
    made = model(ids, mask, data.aspect[rows])
    return made.logits, made.attention


def _train(
    data: _Set,
    words: int,
    steps: int,
    seed: int,
    erased: Tensor | None = None,
    taught: tuple[Tensor, Tensor] | None = None,
    lam: float = 0.5,
) -> AspectClassifier:
    torch.manual_seed(seed)
    model = AspectClassifier(words, 3, 32, encoder="none", dropout=0.1)
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(seed)
    count = len(data.batch.labels)
    for _ in range(steps):
        rows = torch.randint(count, (64,), generator=generator)
        logits, weights = _run(model, data, rows, erased)
        loss = F.cross_entropy(logits, data.batch.labels[rows])
        if taught is not None:
            loss = loss + lam * attention_supervision_loss(weights, taught[0][rows], taught[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _mine(data: _Set, words: int, steps: int, rounds: int, seed: int) -> MinedAttention:
    def train_round(number: int, erased: Tensor) -> tuple[Tensor, Tensor]:
        model = _train(data, words, steps, 100 * seed + number, erased)
        with torch.no_grad():
            logits, weights = _run(model, data, slice(None), erased)
        return weights, logits.argmax(1) == data.batch.labels

    return ProgressiveAttentionMiner(rounds).run(train_round, data.batch.attention_mask)


def _read(model: AspectClassifier, data: _Set) -> dict[str, float]:
    with torch.no_grad():
        logits, weights = _run(model, data, slice(None))
    right = (logits.argmax(1) == data.batch.labels).float()
    assert data.batch.rationales is not None
    agreement = rationale_agreement(weights, data.batch.rationales, data.batch.attention_mask)
    return {
        "accuracy": float(right.mean()),
        "accuracy, rare words": float(right[data.rare].mean()),
        "attention and rationale, auprc": agreement["auprc"],
    }


def measure(scale: Scale) -> Outcome:
    seeds, steps, count, rounds = scale.pick((4, 250, 1200, 5), (2, 3, 60, 2))
    kept = scale.pick((1, 3, 5), (1, 2))
    out = Outcome(
        f"aspect attention over embeddings of 32, {steps} steps of 64; texts in three classes whose deciding word is frequent in 70 % "
        f"and one of 40 rare ones a class, beside a decoy, in the others; {rounds} rounds of mining, lam 0.5",
        "a seed",
    )
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        learn, test = planted_aspects(count, seed=seed), planted_aspects(scale.pick(1500, 60), seed=1000 + seed)
        vocabulary = Vocabulary(learn.data.texts)
        known, asked = _Set(learn, vocabulary), _Set(test, vocabulary)
        fit = partial(_train, known, len(vocabulary), steps, seed)
        found.setdefault(PLAIN, []).append(_read(fit(), asked))
        mined = _mine(known, len(vocabulary), steps, rounds, seed)
        for used in kept:
            found.setdefault(f"supervised, {used} rounds", []).append(_read(fit(taught=mined.targets(used)), asked))
        label = f"supervised, {rounds} rounds, the paper's targets"
        found.setdefault(label, []).append(_read(fit(taught=mined.targets(rounds, "uniform")), asked))
    for label, runs in found.items():
        for figure in runs[0]:
            out.add(label, figure, "", [run[figure] for run in runs], against=None if label == PLAIN else PLAIN)
    best = max((label for label in found if label != PLAIN), key=lambda label: out.row(label, "accuracy").mean)
    for figure in found[PLAIN][0]:
        gain = out.row(best, figure).mean - out.row(PLAIN, figure).mean
        out.check(f"{figure}: gained by supervision, best number of rounds", gain, at_least=0.0, digits=3)
    first, last = (out.row(f"supervised, {used} rounds", "accuracy").mean for used in (kept[0], kept[-1]))
    middle = max(out.row(f"supervised, {used} rounds", "accuracy").mean for used in kept)
    out.check("accuracy of more rounds over that of one, best", middle - first, at_least=0.0, digits=3)
    out.note = f"Best: {best}. Accuracy with one round {first:.3f}, with all {last:.3f}; chosen on the test texts, as in the paper."
    return out
