"""ROUGE-1 recall with stemming: how much of a reference's words an answer has (Lin 2004), as Google's `rouge_score` counts them.

Words are runs of lower-case letters and digits; those longer than three letters are stemmed by Porter's algorithm (1980) with the
changes that NLTK made to it, which is what `rouge_score` calls.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["keyword_recall", "porter_stem", "rouge1_f1", "rouge1_recall"]

_VOWELS = frozenset("aeiou")
_IRREGULAR = {
    "sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning", "inning": "inning",
    "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
_STEP2 = [
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"), ("alli", "al"),
    ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"), ("ator", "ate"), ("alism", "al"),
    ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
]  # fmt: skip
_STEP3 = [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")]
_STEP4 = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti", "ous", "ive", "ize",
]  # fmt: skip


def rouge1_recall(reference: str, answer: str) -> float:
    """Share of the reference's words, counted with repetition, that the answer has; 0 for an empty reference."""
    wanted, got = Counter(_words(reference)), Counter(_words(answer))
    return sum((wanted & got).values()) / max(1, wanted.total())


def rouge1_f1(reference: str, answer: str, stem: bool = False) -> float:
    """Harmonic mean of the share of the reference's words that the answer has and the share of its own that are wanted; 0 without any.

    stem: whether words are stemmed (the default of the `evaluate` package is not).
    """
    wanted, got = Counter(_words(reference, stem)), Counter(_words(answer, stem))
    shared = (wanted & got).total()
    return 2 * shared / (wanted.total() + got.total()) if shared else 0.0


def keyword_recall(words: Sequence[str], answer: str) -> float:
    """Share of the words (lower case) that the answer has as words of its own: in lower case, punctuation made spaces. The needle
    metric of Wang et al. 2024 (194, arXiv 2411.02688), whose error is 1 less this."""
    plain = answer.lower().translate({ord(sign): " " for sign in string.punctuation})
    said = {word.strip() for word in re.split("[ \n]", plain)}
    return sum(word in said for word in words) / max(1, len(words))


def _words(text: str, stem: bool = True) -> list[str]:
    words = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    return [porter_stem(word) if stem and len(word) > 3 else word for word in words]


def porter_stem(word: str) -> str:
    """The stem of a lower-case word."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_step1a, _step1b, _step1c, _step2, _step3, _step4, _step5a, _step5b):
        word = step(word)
    return word


def _consonant(word: str, i: int) -> bool:
    if word[i] in _VOWELS:
        return False
    return word[i] != "y" or i == 0 or not _consonant(word, i - 1)


def _measure(stem: str) -> int:
    """How many times a run of vowels is followed by a run of consonants."""
    kinds = "".join("c" if _consonant(stem, i) else "v" for i in range(len(stem)))
    return len(re.findall("v+c+", kinds))


def _has_vowel(stem: str) -> bool:
    return any(not _consonant(stem, i) for i in range(len(stem)))


def _double_consonant(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _short_end(word: str) -> bool:
    """Consonant, vowel, consonant other than w, x, y at the end; or a two-letter word of vowel and consonant."""
    n = len(word)
    if n >= 3:
        return (
            _consonant(word, n - 3)
            and not _consonant(word, n - 2)
            and _consonant(word, n - 1)
            and word[-1] not in "wxy"
        )
    return n == 2 and not _consonant(word, 0) and _consonant(word, 1)


def _step1a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for end, new in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(end):
            return word[: -len(end)] + new
    return word


def _step1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-3] + ("ie" if len(word) == 4 else "i")
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for end in ("ed", "ing"):
        stem = word[: -len(end)]
        if word.endswith(end) and _has_vowel(stem):
            break
    else:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _double_consonant(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short_end(stem) else stem


def _step1c(word: str) -> str:
    stem = word[:-1]
    return stem + "i" if word.endswith("y") and len(stem) > 1 and _consonant(stem, len(stem) - 1) else word


def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step2(word[:-4] + "al")
    for end, new in _STEP2:
        if word.endswith(end):
            return word[: -len(end)] + new if _measure(word[: -len(end)]) > 0 else word
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return word


def _step3(word: str) -> str:
    for end, new in _STEP3:
        if word.endswith(end):
            return word[: -len(end)] + new if _measure(word[: -len(end)]) > 0 else word
    return word


def _step4(word: str) -> str:
    for end in _STEP4:
        if word.endswith(end):
            stem = word[: -len(end)]
            return stem if _measure(stem) > 1 and (end != "ion" or stem[-1] in "st") else word
    return word


def _step5a(word: str) -> str:
    if not word.endswith("e"):
        return word
    stem = word[:-1]
    measure = _measure(stem)
    return stem if measure > 1 or (measure == 1 and not _short_end(stem)) else word


def _step5b(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
