"""PGI: a frame for prompts in three parts, and the bookkeeping of errors that goes with it.

Ioste 2024, "Hallucinations or Attention Misdirection? The Path to Strategic Value Extraction in Business Using Large Language Models"
(arXiv 2402.14002). An essay without code or fixed templates: Persona (role, audience, tone, what not to do), Grouping (context and
request in labelled groups, one asked about at a time, its facts next to the question), Intelligence (rules, output format, checks). The
words that join the parts are ours. Errors are marked by people as misdirection or hallucination and counted; `regard.lens.misdirection`
makes a proposal by attention.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .._checks import bad_type, require, require_name

__all__ = ["CLASSES", "ErrorReport", "PGIPrompt", "error_report", "wilson_interval"]

CLASSES = ("ok", "misdirection", "hallucination")


@dataclass(frozen=True)
class PGIPrompt:
    """A prompt in three parts, all of them needed.

        frame = PGIPrompt("You advise a bank's clerks. Be brief.", {"Ann": "Ann pays on Friday.", "Bob": "..."}, "Name the day alone.")
        print(frame.render("When does Ann pay?", about="Ann"))

    Args:
        persona: who answers, for whom, in what tone, and what it must not do.
        groups: label -> facts, in order. intelligence: the rules to judge by, format of the answer, checks; a text or several.
    """

    persona: str
    groups: Mapping[str, str]
    intelligence: str | Sequence[str]

    def __post_init__(self) -> None:
        if not isinstance(self.groups, Mapping):
            raise bad_type("groups", self.groups, "label -> facts")
        require(bool(self.groups), "groups", "none", "at least one labelled group")
        for name, text in (("persona", self.persona), *(("intelligence", rule) for rule in self._rules)):
            if not isinstance(text, str):
                raise bad_type(name, text, "a text")
            require(bool(text.strip()), name, text, "a text that is not empty")
        require(bool(self._rules), "intelligence", self.intelligence, "at least one rule")
        for label, facts in self.groups.items():
            require(bool(label.strip()) and bool(facts.strip()), f"groups[{label!r}]", facts, "a label and facts")

    @property
    def _rules(self) -> list[str]:
        return [self.intelligence] if isinstance(self.intelligence, str) else list(self.intelligence)

    def messages(self, question: str, about: str | None = None) -> list[dict[str, str]]:
        """The frame as a conversation: the persona speaks as system, the rest is the user's. Arguments as in `render`."""
        return [
            {"role": "system", "content": self.persona.strip()},
            {"role": "user", "content": self._request(question, about)},
        ]

    def render(self, question: str, about: str | None = None) -> str:
        """The frame as text. `about`: the group that is asked about; it goes last, next to the question."""
        return f"Persona: {self.persona.strip()}\n\n{self._request(question, about)}"

    def _request(self, question: str, about: str | None) -> str:
        require(isinstance(question, str) and bool(question.strip()), "question", question, "a question")
        labels = list(self.groups)
        if about is not None:
            require_name("about", about, labels)
            labels = [label for label in labels if label != about] + [about]
        rules = "\n".join(f"- {rule.strip()}" for rule in self._rules)
        groups = "\n\n".join(f"[{label.strip()}]\n{self.groups[label].strip()}" for label in labels)
        asked = question.strip() if about is None else f"About [{about.strip()}]: {question.strip()}"
        return f"Rules:\n{rules}\n\nFacts:\n{groups}\n\nQuestion: {asked}"


@dataclass(frozen=True)
class ErrorReport:
    """How many responses of each class, and the rate of errors (all classes but the first) with its 95 % interval."""

    counts: dict[str, int]
    total: int
    errors: int
    interval: tuple[float, float]

    @property
    def rate(self) -> float:
        return self.errors / self.total

    def __str__(self) -> str:
        low, high = (100 * value for value in self.interval)
        classes = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{self.errors} errors in {self.total} responses: {100 * self.rate:.2f} % ({low:.2f} to {high:.2f} %); {classes}"


def error_report(labels: Iterable[str] | Mapping[str, int], classes: Sequence[str] = CLASSES) -> ErrorReport:
    """Count responses that people (or `lens.misdirection`) have marked.

    Args:
        labels: one class name a response, or class -> count. classes: the names there may be; the first is no error.
    """
    require(len(classes) >= 2 and len(set(classes)) == len(classes), "classes", classes, "two or more different names")
    found = Counter(dict(labels)) if isinstance(labels, Mapping) else Counter(labels)
    for name in found:
        require_name("labels", name, classes)
    counts: dict[str, int] = {name: int(found[name]) for name in classes}
    require(all(count >= 0 for count in counts.values()), "labels", counts, "counts >= 0")
    total = sum(counts.values())
    require(total > 0, "labels", "none", "at least one response")
    errors = total - counts[classes[0]]
    return ErrorReport(counts, total, errors, wilson_interval(errors, total))


def wilson_interval(hits: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a rate, `hits` of `total`; z = 1.96 for 95 %."""
    require(total > 0 and 0 <= hits <= total, "hits, total", (hits, total), "0 <= hits <= total, total > 0")
    rate, square = hits / total, z * z
    centre = (rate + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(rate * (1 - rate) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)
