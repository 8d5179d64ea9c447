"""Saliency: how much each input place matters for what a model says, by gradients, by integrated gradients, by leaving it out.

Gradient times input (Shrikumar et al. 2017), integrated gradients (IG, Sundararajan, Taly, Yan 2017, arXiv 1703.01365), its sequential form
(SIG, Enguehard 2023, arXiv 2305.15853), occlusion (Zeiler and Fergus 2014), attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928).
Shared by papers 003, 028, 057, 091, 166. How saliency agrees with attention: `agreement.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor

__all__ = [
    "ModelScore",
    "attention_rollout",
    "gradient_input",
    "integrated_gradients",
    "occlusion",
    "path_gradients",
    "saliency",
]

METHODS = ("gradient_input", "integrated_gradients", "sequential", "discretized", "occlusion")
Score = Callable[[Tensor], Tensor]
"""`score(x) -> (len(x),)`. It is given k copies of the batch, one behind another, with k of its own choice: x is (k * B, ...)."""


def gradient_input(score: Score, x: Tensor) -> Tensor:
    """x * d score / d x, of x's shape."""
    return x.detach() * _gradient(score, x)


def integrated_gradients(
    score: Score,
    x: Tensor,
    baseline: Tensor | float = 0.0,
    steps: int = 50,
    *,
    at_once: int = 1,
    sequential: bool = False,
) -> Tensor:
    """(x - baseline) times the mean gradient on the straight line between them, of x's shape; midpoint rule.

    Its sum over all but the batch axis is score(x) - score(baseline), up to the error of the rule, which falls as 1 / steps^2.

    Args:
        x: (B, T, ...). baseline: broadcastable to x. steps: points on the line (057 takes 50). at_once: how many of them in one pass.
        sequential: SIG: each place t of axis 1 by itself goes from the baseline to x while the others stay at x; T times the cost, and
            each place's sum is score(x) - score(x without t).
    """
    require_int("steps", steps, 1)
    require_int("at_once", at_once, 1)
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    if sequential:
        require(x.dim() >= 2, "x", f"shape {tuple(x.shape)}", "(B, T, ...)")
        made = torch.zeros_like(x)
        for place in range(x.shape[1]):
            gone = x.detach().clone()
            gone[:, place] = start[:, place]
            made[:, place] = integrated_gradients(score, x, gone, steps, at_once=at_once)[:, place]
        return made
    way, total = x.detach() - start, torch.zeros_like(x)
    for first in range(0, steps, at_once):
        shares = [(number + 0.5) / steps for number in range(first, min(first + at_once, steps))]
        points = torch.cat([start + share * way for share in shares])
        total += _gradient(score, points).unflatten(0, (len(shares), len(x))).sum(0)
    return way * total / steps


@torch.no_grad()
def occlusion(
    score: Score,
    x: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    window: int = 1,
    at_once: int = 8,
    masks: Tensor | None = None,
) -> Tensor:
    """score(x) - score(x with some places set to the baseline).

    Args:
        x: (B, T, ...). window: places left out together, around each place in turn; odd. at_once: how many variants in one pass.
        masks: (M, T) bool, True where a variant leaves out, in place of windows.

    Returns:
        (B, T), or (B, M) with `masks`.
    """
    require(x.dim() >= 2, "x", f"shape {tuple(x.shape)}", "(B, T, ...)")
    require_int("at_once", at_once, 1)
    length = x.shape[1]
    if masks is None:
        require(require_int("window", window, 1) % 2 == 1, "window", window, "an odd number of places")
        place = torch.arange(length, device=x.device)
        masks = (place[:, None] - place).abs() <= window // 2
    require(masks.dim() == 2 and masks.shape[1] == length, "masks", f"shape {tuple(masks.shape)}", f"(M, {length})")
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    whole, found = score(x), []
    for some in masks.to(x.device).split(at_once):
        gone = some.view(len(some), 1, length, *[1] * (x.dim() - 2))
        found.append(score(torch.where(gone, start, x).flatten(0, 1)).view(len(some), len(x)))
    return (whole - torch.cat(found)).T if found else x.new_zeros(len(x), 0)


def path_gradients(score: Score, path: Tensor) -> Tensor:
    """The gradient summed along any path, from path[-1] (the baseline) to path[0], (P, B, ...): trapezoids. (B, ...)."""
    require(path.dim() >= 2 and len(path) >= 2, "path", f"shape {tuple(path.shape)}", "(at least 2, B, ...)")
    total, last = torch.zeros_like(path[0]), _gradient(score, path[0])
    for here, there in pairwise(path):
        new = _gradient(score, there)
        total += (here - there) * (last + new) / 2
        last = new
    return total


def _gradient(score: Score, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = score(x)
        require(value.shape == (len(x),), "score", f"shape {tuple(value.shape)}", f"({len(x)},), one number a row")
        return torch.autograd.grad(value.sum(), x)[0]


class ModelScore:
    """What a model says of a target, as a function of its input embeddings: the `Score` that this file's functions take.

    Args:
        model: takes `inputs_embeds` beside the other inputs and gives an object with `logits`: (B, classes) (classifiers; (B, 1) is
            one logit for class 1) or (B, T, V) (language models). `get_input_embeddings()` makes embeddings of `input_ids`.
        inputs: keyword arguments of the model, with `input_ids` or `inputs_embeds`; every tensor has the batch first.
        target: class or token number, or (B,) of them, or a function of the model's output giving (B,); None: what it says itself
            (the largest logit).
        position: of a language model: whose next token; number or (B,); None: the last real one by `attention_mask`.
        of: "logit" or "log_prob".

    Attributes: x: the embeddings (B, T, D). mask: (B, T), which places are real. target: (B,), None for a function.

    The model is run in eval mode and put back; gradients of its parameters are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: int | Tensor | Callable[[Any], Tensor] | None = None,
        *,
        position: int | Tensor | None = None,
        of: str = "logit",
    ) -> None:
        if not isinstance(inputs, Mapping):
            raise bad_type("inputs", inputs, "a mapping of the model's keyword arguments")
        self.model, self.of = model, require_name("of", of, ("logit", "log_prob"))
        self.rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "inputs_embeds")}
        embeds, ids = inputs.get("inputs_embeds"), inputs.get("input_ids")
        require(
            (embeds is None) != (ids is None), "inputs", sorted(inputs), "'input_ids' or 'inputs_embeds', one of them"
        )
        if embeds is None:
            table = model.get_input_embeddings()  # type: ignore[operator]
            with torch.no_grad():
                embeds = table(ids)
        self.x = require_tensor("inputs_embeds", embeds, dims=3, floating=True).detach()
        batch, length = self.x.shape[:2]
        given = self.rest.get("attention_mask")
        if given is None and ids is not None and getattr(model, "pad_id", None) is not None:
            given = ids != model.pad_id  # classifiers of `regard` tell padding by itself; embeddings no longer do
            self.rest["attention_mask"] = given
        self.mask = torch.ones(batch, length, dtype=torch.bool, device=self.x.device) if given is None else given.bool()
        if position is None:
            place = torch.arange(length, device=self.x.device)
            self.position = torch.where(self.mask, place, 0).amax(1)
        else:
            self.position = torch.as_tensor(position, device=self.x.device).expand(batch)
            fits = bool(((self.position >= -length) & (self.position < length)).all())
            require(fits, "position", position, f"places below {length}")
            self.position = self.position % length
        self.read: Callable[[Any], Tensor] | None = None
        self.target: Tensor | None = None
        if callable(target):
            self.read = target
            return
        with torch.no_grad():
            logits = self._logits(self._run(self.x))
        classes = max(2, logits.shape[1])
        self.target = (
            self._largest(logits) if target is None else torch.as_tensor(target, device=self.x.device).expand(batch)
        )
        fits = bool(((self.target >= 0) & (self.target < classes)).all())
        require(fits, "target", target, f"numbers from 0 to {classes - 1}")

    def __call__(self, x: Tensor) -> Tensor:
        output = self._run(x)
        if self.read is not None:
            return self.read(output)
        assert self.target is not None
        logits = self._logits(output).float()
        target = self.target.repeat(len(x) // len(self.x))
        if logits.shape[1] == 1:
            signed = torch.where(target == 1, logits[:, 0], -logits[:, 0])
            return torch.nn.functional.logsigmoid(signed) if self.of == "log_prob" else signed
        if self.of == "log_prob":
            logits = logits.log_softmax(-1)
        return logits.gather(1, target[:, None])[:, 0]

    def _run(self, x: Tensor) -> Any:
        copies = len(x) // len(self.x)
        rest = {
            name: value.repeat(copies, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value
            for name, value in self.rest.items()
        }
        with _still(self.model):
            return self.model(inputs_embeds=x, **rest)

    def _logits(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            raise bad_value(
                "model",
                type(output).__name__,
                "an output with `logits` (B, classes) or (B, T, V), or a function as target",
            )
        if logits.dim() == 3:
            rows = torch.arange(len(logits), device=logits.device)
            logits = logits[rows, self.position.repeat(len(logits) // len(self.x))]
        return logits

    @staticmethod
    def _largest(logits: Tensor) -> Tensor:
        return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def saliency(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: str = "gradient_input",
    target: int | Tensor | Callable[[Any], Tensor] | None = None,
    *,
    position: int | Tensor | None = None,
    of: str = "logit",
    baseline: int | Tensor | float = 0.0,
    steps: int = 50,
    window: int = 1,
    at_once: int = 8,
    magnitude: bool = False,
) -> Tensor:
    """How much each token matters for what the model says, (B, T) float32; 0 at padding.

    >>> saliency(model, tokenizer("The capital of France is", return_tensors="pt"), "integrated_gradients")

    Args:
        model, inputs, target, position, of: see `ModelScore`: `AttentionClassifier`s and Hugging Face classifiers, causal language
            models and masked ones (give `position`) alike.
        method: "gradient_input"; "integrated_gradients"; "sequential" (IG of one token at a time);
            "discretized" (IG along real words, see `discretized.py`); "occlusion" (the score lost where
            `window` tokens, an odd number, are set to the baseline).
        baseline: a number, an embedding (D,) or (B, T, D), or, as an int, the token (pad, mask) whose embedding it is. Note the
            difference of 0 and 0.0. steps, at_once: as in `integrated_gradients`; variants of occlusion at once.
        magnitude: the sum over the embedding of absolute values in place of the sum (gradients; of occlusion the absolute value).
    """
    require_name("method", method, METHODS)
    score = ModelScore(model, inputs, target, position=position, of=of)
    if isinstance(baseline, int) and not isinstance(baseline, bool):
        table = model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            baseline = table(torch.tensor([baseline], device=score.x.device))[0]
    if method == "occlusion":
        found = occlusion(score, score.x, baseline, window=window, at_once=at_once)
        found = found.abs() if magnitude else found
    else:
        if method == "gradient_input":
            each = gradient_input(score, score.x)
        elif method == "discretized":
            from .discretized import discretized_gradients

            table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
            each = discretized_gradients(score, score.x, baseline, table, steps)
        else:
            each = integrated_gradients(
                score, score.x, baseline, steps, at_once=at_once, sequential=method == "sequential"
            )
        found = (each.abs() if magnitude else each).float().sum(-1)
    return found.float().masked_fill(~score.mask, 0.0)


@runtime_checkable
class RecordedWeights(Protocol):
    """What `regard.record` returns, as far as rollout needs it."""

    @property
    def layers(self) -> Sequence[int]: ...

    def weights(self, layer: int) -> Tensor: ...


def attention_rollout(
    attention: RecordedWeights | Sequence[Tensor], *, residual: float = 0.5, heads: str = "mean", first: int = 0
) -> Tensor:
    """How much of each input place is in each output place if attention only mixed: the product of the layers' maps, (B, N, N).

    Args:
        attention: `regard.record(...)`, or weights (B, H, N, N) layer by layer from the first (transformers' `attentions`).
        residual: share of the residual stream, which passes by each layer; default one half. heads: "mean", "max" or "min" over heads.
        first: layer to begin at.

    Rows sum to 1 (rows without anything to attend to keep themselves).
    """
    require_name("heads", heads, ("mean", "max", "min"))
    require(0 <= residual < 1, "residual", residual, "a share in [0, 1)")
    listed = (
        [attention.weights(layer) for layer in attention.layers]
        if isinstance(attention, RecordedWeights)
        else list(attention)
    )
    require(0 <= first < len(listed), "first", first, f"a layer below {len(listed)}")
    rolled: Tensor | None = None
    for weights in listed[first:]:
        require_tensor("attention", weights, dims=4, floating=True)
        require(
            weights.shape[2] == weights.shape[3],
            "attention",
            f"shape {tuple(weights.shape)}",
            "self-attention, (B, H, N, N)",
        )
        mixed = (
            weights.float().mean(1)
            if heads == "mean"
            else weights.float().amax(1)
            if heads == "max"
            else weights.float().amin(1)
        )
        mixed = mixed / mixed.sum(-1, keepdim=True).clamp(min=1e-12)
        eye = torch.eye(mixed.shape[-1], device=mixed.device)
        step = torch.where(mixed.sum(-1, keepdim=True) > 0, (1 - residual) * mixed + residual * eye, eye)
        rolled = step if rolled is None else step @ rolled
    assert rolled is not None
    return rolled


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In eval mode; recurrent layers on a GPU without cuDNN, which has no backward in that mode."""
    modes = [(module, module.training) for module in model.modules()] if model.training else []
    model.eval()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        with torch.backends.cudnn.flags(enabled=False) if recurrent and torch.cuda.is_available() else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
