"""ADL beyond its recorded numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.losses import attention_diversification


def attention_maps(batch, heads, queries, keys, dtype=torch.float64):
    return (2 * torch.randn(batch, heads, queries, keys, dtype=dtype)).softmax(-1)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    threshold=st.floats(0, 4),
    variant=st.sampled_from(["paper", "released"]),
    seed=st.integers(0, 2**16),
)
def test_against_the_definition_row_by_row(batch, heads, queries, keys, threshold, variant, seed):
    torch.manual_seed(seed)
    if variant == "released" and 1 in (batch, queries, keys):
        variant = "paper"  # the two only agree where there is nothing to squeeze
    layers = [attention_maps(batch, heads, queries, keys), attention_maps(batch, heads + 1, queries + 1, keys + 2)]
    total = 0.0
    for weights in layers:
        rows = weights.mean(1)
        cosines = []
        for sample in rows:
            bound = threshold / sample.shape[1]
            mean = sample.mean(0)
            mean = torch.where(mean > bound, mean, 0.0)
            for row in sample:
                row = torch.where(row > bound, row, 0.0)
                size = (row.norm() * mean.norm()).item()
                cosines.append((row @ mean).item() / size if size else 0.0)
        total += sum(cosines) / len(cosines)
    want = torch.tensor(total / (2 + 1e-6), dtype=torch.float64)
    torch.testing.assert_close(attention_diversification(layers, threshold, variant=variant), want)


def test_equal_rows_are_all_alike_and_thresholds_decide():
    row = torch.tensor([0.5, 0.3, 0.1, 0.1])
    weights = row.expand(2, 3, 4, 4)
    assert attention_diversification(weights).item() == pytest.approx(0.0)  # 0.5 is just 2 / 4, not above it
    assert attention_diversification(weights, 1.9).item() == pytest.approx(1.0, abs=1e-5)
    assert attention_diversification(weights, 5).item() == 0.0  # nothing is above 5 / 4


def test_rows_that_look_elsewhere_score_less():
    same = torch.eye(4)[torch.zeros(4, dtype=torch.long)].expand(1, 1, 4, 4)
    apart = torch.eye(4).expand(1, 1, 4, 4)
    assert attention_diversification(same).item() == pytest.approx(1.0, abs=1e-5)
    assert attention_diversification(apart, 0.0).item() == pytest.approx(
        0.5, abs=1e-5
    )  # cosine of a corner with the mean


def test_batch_of_one_is_as_any_other():
    torch.manual_seed(0)
    weights = torch.randn(1, 2, 7, 7).add(torch.tensor([3.0, 0, 0, 0, 0, 0, 0])).softmax(-1)  # all like key 0
    one = attention_diversification(weights)
    torch.testing.assert_close(attention_diversification(weights.expand(3, -1, -1, -1)), one)
    assert one > 0.1
    assert attention_diversification(weights, variant="released") == 0.0  # the release averages the wrong way there


def test_minimising_it_parts_the_rows():
    torch.manual_seed(0)
    scores = torch.randn(2, 1, 6, 6).add(torch.tensor([3.0, 0, 0, 0, 0, 0])).requires_grad_()
    optimiser = torch.optim.Adam([scores], lr=0.2)
    before = attention_diversification([scores.softmax(-1)], 0.5).item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = attention_diversification([scores.softmax(-1)], 0.5)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.7 * before


@pytest.mark.parametrize("threshold", [0.0, 2.0, 50.0])
def test_gradients_are_finite_where_nothing_is_kept(threshold):
    weights = torch.full((2, 2, 5, 5), 0.2, requires_grad=True)
    attention_diversification(weights, threshold).backward()
    assert weights.grad.isfinite().all()
    if threshold > 1:
        assert torch.count_nonzero(weights.grad) == 0


def test_gradcheck():
    torch.manual_seed(0)
    weights = attention_maps(1, 2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: attention_diversification([w], 0.9), weights)


def test_half_types_are_summed_in_float32():
    torch.manual_seed(0)
    weights = attention_maps(2, 2, 64, 64, torch.float32)
    got = attention_diversification(weights.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, attention_diversification(weights.bfloat16().float()))


def test_takes_what_record_returns():
    torch.manual_seed(0)
    maps = {3: attention_maps(1, 2, 4, 4), 5: attention_maps(1, 2, 4, 4)}

    class Record:
        layers = (3, 5)

        def weights(self, layer):
            return maps[layer]

    assert attention_diversification(Record()) == attention_diversification(list(maps.values()))


def test_bad_input():
    good = attention_maps(1, 1, 2, 2)
    with pytest.raises(ValueError, match="threshold: got -1, need a number >= 0"):
        attention_diversification([good], -1)
    with pytest.raises(ValueError, match="variant: unknown name 'Paper'; did you mean paper"):
        attention_diversification([good], variant="Paper")
    with pytest.raises(ValueError, match="attns: got .*, need the attention weights of at least one layer"):
        attention_diversification([])
    with pytest.raises(ValueError, match=r"attns: got 'shape \(2, 2\)', need 4 dimensions"):
        attention_diversification([good[0, 0]])
    with pytest.raises(TypeError, match="attns: got int, need a sequence"):
        attention_diversification(3)
    with pytest.raises(TypeError, match=r"attns: got list, need a torch\.Tensor"):
        attention_diversification([[1.0]])
    with pytest.raises(TypeError, match="floating point"):
        attention_diversification([good.long()])
