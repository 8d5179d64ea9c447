"""MC1, MC2 and MC3."""

import math

import pytest
import torch

from regard.bench.metrics_mc import MCScores, mc_scores, mean_mc_scores


def test_by_hand():
    got = mc_scores([math.log(0.5), math.log(0.1)], [math.log(0.2), math.log(0.05)])
    assert (got.mc1, got.mc3) == (1.0, 0.5)
    assert got.mc2 == pytest.approx(0.6 / 0.85)
    assert got.best == pytest.approx(math.log(0.5)) and got.margin == pytest.approx(math.log(2.5))
    assert mc_scores([-3.0, -1.0], [-2.0], best=0).mc1 == 0.0 and mc_scores([-3.0, -1.0], [-2.0], best=1).mc1 == 1.0
    assert mc_scores(torch.tensor([-1.0]), torch.tensor([-1.0])).mc1 == 0.0  # a tie is no win


def test_scores_too_small_for_a_number():
    """Each side is halved until its mass is a number: -1000 at once, -2000 twice."""
    got = mc_scores([-2000.0], [-1000.0])
    assert got.mc2 == pytest.approx(math.exp(-500) / (2 * math.exp(-500)))
    assert mc_scores([-math.inf], [-5.0]).mc2 == 0.0
    assert mc_scores([-5.0], [-math.inf]).mc2 == 1.0
    assert mc_scores([-math.inf], [-math.inf]).mc2 == 0.0


def test_mean():
    mean = mean_mc_scores([MCScores(1.0, 0.5, 0.25, -2.0, 1.0), MCScores(0.0, 0.1, 0.75, -4.0, -3.0)])
    assert mean == MCScores(0.5, pytest.approx(0.3), 0.5, -3.0, -1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mc_scores([], [-1.0]), "true"),
        (lambda: mc_scores([-1.0], []), "false"),
        (lambda: mc_scores([-1.0], [-1.0], best=1), "best"),
        (lambda: mean_mc_scores([]), "questions"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
