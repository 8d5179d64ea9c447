"""Seventeen yes-or-no features of a query, by rules; a labeller of your own (a language model) may answer any of them in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..._checks import bad_type, require, require_name

__all__ = ["FEATURES", "query_features"]


def _any(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


_RULES: dict[str, re.Pattern[str]] = {
    "anaphora": _any("it|its|they|them|their|this|that|these|those|he|she|him|her|his|hers|former|latter|aforementioned"),
    "subordination": _any("because|although|though|whereas|while|unless|whenever|which|whose|whom|if|since|after|before|until"),
    "presupposition": _any("why did|why does|why do|when did|how did|stop|stopped|again|still|no longer|even|also|already|regret|realize"),
    "pragmatics": _any("please|could you|would you|can you|i wonder|would it be possible|do you mind|kindly"),
    "negation": _any(r"not|no|never|none|nobody|nothing|neither|nor|without|cannot|\w+n['’]t"),
    "superlative": _any(r"most|least|best|worst|first|last|only|biggest|\w{3,}est"),
    "polysemy": _any("bank|bat|bark|bass|bow|case|charge|current|date|fair|file|jam|light|match|mine|mouse|note|park|pitch|plant|"
                     "point|pool|right|ring|rock|scale|seal|second|spring|state|table|tie|train|trunk|watch|wave|well"),
    "subjectivity": _any("think|feel|opinion|believe|good|bad|better|beautiful|ugly|favou?rite|should|interesting|boring|like|love|hate"),
    "ambiguity": _any("thing|things|stuff|something|someone|somewhere|some|several|many|few|various|etc|kind of|sort of|or so|about"),
    "constraints": _any(r"at least|at most|exactly|only|must|no more than|fewer than|more than|less than|between|within|using|in \d+ words|"
                        "except|limit"),
}  # fmt: skip
_GROUNDED = _any(
    "list|explain|name|compare|describe|define|give|find|calculate|summari[sz]e|translate|write|who|what|when|where|which|why|how"
)
_UNANSWERABLE = _any("will|going to|future|tomorrow|next year|meaning of life|my|i am thinking|guess|predict")
_MISMATCH = re.compile(
    r"^\s*(who\b.*\b(thing|place|year|city)|where\b.*\b(person|year)|when\b.*\b(person|city|name))", re.I
)
_SPECIAL = re.compile(
    r"\b\w*(?:ology|itis|osis|ectomy|statutory|algorithm|theorem|polynomial|tensor|enzyme|protein|genome|neural|quantum|plaintiff|"
    r"liability|fiscal|derivative|equity|photon|isotope|kernel|compiler|protocol|diagnos\w*|dosage)\b",
    re.I,
)

FEATURES = (
    *("anaphora", "subordination", "mismatch", "presupposition", "pragmatics", "rarity", "negation", "superlative", "polysemy"),
    *("answerability", "excessive_detail", "subjectivity", "ambiguity", "intention_grounding", "constraints", "entities"),
    "domain_specialisation",
)  # fmt: skip
"""Names of the features, in the order of `query_features`."""


def query_features(text: str, labeller: Callable[[str], Mapping[str, bool]] | None = None) -> Tensor:
    """(17,) float32 of 0 and 1, in the order of `FEATURES`.

    The rules are word lists and lengths, crude on purpose: the paper labels by a language model, and so does `labeller(text)`, which gives
    {feature: yes or no} for any of the features; the rules answer the rest.

    anaphora: words that point elsewhere. subordination: clauses. mismatch: asks "who" of a thing, and the like. presupposition: takes
    something for granted. pragmatics: an indirect request. rarity: a word of 11 letters or more. negation, superlative, polysemy: such
    words. answerability: asks what can be known. excessive_detail: more than 30 words. subjectivity, ambiguity: opinion, vague words.
    intention_grounding: says what is wanted. constraints: limits on the answer. entities: a name or a number inside. domain_specialisation:
    technical words.
    """
    if not isinstance(text, str):
        raise bad_type("text", text, "a str")
    require(bool(text.strip()), "text", text, "a query")
    words = re.findall(r"[\w'’-]+", text)
    found = {name: bool(rule.search(text)) for name, rule in _RULES.items()}
    found |= {
        "mismatch": bool(_MISMATCH.search(text)),
        "rarity": any(len(word) >= 11 for word in words),
        "answerability": not _UNANSWERABLE.search(text),
        "excessive_detail": len(words) > 30,
        "intention_grounding": bool(_GROUNDED.search(text)),
        "entities": any(word[0].isupper() or word[0].isdigit() for word in words[1:] if word != "I"),
        "domain_specialisation": bool(_SPECIAL.search(text)),
    }
    for name, value in (labeller(text) if labeller is not None else {}).items():
        found[require_name("labeller", name, FEATURES)] = bool(value)
    return torch.tensor([float(found[name]) for name in FEATURES])
