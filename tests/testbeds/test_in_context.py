"""In-context regression: reference predictors, the theory's formulas, data and a short training."""

import math

import pytest
import torch

from regard.nn import InContextAttention
from regard.testbeds import in_context, tasks

NOISE = 0.1**0.5


def prompts(batch=64, length=40, dim=5, seed=0):
    made = tasks.in_context_regression(
        batch, length, dim, noise=NOISE, noisy_target=True, generator=torch.Generator().manual_seed(seed)
    )
    return made[0].double(), made[1][:, 0].double()


def test_the_target_has_noise_where_wanted():
    def draw(**options):
        return tasks.in_context_regression(4000, 2, 3, noise=0.5, generator=torch.Generator().manual_seed(1), **options)

    (plain, clean), (same, noisy) = draw(), draw(noisy_target=True)
    assert torch.equal(plain, same)
    assert (noisy - clean).std().item() == pytest.approx(0.5, rel=0.05)


def test_two_regressions():
    z, y = in_context.two_regressions(3, 50, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    assert z.shape == (3, 51, 8) and y.shape == (3, 2) and bool((z[:, -1, 6:] == 0).all())
    for number, part in enumerate((slice(0, 4), slice(3, 6))):
        x, seen = z[:, :-1, part].double(), z[:, :-1, 6 + number, None].double()
        found = torch.linalg.lstsq(x, seen).solution
        torch.testing.assert_close(x @ found, seen, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            (z[:, -1:, part].double() @ found)[:, 0, 0], y[:, number].double(), atol=1e-5, rtol=0
        )
    noisy, target = in_context.two_regressions(2000, 1, 6, 4, 1, noise=2.0, generator=torch.Generator().manual_seed(0))
    assert noisy[:, 0, 6:].var(0).tolist() == pytest.approx([4 + 16, 1 + 4], rel=0.15)
    assert target.var(0).tolist() == pytest.approx([4, 1], rel=0.2)


def test_layer_in_the_pattern_is_the_estimator():
    prompt, _ = prompts(8)
    omega, mu = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([1.5, -1.0, 0.2]).double()
    layer = InContextAttention(6, 3).double()
    layer.set_pattern(omega, mu)
    torch.testing.assert_close(layer(prompt)[:, 0, 0], in_context.softmax_heads(prompt, omega, mu))


def test_a_small_pair_is_debiased_gradient_descent():
    prompt, _ = prompts()
    product, apart = 0.44, []
    for omega in (0.1, 0.05, 0.025):
        heads = torch.tensor([omega, -omega]).double()
        found = in_context.softmax_heads(prompt, heads, product / heads)
        apart.append((found - in_context.debiased_gradient_descent(prompt, 2 * product)).abs().max().item())
    assert apart[0] > 3.5 * apart[1] > 12 * apart[2] > 0  # the error is of second order in omega
    plain = in_context.gradient_descent(prompt, 2 * product)
    assert (found - plain).abs().max() > 10 * apart[2]


def test_debiasing_takes_the_mean_off():
    prompt, _ = prompts(4)
    prompt[:, :-1, -1] -= prompt[:, :-1, -1].mean(1, keepdim=True)
    torch.testing.assert_close(
        in_context.gradient_descent(prompt, 0.7), in_context.debiased_gradient_descent(prompt, 0.7)
    )
    moved = prompt.clone()
    moved[:, :-1, -1] += 3
    torch.testing.assert_close(
        in_context.debiased_gradient_descent(moved, 0.7), in_context.debiased_gradient_descent(prompt, 0.7)
    )


def test_ridge():
    clean, target = tasks.in_context_regression(16, 20, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_context.ridge(clean, 0.0), target[:, 0], atol=1e-4, rtol=1e-4)
    prompt, target = prompts(4000)
    risk = (in_context.ridge(prompt, NOISE) - target).square().mean().item()
    assert risk == pytest.approx(in_context.ridge_risk(NOISE, 5 / 40), rel=0.08)
    assert all(risk <= (in_context.ridge(prompt, noise) - target).square().mean() for noise in (0.05, 1.0))
    with pytest.raises(ValueError, match="^noise: "):
        in_context.ridge(clean[:, -3:], 0.0)


def test_gradients_are_those_of_the_loss():
    omega, mu = torch.tensor([0.3, -0.2, 0.15]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    omega.requires_grad_(), mu.requires_grad_()
    by_hand = in_context.approximate_gradients(omega, mu, 5, 40, NOISE)
    torch.testing.assert_close(
        by_hand, torch.autograd.grad(in_context.approximate_loss(omega, mu, 5, 40, NOISE), (omega, mu))
    )


def test_best_mu_has_no_gradient():
    omega = torch.tensor([0.3, -0.2, 0.15]).double()
    mu = in_context.best_mu(omega, 5, 40, NOISE)
    assert in_context.approximate_gradients(omega, mu, 5, 40, NOISE)[1].abs().max() < 1e-12


def test_single_head_is_the_best_of_one():
    omega, mu = in_context.best_single_head(5, 40, NOISE)
    assert omega == pytest.approx(5**-0.5) and mu == pytest.approx(5**0.5 / (1 + 1.1 * 5 * math.e / 40))
    gradients = in_context.approximate_gradients(
        torch.tensor([omega], dtype=torch.float64), torch.tensor([mu], dtype=torch.float64), 5, 40, NOISE
    )
    assert max(g.abs().item() for g in gradients) < 1e-9


def test_flow_descends_and_heads_pair_up():
    omega, mu = torch.tensor([0.02, -0.01, 0.015]).double(), torch.tensor([0.01, -0.02, 0.01]).double()
    flow = in_context.gradient_flow(omega, mu, 5, 40, NOISE, rate=0.05, steps=4000)
    assert flow.omega.shape == (4001, 3) and bool((flow.loss.diff() <= 1e-9).all())
    assert torch.equal(flow.omega[0], omega) and torch.equal(flow.mu[0], mu)
    assert (flow.omega[-1] > 0).tolist() == (flow.mu[-1] > 0).tolist() == [True, False, True]
    assert flow.mu[-1].sum().abs() < 0.05 * flow.mu[-1].abs().sum()
    omega, mu = (torch.tensor([0.02, 0.02]).double(),) * 2
    alike = in_context.gradient_flow(omega, mu, 5, 40, NOISE, rate=0.02, steps=50)
    assert torch.equal(alike.omega[:, 0], alike.omega[:, 1])


def test_training_learns_and_goes_on(tmp_path):
    options = dict(dim=2, length=8, batch=32, lr=2e-2, seed=3, progress=False)
    model, fitted = in_context.train_in_context(2, steps=150, **options)
    assert sum(fitted.losses[-20:]) < 0.8 * sum(fitted.losses[:20])
    again, _ = in_context.train_in_context(2, steps=150, **options, out=tmp_path / "heads.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: in_context.two_regressions(2, 4, 3, 4, 1), "first"),
        (lambda: in_context.two_regressions(2, 4, 3, 3, 1, noise=-1.0), "noise"),
        (lambda: in_context.softmax_heads(torch.randn(2, 1, 3), torch.ones(1), torch.ones(1)), "prompt"),
        (lambda: in_context.softmax_heads(torch.randn(2, 4, 3), torch.ones(2), torch.ones(1)), "mu"),
        (lambda: in_context.ridge(torch.randn(2, 4, 3), -0.1), "noise"),
        (lambda: in_context.ridge_risk(0.1, 0.0), "ratio"),
        (lambda: in_context.approximate_loss(torch.ones(2), torch.ones(2), 5, 0, 0.1), "length"),
        (lambda: in_context.gradient_flow(torch.ones(2), torch.ones(2), 5, 9, 0.1, rate=0.0), "rate"),
        (lambda: in_context.best_mu(torch.tensor([0.3, 0.1, 0.3]), 5, 40, 0.1), "omega"),
        (lambda: in_context.train_in_context(2, 0), "dim"),
    ],
)
def test_errors(make, named):
    with pytest.raises(ValueError, match=rf"^{named}: "):
        make()
