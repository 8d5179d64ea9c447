"""Scaling attention weights on keys, and its exact additive form."""

import pytest
import torch

from regard.ops import log_factor_bias, scale_weights
from regard.ops.reweight import key_mask


def weights_of(scores):
    return scores.softmax(-1)


@pytest.mark.parametrize("keys", [0, 3, -1, slice(2, 5), (2, None), (-3, None), (0, 7), torch.tensor([1, 4])])
@pytest.mark.parametrize("heads", [None, [2], [0, 3]])
def test_bias_is_the_same_as_scaling_and_renormalising(keys, heads):
    scores = torch.randn(2, 4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor(2.7, dtype=torch.float64)
    scaled = scale_weights(weights_of(scores), keys, factor, heads=heads)
    biased = weights_of(scores + log_factor_bias(keys, factor, 7, num_heads=4, heads=heads))
    torch.testing.assert_close(scaled, biased, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(scaled.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))


def test_other_keys_keep_their_proportions_and_other_heads_everything():
    before = weights_of(torch.randn(1, 3, 2, 6))
    after = scale_weights(before, 0, 4.0, heads=[1])
    torch.testing.assert_close(after[:, 1, :, 1:] / after[:, 1, :, 1:2], before[:, 1, :, 1:] / before[:, 1, :, 1:2])
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, 1, :, 0] > before[:, 1, :, 0]).all()


def test_factors_multiply():
    weights = weights_of(torch.randn(2, 2, 3, 5, dtype=torch.float64))
    twice = scale_weights(scale_weights(weights, 1, 1.5), 1, 0.4)
    torch.testing.assert_close(twice, scale_weights(weights, 1, 0.6), rtol=1e-12, atol=1e-14)


def test_factor_zero_removes_keys_and_an_emptied_row_is_zero():
    weights = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]]])
    out = scale_weights(weights, 0, 0.0)
    assert torch.equal(out, torch.tensor([[[[0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]]]))
    assert log_factor_bias(0, 0.0, 3)[0, 0, 0].tolist() == [float("-inf"), 0.0, 0.0]


def test_positions_count_from_each_rows_first_real_token():
    start = torch.tensor([0, 2])
    assert key_mask(0, 4, start=start).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert key_mask((1, None), 4, start=start).int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert key_mask((-3, None), 4, start=start).int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert key_mask(-4, 4, start=start).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert key_mask(torch.tensor([0, 1]), 4, start=start).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert not key_mask(9, 4).any()


def test_one_factor_a_head_and_one_a_key():
    weights = weights_of(torch.randn(1, 2, 3, 4))
    by_head = scale_weights(weights, 0, torch.tensor([2.0, 3.0]))
    for head, factor in enumerate((2.0, 3.0)):
        torch.testing.assert_close(by_head[:, [head]], scale_weights(weights[:, [head]], 0, factor))
    factors = torch.rand(1, 2, 1, 4) + 0.5
    by_key = scale_weights(weights, slice(None), factors)
    torch.testing.assert_close(by_key, weights * factors / (weights * factors).sum(-1, keepdim=True))


def test_half_types_and_the_input_stay_as_they_are():
    weights = weights_of(torch.randn(1, 2, 3, 4)).bfloat16()
    kept = weights.clone()
    assert scale_weights(weights, 0, 2.0).dtype == torch.bfloat16
    assert torch.equal(weights, kept)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: scale_weights(w, 0, -1.0), "factor"),
        (lambda w: scale_weights(w, 0, float("inf")), "factor"),
        (lambda w: scale_weights(w, 0, torch.ones(3)), "factor"),
        (lambda w: scale_weights(w, 0, 2.0, heads=[2]), "heads"),
        (lambda w: scale_weights(w[0], 0, 2.0), "weights"),
        (lambda w: scale_weights(w, slice(0, 4, 2), 2.0), "keys"),
        (lambda w: scale_weights(w, torch.tensor([-1]), 2.0), "keys"),
        (lambda w: scale_weights(w, torch.ones(3, dtype=torch.bool), 2.0), "keys"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.full((1, 2, 3, 4), 0.25))


def test_keys_of_another_kind():
    with pytest.raises(TypeError, match="keys"):
        key_mask("first", 4)
