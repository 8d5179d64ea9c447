"""Sub-words as shortest paths, and the cross-entropy search."""

import itertools
import math

import pytest

from regard.bench.cross_entropy import cross_entropy_search
from regard.bench.subwords import fit_unigrams, unigram_segment

TOY = {
    unit: math.log(share) for unit, share in {"a": 0.3, "b": 0.2, "ab": 0.15, "ba": 0.1, "aab": 0.15, "bb": 0.1}.items()
}


def brute(text, most):
    """Every way to cut a text."""
    best = (-math.inf, [])
    for cuts in range(min(len(text), most)):
        for places in itertools.combinations(range(1, len(text)), cuts):
            pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
            if all(piece in TOY for piece in pieces):
                best = max(best, (sum(TOY[piece] for piece in pieces), pieces))
    return best


@pytest.mark.parametrize("most", [None, 3, 12])
def test_the_best_segmentation_is_found(most):
    for length in (1, 2, 5, 9):
        for letters in itertools.product("ab", repeat=length):
            text = "".join(letters)
            value, _ = brute(text, most or 99)
            if value == -math.inf:
                with pytest.raises(ValueError, match="in at most 3 pieces"):
                    unigram_segment(text, TOY, max_pieces=most)
                continue
            pieces, found = unigram_segment(text, TOY, max_pieces=most)
            assert found == pytest.approx(value) and "".join(pieces) == text and len(pieces) <= (most or 99)
            assert found == pytest.approx(sum(TOY[piece] for piece in pieces))


def test_edges_of_segmentation():
    assert unigram_segment("", TOY) == ([], 0.0) and unigram_segment("", TOY, max_pieces=0) == ([], 0.0)
    with pytest.raises(ValueError, match="text: got 'abc', need a text that the units make"):
        unigram_segment("abc", TOY)


def test_a_dictionary_learns_what_repeats():
    texts = ["the cat sat on the mat", "the dog sat on the cat", "on the mat the cat and the dog"] * 3
    small, large = (fit_unigrams(texts, size) for size in (14, 20))
    assert len(small) <= 14 and len(large) <= 20 and set("".join(texts)) <= set(small)
    assert sum(math.exp(value) for value in large.values()) == pytest.approx(1)
    counts = [sum(len(unigram_segment(text, units)[0]) for text in texts) for units in (small, large)]
    assert counts[1] < counts[0] < sum(map(len, texts)) and any("the" in unit for unit in large)
    assert set(fit_unigrams(["ab"], 1)) == {"a", "b"}  # characters always stay
    with pytest.raises(ValueError, match="texts"):
        fit_unigrams([], 4)
    with pytest.raises(ValueError, match="keep: got 1.0"):
        fit_unigrams(["ab"], 4, keep=1.0)


def test_the_search_finds_the_top_of_a_hill():
    space = {"x": (-5.0, 5.0), "rate": ("log", 1e-5, 1.0), "count": (1, 30), "kind": ["a", "b", "c"]}

    def hill(candidate):
        distance = (
            (candidate["x"] - 2) ** 2 + (math.log10(candidate["rate"]) + 3) ** 2 + (candidate["count"] - 11) ** 2 / 9
        )
        return -distance - (candidate["kind"] != "b")

    result = cross_entropy_search(hill, space, rounds=25)
    best = result.best
    assert abs(best["x"] - 2) < 0.1 and abs(math.log10(best["rate"]) + 3) < 0.1
    assert best["count"] == 11 and best["kind"] == "b" and result.value == pytest.approx(hill(best))
    assert result.evaluations == 25 * 50 and len(result.history) == 25 and result.history[-1] > result.history[0]
    assert cross_entropy_search(hill, space, rounds=3).best == cross_entropy_search(hill, space, rounds=3).best
    lowest = cross_entropy_search(lambda c: -hill(c), space, rounds=25, maximize=False)
    assert lowest.best == best and lowest.value == pytest.approx(-result.value)


def test_undefined_values_are_the_worst():
    result = cross_entropy_search(lambda c: float("nan") if c["x"] < 0 else c["x"], {"x": (-1.0, 1.0)}, rounds=5)
    assert result.value > 0.9
    nothing = cross_entropy_search(lambda c: float("nan"), {"x": (-1.0, 1.0)}, rounds=1, samples=3)
    assert nothing.value == -math.inf and set(nothing.best) == {"x"}


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({}, {}, "space"),
        ({"x": (2, 1)}, {}, "x: got .2, 1., need bounds"),
        ({"x": ("log", 0, 1)}, {}, "bounds > 0"),
        ({"x": []}, {}, "at least one option"),
        ({"x": "ab"}, {}, "x: got 'ab', need .low, high."),
        ({"x": (0, 1)}, {"elite": 0}, "elite: got 0"),
        ({"x": (0, 1)}, {"smoothing": 1.5}, "smoothing: got 1.5"),
        ({"x": (0, 1)}, {"samples": 0}, "samples: got 0"),
    ],
)
def test_bad_searches(space, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy_search(lambda c: 0.0, space, **options)
