"""How good is an answer, given what it should have been: the metrics of question answering, on plain text.

Normalisation, exact match and token F1 are those of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, no punctuation, no
articles, single spaces. With several right answers the best one counts. Further measures that live elsewhere: `lens.keyword_recall`,
ROUGE-1 recall (`lens.rouge`), MC1 to MC3 of scored answers (`metrics_mc`), fuzzy similarity and BLEU-1 (`bandits`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .._checks import bad_type, require

__all__ = [
    "AnswerMetrics",
    "answer_metrics",
    "contains_answer",
    "exact_match",
    "normalized",
    "numeric_match",
    "token_f1",
]

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")
Golds = str | Sequence[str]


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, gold: Golds) -> float:
    """1 if the normalised answer is one of the right ones, else 0."""
    return _best(answer, gold, lambda said, right: float(normalized(said) == normalized(right)))


def contains_answer(answer: str, gold: Golds) -> float:
    """1 if a right answer stands in the answer, word for word after normalisation, else 0."""
    return _best(answer, gold, lambda said, right: float(f" {normalized(right)} " in f" {normalized(said)} "))


def token_f1(answer: str, gold: Golds) -> float:
    """Harmonic mean of precision and recall of normalised words, counted with repetition; of two empty answers 1, of one 0."""
    return _best(answer, gold, _f1)


def numeric_match(answer: str, gold: Golds, tolerance: float = 1e-6) -> float:
    """1 if the last number of the answer is that of a right one (1,000 is 1000), within a relative `tolerance`, else 0."""
    return _best(answer, gold, lambda said, right: _same_number(said, right, tolerance))


@dataclass(frozen=True)
class AnswerMetrics:
    """Means over questions: exact match, containment, token F1; `count` questions."""

    exact: float
    contains: float
    f1: float
    count: int


def answer_metrics(answers: Iterable[str], golds: Iterable[Golds]) -> AnswerMetrics:
    """All of it over a set: `golds` holds the right answer, or right answers, of each question."""
    said, right = list(answers), list(golds)
    require(
        len(said) == len(right) > 0, "answers", f"{len(said)} for {len(right)} questions", "one for each, at least one"
    )
    pairs = list(zip(said, right))

    def mean(metric: Callable[[str, Golds], float]) -> float:
        return sum(metric(answer, gold) for answer, gold in pairs) / len(pairs)

    return AnswerMetrics(mean(exact_match), mean(contains_answer), mean(token_f1), len(pairs))


def _best(answer: str, gold: Golds, metric: Callable[[str, str], float]) -> float:
    if not isinstance(answer, str):
        raise bad_type("answer", answer, "text")
    golds = [gold] if isinstance(gold, str) else list(gold)
    require(bool(golds) and all(isinstance(text, str) for text in golds), "gold", gold, "one or more right answers")
    return max(metric(answer, right) for right in golds)


def _f1(said: str, right: str) -> float:
    ours, theirs = normalized(said).split(), normalized(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _same_number(said: str, right: str, tolerance: float) -> float:
    ours, theirs = _NUMBER.findall(said), _NUMBER.findall(right)
    if not ours or not theirs:
        return 0.0
    a, b = (float(found[-1].replace(",", "")) for found in (ours, theirs))
    return float(abs(a - b) <= tolerance * max(1.0, abs(b)))
