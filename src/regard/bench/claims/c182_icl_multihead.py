"""182: two softmax heads of opposite sign regress in context as debiased gradient descent does; training finds them."""

from __future__ import annotations

import torch

from ...lens.icl_circuits import icl_circuits
from ...testbeds import tasks
from ...testbeds.in_context import (
    best_mu,
    best_single_head,
    debiased_gradient_descent,
    gradient_descent,
    ridge,
    softmax_heads,
    train_in_context,
)
from .claim import Outcome, Scale

PAPER, SLUG = "182", "icl-multihead"
SAYS = (
    "In-context linear regression: multi-head softmax attention learns diagonal KQ and last-entry OV circuits, its heads pair up with "
    "opposite signs, equal sharpness and values that cancel; it then is debiased gradient descent, far better than one head, and unlike "
    "linear attention it also serves longer prompts."
)
ERROR, LONG = "squared error", "squared error, prompts 4 times as long"
DIM, LENGTH, NOISE = 5, 40, 0.1**0.5


def measure(scale: Scale) -> Outcome:
    steps, number = scale.pick((12_000, 40_000), (30, 500))
    out = Outcome(
        f"{DIM} features, {LENGTH} examples, noise variance 0.1, {number} test prompts, the noise of the question's own y included; four "
        f"heads trained here from torch's weights, {steps} steps of 256 fresh prompts (Adam, 0.01 falling to 0)",
        "test set",
    )
    model, _ = train_in_context(4, DIM, LENGTH, noise=NOISE, steps=steps, lr=1e-2, schedule="cosine", progress=False)
    found = icl_circuits(model)
    omega = torch.tensor([0.13, -0.13], dtype=torch.float64)
    mu = best_mu(omega, DIM, LENGTH, NOISE)
    rate = float(2 * omega[0] * mu[0])
    one = best_single_head(DIM, LENGTH, NOISE)
    for figure, length in ((ERROR, LENGTH), (LONG, 4 * LENGTH)):
        drawn = torch.Generator().manual_seed(10**9 + length)
        prompt, target = tasks.in_context_regression(
            number, length, DIM, noise=NOISE, noisy_target=True, generator=drawn
        )
        with torch.no_grad():
            said = {
                "debiased gradient descent": debiased_gradient_descent(prompt, rate),
                "four heads, trained": model(prompt)[:, 0, 0],
                "two heads by hand": softmax_heads(prompt, omega, mu),
                "best one head": softmax_heads(prompt, *(torch.tensor([value]) for value in one)),
                # its sum over keys is scaled for the length of training
                "linear attention, no normaliser": gradient_descent(prompt, _linear_rate() * length / LENGTH),
                "ridge": ridge(prompt, NOISE),
            }
        base = "debiased gradient descent"
        for label, answer in said.items():
            error = (answer - target[:, 0]).square().mean()
            out.add(label, figure, "", float(error), against=None if label == base else base)
    names = ("debiased gradient descent", "four heads, trained", "two heads by hand", "best one head")
    descent, trained, pair, single = (out.row(label, ERROR).mean for label in names)
    active = found.active
    weight = (found.omega.abs() * found.mu.abs())[active]  # heads that do more count for more
    out.check("error of two heads by hand over debiased gradient descent", pair / descent, at_most=1.02)
    out.check("error of trained heads over debiased gradient descent", trained / descent, at_most=1.02)
    out.check("error of trained heads over the best one head", trained / single, at_most=0.8)
    wrong = float((found.kq_error[active] * weight).sum() / weight.sum())
    out.check("share of trained KQ outside the pattern, heads weighted by what they do", wrong, at_most=0.25)
    wrong = float((found.ov_error[active] * weight).sum() / weight.sum())
    out.check("share of trained OV outside the pattern, the same", wrong, at_most=0.1)
    out.check("|sum of mu| over sum of |mu|", float(found.mu_sum.abs() / found.mu.abs().sum()), at_most=0.05)
    out.check("largest |omega| over the smallest, active heads", found.omega_spread, at_most=1.25)
    longer = out.row("four heads, trained", LONG).mean / out.row("linear attention, no normaliser", LONG).mean
    out.check("error on longer prompts, trained heads over linear attention without a normaliser", longer, at_most=0.9)
    heads = ", ".join(f"{w:.2f}/{m:.2f}" for w, m in zip(found.omega.tolist(), found.mu.tolist()))
    bayes = out.row("ridge", ERROR).mean
    out.note = f"omega/mu of the four heads: {heads}. Ridge, the best there is, has {bayes:.3f}; heads {trained:.3f}."
    return out


def _linear_rate() -> float:
    """Rate of one-step gradient descent with the least expected error at LENGTH examples: 1 / (1 + (1 + d (1 + s^2)) / L)."""
    return 1 / (1 + (1 + DIM * (1 + NOISE**2)) / LENGTH)
