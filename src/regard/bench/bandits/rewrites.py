"""The arms (five ways to rewrite a query, and leaving it alone) and the reward of an answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from ..._checks import bad_type, require, require_name

__all__ = ["REWRITES", "bleu1", "fuzzy", "qa_reward", "rewrite_prompt"]

REWRITES: dict[str, str | None] = {
    "none": None,
    "paraphrase": "Say the question below in other words. Keep its meaning. Write the new question alone.",
    "simplify": "Make the question below simpler: short words, one clause. Keep its meaning. Write the new question alone.",
    "disambiguate": "Remove every ambiguity from the question below: say which meaning of a word and which thing is meant. Write the new "
    "question alone.",
    "expand": "Add to the question below the context that helps to answer it, without answering it. Write the new question alone.",
    "clarify_terms": "Explain in brackets the difficult terms of the question below. Keep the rest. Write the new question alone.",
}
"""Arm -> what a language model is told to do; None: the query stays."""


def rewrite_prompt(arm: str, query: str) -> str | None:
    """What to give a language model so that it rewrites `query`; None for the arm "none"."""
    told = REWRITES[require_name("arm", arm, REWRITES)]
    return None if told is None else f"{told}\n\n{query}"


def fuzzy(answer: str, gold: str) -> float:
    """Indel similarity in [0, 1]: 2 * longest common subsequence / both lengths (RapidFuzz's `ratio` / 100). Two empty texts: 1."""
    if not answer and not gold:
        return 1.0
    row = [0] * (len(gold) + 1)
    for a in answer:
        before = 0
        for j, b in enumerate(gold, 1):
            before, row[j] = row[j], before + 1 if a == b else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(answer) + len(gold))


def bleu1(answer: str, gold: str) -> float:
    """Clipped precision of the answer's words in the gold answer's, in [0, 1], lower case, without a brevity penalty."""
    ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, gold))
    total = sum(ours.values())
    return sum((ours & theirs).values()) / total if total else 0.0


def qa_reward(
    answer: str,
    gold: str,
    judge: Callable[[str, str], float] | None = None,
    weights: tuple[float, float, float] = (0.6, 0.3, 0.1),
) -> float:
    """weights[0] * judge + weights[1] * fuzzy + weights[2] * BLEU-1, in [0, 1]; 0 for an empty answer.

    judge: (answer, gold) -> 0 or 1, a language model's verdict in the paper. None: whether the gold answer's words stand in the answer
    in their order, case and punctuation aside.
    """
    for name, text in (("answer", answer), ("gold", gold)):
        if not isinstance(text, str):
            raise bad_type(name, text, "a str")
    require(bool(gold.strip()), "gold", gold, "a text")
    require(len(weights) == 3 and min(weights) >= 0, "weights", weights, "three numbers >= 0")
    if not answer.strip():
        return 0.0
    verdict = float(judge(answer, gold)) if judge is not None else float(_said(gold) in _said(answer))
    require(0.0 <= verdict <= 1.0, "judge", verdict, "a verdict in [0, 1]")
    return weights[0] * verdict + weights[1] * fuzzy(answer, gold) + weights[2] * bleu1(answer, gold)


def _said(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
