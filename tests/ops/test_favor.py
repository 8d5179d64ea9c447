"""Random features: what they estimate, their directions, and what is refused."""

import pytest
import torch

from regard.ops import attention, linear_attention
from regard.ops.state import orthogonal_projection, relu_features, softmax_features


def inputs(n=20, m=24, d=8):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, length, d, generator=g) for length in (n, m, m))


def test_rows_are_orthogonal_in_blocks_and_long_as_gaussian_ones():
    w = orthogonal_projection(20, 8, generator=torch.Generator().manual_seed(1))
    assert w.shape == (20, 8)
    for block in w.split(8):
        products = block @ block.T
        torch.testing.assert_close(products, torch.diag(products.diag()), atol=1e-5, rtol=0)
    regular = orthogonal_projection(6, 8, regular=True, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(regular.norm(dim=1), torch.full((6,), 8**0.5))
    heads = orthogonal_projection(5, 8, 3, generator=torch.Generator().manual_seed(1))
    assert heads.shape == (3, 5, 8) and not torch.equal(heads[0], heads[1])
    free = orthogonal_projection(4, 8, orthogonal=False, generator=torch.Generator().manual_seed(1))
    assert (free @ free.T - torch.diag((free @ free.T).diag())).abs().max() > 0.1


def test_many_features_come_near_softmax_attention():
    q, k, v = (x / 2 for x in inputs())
    exact = attention(q, k, v)
    errors = []
    for count in (32, 2048):
        w = orthogonal_projection(count, 8, generator=torch.Generator().manual_seed(2))
        features = softmax_features(q, w, query=True, eps=0.0), softmax_features(k, w, query=False, eps=0.0)
        made = linear_attention(*features, v, normalize=True, causal=False)
        errors.append(float((made - exact).abs().mean() / exact.abs().mean()))
    assert errors[1] < 0.08 < errors[0]


def test_the_kernel_is_unbiased():
    q, k, _ = (x / 2 for x in inputs(3, 3))
    true = (q @ k.transpose(-1, -2) * 8**-0.5).exp()
    total = torch.zeros_like(true)
    for seed in range(200):
        w = orthogonal_projection(16, 8, generator=torch.Generator().manual_seed(seed))
        y, z = (x * 8**-0.25 for x in (q, k))
        features = [((x @ w.T) - x.square().sum(-1, keepdim=True) / 2).exp() * 16**-0.5 for x in (y, z)]
        total += features[0] @ features[1].transpose(-1, -2)
        # what `softmax_features` takes off for range, put back
        mine = softmax_features(q, w, True, eps=0.0) * (y @ w.T).amax(-1, keepdim=True).exp()
        torch.testing.assert_close(mine, features[0], rtol=1e-4, atol=1e-6)
    assert (total / 200 / true).mean() == pytest.approx(1, abs=0.03)


def test_halves_stay_halves_and_large_inputs_finite():
    w = orthogonal_projection(16, 8)
    x = (30 * torch.randn(1, 2, 5, 8)).to(torch.bfloat16).requires_grad_()
    for query in (True, False):
        made = softmax_features(x, w, query)
        assert made.dtype == torch.bfloat16 and made.isfinite().all() and (made >= 0).all()
        made.sum().backward()
        assert x.grad.isfinite().all()


def test_relu_features():
    q, _, _ = inputs()
    w = orthogonal_projection(6, 8)
    assert relu_features(q, w).shape == (2, 3, 20, 6) and (relu_features(q, w) >= 1e-3).all()
    torch.testing.assert_close(relu_features(q, None, eps=0.5, normalise=False), q.relu() + 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: orthogonal_projection(0, 4), "count"),
        (lambda: softmax_features(torch.zeros(1, 2, 3, 4), torch.zeros(5, 3), True), "projection"),
        (lambda: softmax_features(torch.zeros(1, 2, 3, 4), torch.zeros(3, 5, 4), True), "projection"),
        (lambda: relu_features(torch.zeros(2, 3, 4)), "x: got"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
