"""Sub-words by maximum likelihood: the best segmentation of a text as a shortest path, and a dictionary refined by segmenting again.

The sub-word encoding of "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI", 2024, arXiv
2410.18441 (no code; the schedule of refinement is ours, in the manner of unigram tokenizers). To study; `tokenizers` is for production.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from .._checks import bad_value, require, require_int

__all__ = ["fit_unigrams", "unigram_segment"]


def unigram_segment(
    text: str, log_prob: Mapping[str, float], *, max_pieces: int | None = None
) -> tuple[list[str], float]:
    """(pieces, their summed log-probability): the likeliest way to write `text` in units, each independent of the others.

    Positions are nodes, a unit is an edge of length -log p. With `max_pieces` at most so many units (Bellman-Ford, step by step).
    `ValueError` where no sequence of (so few) units makes the text.
    """
    longest = max(map(len, log_prob), default=0)
    if max_pieces is None:
        best, back = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - longest), end):
                value = best[start] + log_prob.get(text[start:end], -math.inf)
                if value > best[end]:
                    best[end], back[end] = value, start
        path = [len(text)]
        while path[-1] > 0 and best[-1] > -math.inf:
            path.append(back[path[-1]])
        total = best[-1]
    else:
        path, total = _few_pieces(text, log_prob, longest, require_int("max_pieces", max_pieces, 0))
    if total == -math.inf:
        limit = "" if max_pieces is None else f" in at most {max_pieces} pieces"
        raise bad_value("text", text if len(text) <= 40 else text[:37] + "...", f"a text that the units make{limit}")
    path.reverse()
    return [text[a:b] for a, b in itertools.pairwise(path)], total


def _few_pieces(text: str, log_prob: Mapping[str, float], longest: int, most: int) -> tuple[list[int], float]:
    """Ends of the pieces from the last to 0, and their value, of the best path of at most `most` steps."""
    values = [[0.0] + [-math.inf] * len(text)]
    backs: list[list[int]] = [[0] * (len(text) + 1)]
    for _ in range(most):
        value, back = [-math.inf] * (len(text) + 1), [0] * (len(text) + 1)
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - longest), end):
                now = values[-1][start] + log_prob.get(text[start:end], -math.inf)
                if now > value[end]:
                    value[end], back[end] = now, start
        values.append(value)
        backs.append(back)
    steps = max(range(len(values)), key=lambda count: values[count][-1])
    path = [len(text)]
    for count in range(steps, 0, -1):
        path.append(backs[count][path[-1]])
    return path, values[steps][-1]


def fit_unigrams(
    texts: Sequence[str], size: int, *, max_len: int = 8, rounds: int = 2, keep: float = 0.75
) -> dict[str, float]:
    """Log-probabilities of at most `size` units (never fewer than the characters of `texts`, which always stay).

    Starts from all substrings of up to `max_len` characters that occur twice. Then, `rounds` times for each size, the texts are segmented
    and units counted anew; as long as there are too many, the share `keep` of them that is used most goes on.
    """
    require(len(texts) > 0 and all(isinstance(text, str) for text in texts), "texts", texts, "at least one string")
    require_int("size", size, 1)
    require_int("max_len", max_len, 1)
    require_int("rounds", rounds, 1)
    require(0 < keep < 1, "keep", keep, "a number between 0 and 1")
    characters = set().union(*texts)
    require(bool(characters), "texts", texts, "at least one character")
    found: Counter[str] = Counter()
    for text in texts:
        for length in range(1, max_len + 1):
            found.update(text[start : start + length] for start in range(len(text) - length + 1))
    # a long unit saves more the longer it is
    counts = {unit: count * len(unit) for unit, count in found.items() if count > 1 or len(unit) == 1}
    while True:
        for _ in range(rounds):
            log_prob = _normalized(counts)
            used: Counter[str] = Counter()
            for text in texts:
                used.update(unigram_segment(text, log_prob)[0])
            counts = {unit: used[unit] for unit in counts if used[unit] > 0 or len(unit) == 1}
        if len(counts) <= max(size, len(characters)):
            return _normalized(counts)
        wanted = max(size, len(characters), int(keep * len(counts))) - len(characters)
        long = sorted((unit for unit in counts if len(unit) > 1), key=lambda unit: (-counts[unit] * len(unit), unit))
        counts = {unit: counts[unit] for unit in [*sorted(characters), *long[:wanted]]}


def _normalized(counts: Mapping[str, float]) -> dict[str, float]:
    """Log-shares; units that were not used count half."""
    total = sum(count or 0.5 for count in counts.values())
    return {unit: math.log((count or 0.5) / total) for unit, count in counts.items()}
