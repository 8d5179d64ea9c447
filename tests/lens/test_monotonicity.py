"""The rank correlation of weights with scores."""

import pytest
import torch
from scipy.stats import spearmanr

from regard.lens import monotonicity
from regard.ops import linear_attention_weights


def test_it_is_spearmans_over_the_keys_that_a_row_sees():
    g = torch.Generator().manual_seed(0)
    scores, weights = torch.randn(2, 3, 6, 9, generator=g), torch.randn(2, 3, 6, 9, generator=g)
    mask = torch.rand(2, 1, 6, 9, generator=g) > 0.3
    found = monotonicity(scores, weights, mask)
    for b, h, n in [(0, 0, 0), (1, 2, 5), (0, 1, 3)]:
        seen = mask[b, 0, n]
        assert float(found[b, h, n]) == pytest.approx(
            spearmanr(scores[b, h, n, seen], weights[b, h, n, seen]).statistic
        )
    torch.testing.assert_close(monotonicity(scores, -scores), -torch.ones(2, 3, 6, dtype=torch.float64))


def test_the_softmax_rises_with_its_scores_and_a_relu_does_not():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 32, 16, generator=g), torch.randn(1, 2, 32, 16, generator=g)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    scores = q @ k.mT
    soft = monotonicity(scores, scores.masked_fill(~causal, -torch.inf).softmax(-1), causal)
    assert soft[..., 0].isnan().all()
    torch.testing.assert_close(soft[..., 1:], torch.ones(1, 2, 31, dtype=torch.float64))
    taylor, relu = (
        monotonicity(scores, linear_attention_weights(q, k, feature_map=name), causal)[..., 4:].mean()
        for name in ("taylor", "relu")
    )
    assert relu < taylor < 1


def test_errors_name_the_argument():
    x = torch.randn(3, 4)
    for args, names in (
        ((x, x[:2]), "weights"),
        ((x, x, torch.ones(3, 4)), "mask"),
        ((x.long(), x), "scores"),
        ((x[0], x[0]), "scores"),
    ):
        with pytest.raises((ValueError, TypeError), match=names):
            monotonicity(*args)
