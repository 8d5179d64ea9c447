"""Adversarial training of attention: the loss at the perturbation of the attention logits that hurts most, beside the plain loss.

Attention AT and iAT (003): Kitada and Iyatomi, "Attention Meets Perturbations" (IEEE Access 2021, arXiv 2009.12064); code read for
numbers: shunk031/attention-meets-perturbation @ d40a5ca (MIT). Attention VAT and iVAT (028): the same authors, "Making Attention
Mechanisms More Robust and Interpretable with Virtual Adversarial Training" (Applied Intelligence 2022, arXiv 2104.08763); no code.

What differs. The released AT adds its gradients to those of the pass that finds the perturbation, so that the plain loss counts
twice; the released iAT never uses the differences of attention: its perturbation is that of AT with the sign flipped, which helps the
model instead of attacking it. `variant="released"` gives both. And of the paper's iAT, as far as its formulas are known to us: with each
word's vector of differences normalised (`differences="word"`), the best weights of first order give exactly the perturbation of AT, because
the logits are scalars (a test shows it). `differences="sentence"` normalises over the sentence, and then words whose attention stands
apart are perturbed more. Neither needs the T x T matrix: row norms of the differences have a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_name, require_tensor

__all__ = [
    "AttentionAT",
    "AttentionVAT",
    "PerturbedLoss",
    "VirtualLoss",
    "classification_loss",
    "difference_scale",
    "perturbation_along",
]

VARIANTS, DIFFERENCES = ("paper", "released"), ("word", "sentence")


class HasAttention(Protocol):
    """What these losses need of a model's output (`regard.models.Classified` is one)."""

    logits: Tensor
    attention_logits: Tensor


Inputs = Mapping[str, Any]
Criterion = Callable[[Tensor, Tensor], Tensor]


class PerturbedLoss(NamedTuple):
    """total: what to differentiate; clean, adversarial: its two parts, unweighted; perturbation (B, T); output of the clean pass."""

    total: Tensor
    clean: Tensor
    adversarial: Tensor
    perturbation: Tensor
    output: Any


class VirtualLoss(NamedTuple):
    """loss: mean KL, to be weighted and added; perturbation (B, T); output of the clean pass, with its graph."""

    loss: Tensor
    perturbation: Tensor
    output: Any


def classification_loss(logits: Tensor, labels: Tensor, pos_weight: float | Tensor | None = None) -> Tensor:
    """Mean cross entropy of (B, classes), or, of (B, 1), binary cross entropy in which class 1 counts `pos_weight` times."""
    require_tensor("logits", logits, dims=2, floating=True)
    if logits.shape[1] > 1:
        require(pos_weight is None, "pos_weight", pos_weight, "None where there is a logit for each class")
        return F.cross_entropy(logits, labels)
    labels = labels.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], labels, reduction="none")
    if pos_weight is not None:
        loss = loss * (labels * pos_weight + 1 - labels)
    return loss.mean()


def difference_scale(attention_logits: Tensor, differences: str = "word") -> Tensor:
    """(B, T): the norm that the vector of normalised differences d_t = (a_k - a_t)_k of each word has.

    differences: "word": each d_t normalised by itself (1, or 0 where all logits are equal); "sentence": all of them together
    (their squares then sum to 1). -inf logits are no words: they have no differences and count in none.
    """
    require_name("differences", differences, DIFFERENCES)
    real = torch.isfinite(attention_logits)
    count = real.sum(1, keepdim=True)
    logits = attention_logits.masked_fill(~real, 0.0)
    centred = (logits - logits.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~real, 0.0)
    # sum_k (a_k - a_t)^2 = T a_t^2 + sum_k a_k^2, for logits whose mean is zero
    square = (count * centred.square() + centred.square().sum(1, keepdim=True)).masked_fill(~real, 0.0)
    if differences == "word":
        return (square > 0).to(logits.dtype)
    return square.sqrt() / square.sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def perturbation_along(gradient: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """The perturbation (B, T) of size eps that raises a loss most, to first order, each row by itself.

    gradient: (B, T), of the loss by the attention logits. Without `scale` (AT, VAT): eps * g / |g|. With the scale of
    `difference_scale` (iAT, iVAT): r_t = sum_k alpha_tk d_tk for weights alpha = eps * G / |G|, G_tk = g_t d_tk, over all t and k of a row.
    """
    if scale is None:
        return eps * F.normalize(gradient, dim=1)
    weights = F.normalize(gradient * scale, dim=1)  # |G_t| = |g_t| |d_t|
    return eps * weights * scale


@dataclass(frozen=True)
class AttentionAT:
    """Attention AT, and iAT with `interpretable=True`: `loss = AttentionAT()(model, inputs, labels).total`, in training only.

    L(a) + lam * L(a + r) for attention logits a and r of size `eps` a row, along the gradient of L at a. r is a constant; padded places
    have none. The gradient is taken by itself: gradients of parameters are left alone.

    Args:
        eps: size of r; the paper tunes it up to 30. lam: weight of the adversarial loss; default 1.
        interpretable: iAT. differences: "word" (the paper's, which equals AT; see the head of this file) or "sentence".
        variant: "paper", or "released": the plain loss counts twice, and iAT is AT with r's sign flipped. The default is the paper's
            because the released iAT attacks nothing.

    The model takes `model(**inputs, logits_delta=(B, T) or None)` and gives an object with `logits` and `attention_logits`
    (`regard.models.AttentionClassifier`).
    """

    eps: float = 5.0
    lam: float = 1.0
    interpretable: bool = False
    differences: str = "word"
    variant: str = "paper"

    def __post_init__(self) -> None:
        require(self.eps >= 0, "eps", self.eps, "a number >= 0")
        require_name("variant", self.variant, VARIANTS)
        require_name("differences", self.differences, DIFFERENCES)

    def __call__(
        self, model: nn.Module, inputs: Inputs, labels: Tensor, criterion: Criterion = classification_loss
    ) -> PerturbedLoss:
        """criterion: (logits, labels) -> scalar mean. labels: whatever it takes."""
        delta = _zeros_like_attention(model, inputs)
        output = model(**inputs, logits_delta=delta)
        clean = criterion(output.logits, labels)
        gradient = torch.autograd.grad(clean, delta, retain_graph=True)[0]
        r = self.perturbation(gradient, output.attention_logits.detach())
        adversarial = criterion(model(**inputs, logits_delta=r).logits, labels)
        plain = 2 * clean if self.variant == "released" else clean
        return PerturbedLoss(plain + self.lam * adversarial, clean, adversarial, r, output)

    def perturbation(self, gradient: Tensor, attention_logits: Tensor) -> Tensor:
        """r (B, T) from the gradient by the logits and the logits."""
        if not self.interpretable:
            return perturbation_along(gradient, self.eps)
        if self.variant == "released":
            return -perturbation_along(gradient, self.eps)
        return perturbation_along(gradient, self.eps, difference_scale(attention_logits, self.differences))


@dataclass(frozen=True)
class AttentionVAT:
    """Attention VAT, and iVAT with `interpretable=True`: mean KL(p || p at a + r); no labels, so that any text will do.

    `loss = cross_entropy + lam * AttentionVAT()(model, inputs).loss`. p is the model's own prediction, a constant; r of size `eps` a row
    raises the KL most, found by `n_power` steps of power iteration from a random direction of size `xi`. Every pass sees the same
    dropout noise. One logit (B, 1) counts as the two classes [1 - sigmoid, sigmoid].

    Args:
        eps: size of r. xi: of the step of the power iteration. n_power: steps, at least 1.
        interpretable, differences: as in `AttentionAT` (with "word", iVAT is VAT).
    """

    eps: float = 5.0
    xi: float = 0.1
    n_power: int = 1
    interpretable: bool = False
    differences: str = "word"

    def __post_init__(self) -> None:
        require(self.eps >= 0, "eps", self.eps, "a number >= 0")
        require(self.xi > 0, "xi", self.xi, "a number > 0")
        require_int("n_power", self.n_power, 1)
        require_name("differences", self.differences, DIFFERENCES)

    def __call__(self, model: nn.Module, inputs: Inputs, generator: torch.Generator | None = None) -> VirtualLoss:
        """generator: of the random direction; None = torch's own."""
        shape = _zeros_like_attention(
            model, inputs
        )  # drawn first: the state that every pass starts from must move on between calls
        start = torch.randn(shape.shape, generator=generator, dtype=shape.dtype).to(shape.device)
        with _same_noise(inputs) as again:
            output = model(**inputs, logits_delta=None)
            log_p = _log_probabilities(output.logits).detach()
            logits = output.attention_logits.detach()
            real = torch.isfinite(logits)
            scale = difference_scale(logits, self.differences) if self.interpretable else None
            r = perturbation_along(start.masked_fill(~real, 0.0), 1.0, scale)

            def divergence(delta: Tensor) -> Tensor:
                again()
                log_q = _log_probabilities(model(**inputs, logits_delta=delta).logits)
                return (log_p.exp() * (log_p - log_q)).sum(1).mean()

            for _ in range(self.n_power):
                delta = (self.xi * r).detach().requires_grad_()
                with torch.enable_grad():
                    gradient = torch.autograd.grad(divergence(delta), delta)[0]
                r = perturbation_along(gradient, 1.0, scale)
            r = self.eps * r
            return VirtualLoss(divergence(r), r, output)


def _zeros_like_attention(model: nn.Module, inputs: Inputs) -> Tensor:
    """(B, T) zeros that want a gradient, for the first text among the inputs."""
    for name in ("input_ids", "inputs_embeds"):
        given = inputs.get(name)
        if given is not None:
            dtype = given.dtype if given.is_floating_point() else next(model.parameters()).dtype
            return torch.zeros(given.shape[:2], dtype=dtype, device=given.device, requires_grad=True)
    raise ValueError(f"inputs: got {sorted(inputs)}, need 'input_ids' or 'inputs_embeds'")


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return torch.cat((F.logsigmoid(-logits), F.logsigmoid(logits)), dim=1)
    return logits.log_softmax(1)


@contextmanager
def _same_noise(inputs: Inputs) -> Iterator[Callable[[], None]]:
    """A function that sets torch's random numbers back to where they stand now; afterwards they go on as after one pass."""
    devices = sorted({t.device for t in inputs.values() if isinstance(t, Tensor) and t.is_cuda}, key=str)
    state, on_gpu = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

    def again() -> None:
        torch.set_rng_state(state)
        for device, one in zip(devices, on_gpu):
            torch.cuda.set_rng_state(one, device)

    yield again
