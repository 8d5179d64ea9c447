"""189 LargePiG: the gate opens for what is copied from the source, and copied entities win over changed ones."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor

from ...methods.decoders import LargePiG, early_exit
from ...methods.decoders.pointer import copy_gate
from ..answers import answer_scores
from ..metrics_mc import mc_scores, mean_mc_scores
from .claim import Outcome, Scale

PAPER, SLUG = "189", "largepig"
SAYS = (
    "LargePiG: the copy gate is larger for content taken from the source than for function words, and scoring with the pointer tells "
    "entities of the source from changed ones better than plain scoring."
)

SOURCES = (
    ("The ferry to Lundaby leaves at dawn from the copper pier. Captain Ingrid Halvorsen sells tickets in the blue kiosk.",
     (("Where does the ferry leave from?", "the copper pier", ("the marble pier", "the copper bridge")),
      ("Who sells the tickets?", "Captain Ingrid Halvorsen", ("Captain Ingrid Sorensen", "Doctor Ingrid Halvorsen")))),
    ("In 1974 the botanist Emeka Okafor found the striped orchid on the island of Corvale. It flowers for nine days in October.",
     (("Who found the striped orchid?", "Emeka Okafor", ("Emeka Adeyemi", "Robert Okafor")),
      ("When does the orchid flower?", "for nine days in October", ("for nine days in April", "for two weeks in October")))),
    ("The museum of clocks in Velmont keeps a silver pendulum made by Teodor Brandt. Visitors may wind it on the last Sunday of the month.",
     (("What does the museum keep?", "a silver pendulum made by Teodor Brandt", ("a silver pendulum made by Teodor Klein",
       "a golden pendulum made by Teodor Brandt")),
      ("When may visitors wind it?", "on the last Sunday of the month", ("on the first Sunday of the month",
       "on the last Friday of the month")))),
    ("Quillon cheese is washed with pear cider and stored in a salt mine under Harrowgate. A wheel weighs eleven kilos after six months.",
     (("What is Quillon cheese washed with?", "pear cider", ("apple cider", "pear vinegar")),
      ("Where is it stored?", "in a salt mine under Harrowgate", ("in a salt mine under Kensington", "in a coal mine under Harrowgate")))),
)  # fmt: skip
"""Text, and for it: question, answer, changed answers. Made up, so that no model knows them from elsewhere."""

FUNCTION_WORDS = {
    "a", "an", "the", "of", "in", "on", "at", "by", "to", "for", "from", "and", "or", "is", "are", "was", "it", "with", "under", "after",
    "may", "that", "this", "as",
}  # fmt: skip


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    sources = SOURCES[: scale.pick(len(SOURCES), 1)]
    questions = [(text, *item) for text, items in sources for item in items]
    out = Outcome(f"{len(questions)} questions on {len(sources)} made-up texts", "a question")
    content: list[float] = []
    function: list[float] = []
    for text, question, right, _ in questions:
        prompt = _prompt(tokenizer, text, question)
        answer = _ids(tokenizer, " " + right)
        gates = _gates(model, prompt, answer)
        for token, gate in zip(answer, gates):
            word = tokenizer.decode([token]).strip().strip(string.punctuation).lower()
            (function if word in FUNCTION_WORDS else content).append(gate)
    out.add("content copied from the source", "copy gate", "", content)
    if function:
        out.add("function words", "copy gate", "", function)
    lead = sum(content) / len(content) / max(1e-12, sum(function) / max(1, len(function)))
    ways: dict[str, LargePiG | None] = {
        "plain scoring": None,
        "with the pointer": LargePiG(),
        "with the pointer, scale 500": LargePiG(scale=500.0),
    }
    for label in ways:
        found = [_question(model, tokenizer, question, ways[label]) for question in questions]
        for figure in ("mc1", "mc2"):
            base = None if label == "plain scoring" else "plain scoring"
            out.add(label, figure.upper(), "", [getattr(scores, figure) for scores in found], against=base)
        out.add(label, "margin of the answer", "nats", mean_mc_scores(found).margin)
    out.check("copy gate, content over function words", lead, at_least=1.0)
    plain, pointed = (out.row(label, "MC2").mean for label in list(ways)[:2])
    out.check("MC2 gained by the pointer", pointed - plain, at_least=0.0, digits=3)
    gained = (
        out.row("with the pointer", "margin of the answer").mean - out.row("plain scoring", "margin of the answer").mean
    )
    out.check("margin of the answer gained by the pointer, nats", gained, at_least=0.0, digits=3)
    means = "; ".join(
        f"{label}: MC1 {out.row(label, 'MC1').mean:.2f}, MC2 {out.row(label, 'MC2').mean:.3f}" for label in ways
    )
    count = f"{len(content)} content and {len(function)} function tokens"
    out.note = f"{means[0].upper()}{means[1:]}. Mean gate {sum(content) / len(content):.4f} on content ({count})."
    return out


def _prompt(tokenizer: Any, text: str, question: str) -> list[int]:
    return _ids(tokenizer, f"{text}\nQuestion: {question}\nAnswer:")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def _gates(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """The copy gate before each token of the answer, the answer fed."""
    method = LargePiG()
    hidden = model(torch.tensor([[*prompt, *answer]]), use_cache=False, output_hidden_states=True).hidden_states
    rows: list[Tensor] = [state[0, len(prompt) - 1 : -1] for state in hidden]
    layers = early_exit.candidate_layers(len(hidden) - 1, method.candidates)
    early, mature = early_exit.early_exit_logits(model, rows, layers), early_exit.early_exit_logits(model, rows[-1])
    return copy_gate(mature, early, float(method.scale or 0.0), method.max_gate, str(method.variant)).tolist()


def _question(
    model: Any, tokenizer: Any, question: tuple[str, str, str, tuple[str, ...]], method: LargePiG | None
) -> Any:
    text, asked, right, wrong = question
    prompt = _prompt(tokenizer, text, asked)
    answers = [_ids(tokenizer, " " + answer) for answer in (right, *wrong)]
    scores = answer_scores(model, prompt, answers, *([method] if method else [])).tolist()
    return mc_scores(scores[:1], scores[1:])
