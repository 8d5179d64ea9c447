"""176 correct-letter heads: few nodes write the answer's letter, some heads read it off, and three dimensions are enough for that."""

from __future__ import annotations

from typing import Any

import torch

from ...integrations.transformers import attach
from ...lens.letter_heads import head_subspace, letter_heads, nodes_needed, value_weighted_attention
from ...lens.patch_effects import direct_effects
from ...methods.edits.project_head import HeadSubspace, ProjectHead
from ...testbeds.circuits import multiple_choice
from ...testbeds.pairs import PairBatch
from .circuit_models import answered, circuit_model
from .claim import Outcome, Scale

PAPER, SLUG = "176", "letter-heads"
SAYS = (
    "Correct-letter heads: some 45 of 5200 heads and MLPs explain most of the direct effect on the answer's letter; some heads attend to "
    "the right label; about 3 dimensions of their queries and keys keep what they do, and keep less of it where labels are random letters."
)
ACCURACY = "accuracy among the labels"


def _place(batch: PairBatch) -> torch.Tensor:
    assert batch.choices is not None
    return (batch.choices == batch.right[:, None]).int().argmax(1)


def _accuracy(model: Any, batch: PairBatch, heads: list[HeadSubspace]) -> float:
    assert batch.labels is not None
    right = 0.0
    for row in range(0, len(batch), 16):
        some = batch.rows(range(row, min(row + 16, len(batch))))
        assert some.labels is not None
        with attach(model, *([ProjectHead(heads, some.labels)] if heads else [])):
            right += some.accuracy(model, among_choices=True) * len(some)
    return right / len(batch)


def measure(scale: Scale) -> Outcome:
    model, tokenizer = circuit_model(scale)
    prompts, asked = scale.pick((12, 64), (2, 4))
    batch = answered(scale, model, multiple_choice(tokenizer, 4 * prompts, order="word"), 4 * prompts, "choice")
    few = batch.rows(range(min(prompts, len(batch))))
    margin = few.label_margin()
    effects = {
        of: direct_effects(model, few.clean, few.corrupted, margin, of=of, relative="none", progress=False)
        for of in ("head", "mlp")
    }
    nodes = sum(table.scores.numel() for table in effects.values())
    needed = nodes_needed(effects, 0.8)
    out = Outcome(
        f"{nodes} heads and MLPs, four words with a letter behind each, the letter of one of them asked for ({len(batch)} of {4 * prompts} "
        f"prompts answered right, {len(few)} used for the effects, {asked} others for the projection)",
        "set of prompts",
    )
    out.add("heads and MLPs", "share of nodes that make up 80 % of the direct effect", "", needed / nodes)

    assert batch.labels is not None
    kinds = letter_heads(value_weighted_attention(model, batch.clean), batch.labels, _place(batch))
    letters = kinds["correct letter"]
    best = letters.top(4)
    out.add("best head", "share read from the right label, less that from the others", "", letters[best[0]])
    out.add("all heads", "share read from the right label, less that from the others", "", float(letters.scores.mean()))

    found = {
        rank: [head_subspace(model, batch.clean, batch.labels, *head, rank=rank) for head in best] for rank in (0, 3)
    }
    tests = [multiple_choice(tokenizer, asked, seed=1, order="word", labels=labels) for labels in ("letters", "random")]
    plain, three, none = ([_accuracy(model, test, heads) for test in tests] for heads in ([], found[3], found[0]))
    out.repeats = "label set: A B C D, random letters"
    out.add("untouched", ACCURACY, "", plain)
    out.add("four best heads in 3 dimensions", ACCURACY, "", three, against="untouched")
    out.add("four best heads in 0 dimensions", ACCURACY, "", none, against="untouched")

    out.check("share of nodes that make up 80 % of the direct effect", needed / nodes, at_most=0.15)
    out.check("best head's share on the right label, less the others'", letters[best[0]], at_least=0.3)
    out.check("accuracy kept in 3 dimensions, as a share (A B C D)", three[0] / max(plain[0], 1e-9), at_least=0.9)
    kept = three[1] / max(plain[1], 1e-9) - three[0] / max(plain[0], 1e-9)
    out.check("the same with random letters, less that", kept, at_most=0.0)
    out.note = (
        "The letter stands behind its word here, as this model answers few questions in the usual form. The heads found are then a "
        "kind of induction heads: their queries carry the word asked for, one of 36, for which three dimensions are few."
    )
    return out
