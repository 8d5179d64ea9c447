"""In-context linear regression (182): predictors to compare with, what theory says of attention heads, and training.

He, Pan, Chen, Yang (2025), In-Context Linear Regression Demystified, arXiv 2503.12734. Code read for numbers: XintianPan/ICL_linear
@ 87ed34f (no licence), `utils/funcs.py`, `utils/data_utils.py`.

A prompt (B, L + 1, d + 1) has L examples [x, y] and a question [x, 0], as `tasks.in_context_regression` makes them. `noise` is a
standard deviation everywhere. Heads are two numbers each: omega (how sharply a head attends to like x; it holds the 1 / sqrt(d + 1)
of the scores) and mu (what it adds of the y found).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .._checks import require, require_int, require_tensor
from ..losses.runner import Fitted
from ..nn.sequence.in_context_attention import InContextAttention
from . import tasks
from .training import train, vector_loss

__all__ = [
    "Flow",
    "approximate_gradients",
    "approximate_loss",
    "best_mu",
    "best_single_head",
    "debiased_gradient_descent",
    "gradient_descent",
    "gradient_flow",
    "ridge",
    "ridge_risk",
    "softmax_heads",
    "train_in_context",
    "two_regressions",
]


def two_regressions(
    batch: int,
    length: int,
    dim: int = 6,
    first: int = 4,
    second: int = 4,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Two linear maps of one x: y1 of its first `first` features, y2 of its last `second` ones. The paper's multi-task data.

    Prompts (batch, length + 1, dim + 2), targets (batch, 2). Maps are N(0, 1) without the 1 / dim of `in_context_regression`, noise
    of the examples is N(0, features * noise^2), the targets have none (as released).
    """
    for name, value, least in (("batch", batch, 0), ("length", length, 1), ("dim", dim, 1)):
        require_int(name, value, least)
    for name, value in (("first", first), ("second", second)):
        require(require_int(name, value, 1) <= dim, name, value, f"at most dim ({dim})")
    require(noise >= 0, "noise", noise, "a number >= 0")
    x = torch.randn(batch, length + 1, dim, generator=generator)
    y = []
    for part in (x[..., :first], x[..., dim - second :]):
        y.append(part @ torch.randn(batch, part.shape[2], 1, generator=generator))
    clean = torch.cat(y, dim=2)
    spread = noise * torch.tensor([first, second], dtype=clean.dtype).sqrt()
    seen = clean + spread * torch.randn(clean.shape, generator=generator)
    seen[:, -1] = 0
    return torch.cat((x, seen), dim=2), clean[:, -1]


def _parts(prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, d), y (B, L), x of the question (B, d)."""
    require_tensor("prompt", prompt, dims=3, floating=True)
    fits = prompt.shape[1] >= 2 and prompt.shape[2] >= 2
    require(fits, "prompt", f"shape {tuple(prompt.shape)}", "(B, L + 1, d + 1) with L, d >= 1")
    return prompt[:, :-1, :-1], prompt[:, :-1, -1], prompt[:, -1, :-1]


def softmax_heads(prompt: Tensor, omega: Tensor, mu: Tensor) -> Tensor:
    """sum_h mu_h y^T softmax(omega_h X x_q), a number a prompt (B,): the trained layer with its weights put in the pattern exactly.

    omega, mu: (H,).
    """
    _heads(omega, mu)
    x, y, asked = _parts(prompt)
    scores = torch.einsum("bld,bd->bl", x, asked)
    weights = (scores[:, None] * omega.to(scores)[:, None]).softmax(-1)
    return torch.einsum("bhl,bl,h->b", weights, y, mu.to(scores))


def gradient_descent(prompt: Tensor, rate: float) -> Tensor:
    """rate / L * sum_i y_i x_i^T x_q (B,): one step of least squares from 0. The paper's rate is 2 omega mu for a pair of heads."""
    x, y, asked = _parts(prompt)
    return rate * torch.einsum("bld,bl,bd->b", x, y, asked) / x.shape[1]


def debiased_gradient_descent(prompt: Tensor, rate: float) -> Tensor:
    """The same with the mean of y taken off: what heads (omega, mu) and (-omega, -mu) do for small omega, with rate 2 omega mu."""
    x, y, asked = _parts(prompt)
    return rate * torch.einsum("bld,bl,bd->b", x, y - y.mean(1, keepdim=True), asked) / x.shape[1]


def ridge(prompt: Tensor, noise: float) -> Tensor:
    """Ridge regression with penalty d noise^2 (B,): the best there is for maps N(0, 1 / d). noise > 0, or at least d examples."""
    x, y, asked = _parts(prompt)
    require(noise >= 0, "noise", noise, "a number >= 0")
    dim = x.shape[2]
    enough = noise > 0 or x.shape[1] >= dim
    require(enough, "noise", noise, f"a number > 0 for {x.shape[1]} examples of {dim} features")
    gram = x.transpose(1, 2) @ x + noise**2 * dim * torch.eye(dim, dtype=x.dtype, device=x.device)
    return (torch.linalg.solve(gram, torch.einsum("bld,bl->bd", x, y)[..., None])[..., 0] * asked).sum(1)


def ridge_risk(noise: float, ratio: float) -> float:
    """Mean squared error of that ridge regression, the question's own noise included, for large d and L with d / L = ratio."""
    require(noise >= 0, "noise", noise, "a number >= 0")
    require(ratio > 0, "ratio", ratio, "a number > 0")
    variance, gap = noise**2, (ratio - 1) / ratio
    return 0.5 * (variance + gap + math.sqrt(4 * variance + (variance - gap) ** 2))


def _heads(omega: Tensor, mu: Tensor | None = None) -> None:
    require_tensor("omega", omega, dims=1, floating=True)
    if mu is not None:
        require_tensor("mu", mu, dims=1, floating=True)
        require(mu.shape == omega.shape, "mu", f"shape {tuple(mu.shape)}", f"{tuple(omega.shape)} like omega")


def _curvature(omega: Tensor, dim: int, length: int, noise: float) -> tuple[Tensor, Tensor]:
    """The quadratic form of the loss in mu, and the part of it that comes from a finite prompt."""
    require_int("dim", dim, 1)
    require_int("length", length, 1)
    require(noise >= 0, "noise", noise, "a number >= 0")
    outer = omega[:, None] * omega
    finite = (1 + noise**2) / length * (dim * outer).exp()
    return outer + finite, finite


def approximate_loss(omega: Tensor, mu: Tensor, dim: int, length: int, noise: float) -> Tensor:
    """1 + noise^2 - 2 mu^T omega + mu^T (omega omega^T + (1 + noise^2) / L exp(d omega omega^T)) mu: the paper's loss for long prompts.

    omega, mu (H,) -> scalar. The released dynamics descend half of it.
    """
    _heads(omega, mu)
    curvature, _ = _curvature(omega, dim, length, noise)
    return 1 + noise**2 - 2 * mu @ omega + mu @ curvature @ mu


def approximate_gradients(omega: Tensor, mu: Tensor, dim: int, length: int, noise: float) -> tuple[Tensor, Tensor]:
    """Gradients of `approximate_loss` for omega and for mu, written out."""
    _heads(omega, mu)
    curvature, finite = _curvature(omega, dim, length, noise)
    of_omega = -2 * mu + 2 * (mu @ omega) * mu + 2 * dim * mu * (finite @ (mu * omega))
    return of_omega, -2 * omega + 2 * curvature @ mu


def best_mu(omega: Tensor, dim: int, length: int, noise: float) -> Tensor:
    """mu (H,) of least `approximate_loss` for given omega. Two heads of one omega have no single best one (an error)."""
    _heads(omega)
    curvature, _ = _curvature(omega, dim, length, noise)
    require(len(omega.unique()) == len(omega), "omega", omega.tolist(), "heads that differ")
    return torch.linalg.solve(curvature, omega)


def best_single_head(dim: int, length: int, noise: float) -> tuple[float, float]:
    """(omega, mu) of the best one head: 1 / sqrt(d) and sqrt(d) / (1 + (1 + noise^2) e d / L)."""
    omega = torch.tensor([dim**-0.5], dtype=torch.float64)
    return float(omega), float(best_mu(omega, dim, length, noise))


@dataclass
class Flow:
    """What heads went through. omega, mu (steps + 1, H); loss (steps + 1,), of `approximate_loss`."""

    omega: Tensor
    mu: Tensor
    loss: Tensor


def gradient_flow(
    omega: Tensor, mu: Tensor, dim: int, length: int, noise: float, *, rate: float = 1e-2, steps: int = 1000
) -> Flow:
    """Descend half of `approximate_loss` from omega, mu (H,) in `steps` steps of `rate` (as released): training in theory.

    Heads that start alike stay alike; from small values they grow together, then split by the signs of omega and mu.
    """
    _heads(omega, mu)
    require_int("steps", steps, 0)
    require(rate > 0, "rate", rate, "a number > 0")
    seen = [(omega, mu)]
    for _ in range(steps):
        of_omega, of_mu = approximate_gradients(omega, mu, dim, length, noise)
        omega, mu = omega - rate / 2 * of_omega, mu - rate / 2 * of_mu
        seen.append((omega, mu))
    loss = torch.stack([approximate_loss(w, m, dim, length, noise) for w, m in seen])
    return Flow(torch.stack([w for w, _ in seen]), torch.stack([m for _, m in seen]), loss)


def train_in_context(
    num_heads: int = 2,
    dim: int = 5,
    length: int | None = None,
    *,
    noise: float = math.sqrt(0.1),
    steps: int = 20_000,
    batch: int = 256,
    lr: float = 1e-3,
    schedule: str = "constant",
    init: str = "random",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> tuple[InContextAttention, Fitted]:
    """A layer of `num_heads` heads trained on fresh prompts of `length` (default 8 dim) examples. The paper takes 500 000 steps.

    Adam, with a constant rate as published; `schedule="cosine"` and a larger `lr` show the pattern in far fewer steps.
    `out`: file to keep it in, and to go on from after a kill (see `regard.testbeds.training.train`).
    """
    require_int("dim", dim, 1)
    length = 8 * dim if length is None else require_int("length", length, 1)
    with torch.random.fork_rng():
        torch.manual_seed(require_int("seed", seed, 0))
        model = InContextAttention(dim + 1, num_heads, init=init)
    make = tasks.batches(tasks.in_context_regression, batch, length, dim, noise=noise, noisy_target=True, seed=seed)
    adam = partial(torch.optim.Adam, lr=lr)
    fitted = train(
        model, make, steps=steps, loss=vector_loss, lr=lr, schedule=schedule, warmup=0, clip=None, optimizer=adam,
        out=out, seed=seed, progress=progress, label="in-context regression", save_every=1000,
    )  # fmt: skip
    return model, fitted
