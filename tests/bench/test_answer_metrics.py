"""Answer metrics on plain text."""

import pytest

from regard.bench.answer_metrics import (
    answer_metrics,
    contains_answer,
    exact_match,
    normalized,
    numeric_match,
    token_f1,
)


def test_normalisation():
    assert normalized("  The cat's, AN old\nfriend! ") == "cats old friend"
    assert normalized("theatre a b") == "theatre b"  # articles are words, not letters


def test_exact_and_contained():
    assert exact_match("The Copper Pier.", "copper pier") == 1.0
    assert exact_match("copper piers", "copper pier") == 0.0
    assert exact_match("b", ["a", "b"]) == 1.0
    assert contains_answer("It leaves from the copper pier, at dawn", "copper pier") == 1.0
    assert contains_answer("copper piers", "copper pier") == 0.0  # whole words


def test_token_f1():
    assert token_f1("red red fox", "red fox") == pytest.approx(2 * 2 / 5)
    assert token_f1("fox", ["wolf", "the fox"]) == 1.0
    assert token_f1("", "") == 1.0 and token_f1("", "x") == 0.0 and token_f1("the", "a") == 1.0


def test_numbers():
    assert numeric_match("So 3 * 4 = 12.", "12") == 1.0
    assert numeric_match("it costs 1,200 dollars", "1200") == 1.0
    assert numeric_match("-3.5", "3.5") == 0.0 and numeric_match("none", "1") == 0.0
    assert numeric_match("12 of 13", "12") == 0.0  # the last one counts


def test_means_and_bad_input():
    found = answer_metrics(["a cat", "two dogs"], ["cat", ["dogs", "wolves"]])
    assert (found.exact, found.contains, found.count) == (0.5, 1.0, 2) and found.f1 == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="answers"):
        answer_metrics(["a"], [])
    with pytest.raises(ValueError, match="gold"):
        exact_match("a", [])
    with pytest.raises(TypeError, match="answer"):
        exact_match(3, "a")
