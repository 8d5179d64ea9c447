"""Measures of a prompt's wording: readability, formality, concreteness. SCA (057, arXiv 2403.18976) crosses them with hallucination.

Flesch 1948 (reading ease), Heylighen and Dewaele 2002 (F-score), Brysbaert et al. 2014 (ratings of concreteness). The ratings are not
ours to ship: bring them as a mapping word -> 1..5. A tagger of parts of speech is the caller's too; `rough_tags` is a stand-in made of
word lists and endings, good for comparing wordings of one question and for nothing finer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .._checks import require

__all__ = ["concreteness", "flesch", "formality", "rough_tags", "syllables"]

_WORDS, _SENTENCES = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*"), re.compile(r"[.!?]+(?=\s|$)")
FORMAL, DEICTIC = ("noun", "adjective", "preposition", "article"), ("pronoun", "verb", "adverb", "interjection")
TAGS = (*FORMAL, *DEICTIC, "other")
_LISTS = {
    "article": "a an the",
    "pronoun": "i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours they "
    "them their theirs who whom whose which what this that these those someone anyone everyone something anything nothing everything",
    "preposition": "of in to for with on at from by about as into through after over between out against during without before under "
    "around among per via within along across behind beyond toward towards upon off above near since until",
    "interjection": "oh hey hi hello wow ah oops please yes no okay ok well thanks",
    "verb": "be am is are was were been being have has had having do does did done can could will would shall should may might must go "
    "goes went gone make makes made take takes took tell tells told say says said give gives gave get gets got know knows knew think "
    "thinks want wants see sees saw find finds found come comes came let lets put ask asks need needs",
    "adverb": "not very too also just only now then here there always never often again still soon quite rather perhaps maybe how when "
    "where why almost even ever",
    "other": "and or but if because although while so than nor yet",
}  # fmt: skip
_KNOWN = {word: tag for tag, words in _LISTS.items() for word in words.split()}
_ENDINGS = (
    ("adverb", ("ly",)),
    ("adjective", ("ous", "ful", "ive", "able", "ible", "less", "ical", "ish", "ic", "al", "ary")),
    ("verb", ("ing", "ed", "ize", "ise", "ify")),
)


def syllables(word: str) -> int:
    """Of an English word: its runs of vowels, without a silent final e; at least 1. An estimate."""
    word = word.lower()
    runs = len(re.findall(r"[aeiouy]+", word))
    silent = word.endswith("e") and not word.endswith(("le", "ee", "ye")) and runs > 1
    return max(1, runs - silent - (word.endswith(("ed", "es")) and runs > 1 and word[-3:-2] not in "tdszxc"))


def flesch(text: str) -> float:
    """206.835 - 1.015 words / sentences - 84.6 syllables / words: about 100 for the easiest text, below 30 for the hardest."""
    words = _WORDS.findall(text)
    require(bool(words), "text", text, "a word")
    sentences = max(1, len(_SENTENCES.findall(text)))
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(map(syllables, words)) / len(words)


def rough_tags(text: str) -> list[tuple[str, str]]:
    """(word, part of speech) for each word, from word lists and endings; what is not known is a noun. Crude: see the head of the file."""
    found = []
    for word in _WORDS.findall(text):
        low = word.lower()
        tag = _KNOWN.get(low)
        if tag is None:
            tag = next((t for t, ends in _ENDINGS if len(low) > 4 and low.endswith(ends)), "noun")
        found.append((word, tag))
    return found


def formality(tags: str | Mapping[str, int] | Iterable[tuple[str, str]]) -> float:
    """(nouns + adjectives + prepositions + articles - pronouns - verbs - adverbs - interjections + 100) / 2, each in percent of all words.

    tags: counts by name (`TAGS`: "noun", ..., "other"), or (word, tag) pairs of a tagger, or a text (then `rough_tags`). 50 where the
    two sides balance, 100 where all is formal.
    """
    pairs = rough_tags(tags) if isinstance(tags, str) else tags
    counts = Counter(dict(pairs)) if isinstance(pairs, Mapping) else Counter(tag for _, tag in pairs)
    unknown = sorted(set(counts) - set(TAGS))
    require(not unknown, "tags", unknown, f"names among {TAGS}")
    total = sum(counts.values())
    require(total > 0, "tags", "no word", "at least one")
    return 50.0 + 50.0 * (sum(counts[t] for t in FORMAL) - sum(counts[t] for t in DEICTIC)) / total


def concreteness(words: str | Sequence[str], ratings: Mapping[str, float]) -> float:
    """Mean rating (1 abstract to 5 concrete) of the words that are rated; NaN where none is."""
    listed = _WORDS.findall(words) if isinstance(words, str) else words
    rated = [float(ratings[word.lower()]) for word in listed if word.lower() in ratings]
    return sum(rated) / len(rated) if rated else float("nan")
