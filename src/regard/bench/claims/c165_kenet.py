"""165 KeNet: knowledge about what a short document names tells its labels."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.kenet import KeNet, label_vectors, local_knowledge
from ...testbeds.text_classification import Vocabulary
from ..metrics_multilabel import multilabel_scores
from .claim import Outcome, Scale

PAPER, SLUG = "165", "kenet"
SAYS = (
    "KeNet: retrieved knowledge, label embeddings and attention of labels to both raise F1 and lower the Hamming loss of multi-label "
    "classification of short texts."
)
LABELS, THEMES, KINDS = 12, 4, 3


def texts(count: int, seed: int) -> tuple[list[list[str]], Tensor, dict[str, list[str]]]:
    """Documents of 6 to 10 words that name one to three entities of many; what an entity stands for is in the table alone, except for the
    most frequent ones, which a model can learn by heart. Labels are "theme<t> kind<k>", rarer the higher."""
    draw, table = random.Random(1), {}
    label_of = {}
    for number in range(300):
        label = min(int(draw.expovariate(0.25)), LABELS - 1)
        entity = f"entity{number}"
        label_of[entity] = label
        words = [f"theme{label % THEMES}", f"kind{label // THEMES}"]
        table[entity] = (
            [f"fact{draw.randrange(60)}" for _ in range(3)] + words + [f"fact{draw.randrange(60)}" for _ in range(2)]
        )
    draw = random.Random(seed)
    documents, truth = [], torch.zeros(count, LABELS)
    for row in range(count):
        words = [f"word{draw.randrange(80)}" for _ in range(draw.randint(6, 10))]
        for place in draw.sample(range(len(words)), draw.randint(1, 3)):
            words[place] = f"entity{draw.randrange(300)}"
            truth[row, label_of[words[place]]] = 1
        documents.append(words)
    return documents, truth, table


def _padded(rows: list[list[str]], vocabulary: Vocabulary) -> Tensor:
    ids = [torch.tensor(vocabulary.encode(row), dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def measure(scale: Scale) -> Outcome:
    seeds, steps, count = scale.pick((3, 300, 1000), (2, 3, 60))
    out = Outcome(
        f"{count} made documents of 6 to 10 words that name entities, 12 labels of uneven frequency, knowledge from a table; BiLSTM of 32, "
        f"{steps} steps of 32",
        "a seed",
    )
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        learn, truth, table = texts(count, 10 + seed)
        test, wanted, _ = texts(scale.pick(1000, 60), 1000 + seed)
        vocabulary = Vocabulary([*learn, *table.values()])
        sets = []
        for rows in (learn, test):
            known = [local_knowledge(row, table) for row in rows]
            sets.append((_padded(rows, vocabulary), _padded(known, vocabulary)))
        generator = torch.Generator().manual_seed(seed)
        words = [f"{stem}{number}" for stem, many in (("theme", THEMES), ("kind", KINDS)) for number in range(many)]
        vectors = {word: torch.randn(32, generator=generator) for word in words}
        named = label_vectors([f"theme{label % THEMES} kind{label // THEMES}" for label in range(LABELS)], vectors)
        ways = {
            "document alone": {"use_knowledge": False, "label_init": named},
            "KeNet, labels without names": {},
            "KeNet": {"label_init": named},
        }
        for label, options in ways.items():
            torch.manual_seed(seed)
            model = KeNet(len(vocabulary), LABELS, 32, 32, **options)  # type: ignore[arg-type]
            with torch.no_grad():  # names of labels and words of texts speak the same language, as with GloVe
                for word, vector in vectors.items():
                    model.embed.weight[vocabulary.numbers[word]] = vector  # type: ignore[index, operator]
            _train(model, *sets[0], truth, steps, seed)
            with torch.no_grad():
                logits = model.eval()(sets[1][0], None, sets[1][1]).logits
            found.setdefault(label, []).append(multilabel_scores(logits > 0, wanted))
    for label, runs in found.items():
        for figure in ("micro_f1", "macro_f1", "hamming_loss"):
            against = None if label == "document alone" else "document alone"
            out.add(label, figure, "", [run[figure] for run in runs], against=against)
    without, whole = "document alone", "KeNet"
    for figure in ("micro_f1", "macro_f1"):
        out.check(
            f"{figure} gained by knowledge",
            out.row(whole, figure).mean - out.row(without, figure).mean,
            at_least=0.02,
            digits=3,
        )
    ratio = out.row(whole, "hamming_loss").mean / max(out.row(without, "hamming_loss").mean, 1e-9)
    out.check("Hamming loss, of that without knowledge", ratio, at_most=0.95)
    rare = out.row(whole, "macro_f1").mean - out.row("KeNet, labels without names", "macro_f1").mean
    out.check("macro F1 gained by label embeddings", rare, at_least=0.0, digits=3)
    out.note = "The network is a reconstruction: the paper's formulas are not public in code."
    return out


def _train(model: KeNet, ids: Tensor, known: Tensor, truth: Tensor, steps: int, seed: int) -> None:
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(ids), (32,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(
            model(ids[rows], None, known[rows]).logits, truth[rows], reduction="sum"
        ) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
