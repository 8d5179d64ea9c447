"""How well a model answers, from the logits of the next token: one number a prompt.

Every metric is a callable `metric(logits, rows) -> (n,)`: logits (n, V), and which prompt each row belongs to, int64 (n,), so
that it may be asked about some prompts, or about several versions of one. Patching (`total_effects` and its like) takes any such
callable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import require, require_tensor

__all__ = [
    "AnswerCorrect",
    "AnswerLogProb",
    "AnswerProbability",
    "AnswerRank",
    "LabelLoss",
    "LabelMargin",
    "LogitDifference",
    "Metric",
]

Metric = Callable[[Tensor, Tensor], Tensor]


def _ids(name: str, value: Tensor, dims: int = 1) -> Tensor:
    require_tensor(name, value, dims=dims)
    require(value.dtype == torch.int64, name, value.dtype, "int64 token ids")
    return value


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """Logit of the right answer less that of the wrong one. right, wrong: (P,) token ids."""

    right: Tensor
    wrong: Tensor

    def __post_init__(self) -> None:
        _ids("right", self.right)
        _ids("wrong", self.wrong)
        require(
            self.right.shape == self.wrong.shape,
            "wrong",
            f"shape {tuple(self.wrong.shape)}",
            f"{tuple(self.right.shape)}",
        )

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return _of(logits, self.right, rows) - _of(logits, self.wrong, rows)


@dataclass(frozen=True, eq=False)
class AnswerProbability:
    """Probability of the right answer. right: (P,) token ids."""

    right: Tensor

    def __post_init__(self) -> None:
        _ids("right", self.right)

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return _of(logits.softmax(-1), self.right, rows)


@dataclass(frozen=True, eq=False)
class AnswerLogProb:
    """Log-probability of the right answer, in nats. right: (P,) token ids."""

    right: Tensor

    def __post_init__(self) -> None:
        _ids("right", self.right)

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return _of(logits.log_softmax(-1), self.right, rows)


@dataclass(frozen=True, eq=False)
class AnswerRank:
    """Rank of the right answer among all tokens, or among `choices` (P, n) or (n,); 0 = best. Ties count against it."""

    right: Tensor
    choices: Tensor | None = None

    def __post_init__(self) -> None:
        _ids("right", self.right)

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        mine = _of(logits, self.right, rows)[:, None]
        others = logits if self.choices is None else _labels(logits, self.choices, rows)
        return ((others >= mine).sum(-1) - 1).to(logits.dtype)


@dataclass(frozen=True, eq=False)
class AnswerCorrect:
    """1 where no other token (or none of the other `choices`) scores as high as the right one, else 0; its mean is the accuracy."""

    right: Tensor
    choices: Tensor | None = None

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return (AnswerRank(self.right, self.choices)(logits, rows) == 0).to(logits.dtype)


@dataclass(frozen=True, eq=False)
class LabelMargin:
    """Logit of the right label less the mean of all labels' (the centred logit of Lieberum et al. 2023).

    right: (P,) token ids. labels: (P, n) or (n,), the right one among them.
    """

    right: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _ids("right", self.right)

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return _of(logits, self.right, rows) - _labels(logits, self.labels, rows).mean(-1)


@dataclass(frozen=True, eq=False)
class LabelLoss:
    """Cross entropy, in nats, of the right label with the softmax taken over the labels alone. Arguments as of `LabelMargin`."""

    right: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _ids("right", self.right)

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return _labels(logits, self.labels, rows).logsumexp(-1) - _of(logits, self.right, rows)


def _of(values: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    wanted = ids.to(values.device)[rows.to(values.device)]
    return values.gather(-1, wanted[:, None])[:, 0]


def _labels(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    wanted = labels.to(logits.device)
    wanted = wanted.expand(len(logits), -1) if wanted.dim() == 1 else wanted[rows.to(logits.device)]
    return logits.gather(-1, wanted)
