"""Item transitions taught to item vectors: which item follows which, counted in the training sequences, is the teacher.

MQSA-TED (Zhu et al., WSDM 2024, arXiv 2311.01056), its equations of transition-aware embedding distillation. Code read for numbers:
zhuty16/MQSA-TED @ 91c9001 (no licence). As released: an item that nothing follows teaches that everything is equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor

__all__ = ["TransitionDistilledLoss", "transition_counts", "transition_distillation"]


def transition_counts(sequences: Sequence[Tensor], num_items: int, span: int = 1) -> Tensor:
    """Sparse (num_items, num_items): how often item b comes 1 to `span` steps after item a, at [a, b]."""
    require_int("num_items", num_items, 1)
    pairs = [
        torch.stack((row[:-step], row[step:]))
        for row in sequences
        for step in range(1, require_int("span", span, 1) + 1)
        if len(row) > step
    ]
    where = torch.cat(pairs, 1) if pairs else torch.zeros(2, 0, dtype=torch.int64)
    fits = not where.numel() or (int(where.min()) >= 0 and int(where.max()) < num_items)
    require(fits, "sequences", "numbers out of range", f"items from 0 to {num_items - 1}")
    return torch.sparse_coo_tensor(
        where, torch.ones(where.shape[1]), (num_items, num_items), check_invariants=False
    ).coalesce()


def transition_distillation(heads: Tensor, items: Tensor, counts: Tensor, tau: float = 0.1) -> Tensor:
    """Cross entropy of the teacher softmax(counts / max(counts) / tau) and the student softmax(heads items^T / tau), mean over rows.

    Args:
        heads: (M, dim), vectors of the items that come first. items: (num_items, dim), of those that may follow.
        counts: (M, num_items), row i: how often each item follows the item of heads[i]. tau: temperature of both.
    """
    require_tensor("heads", heads, dims=2, floating=True)
    need = f"({heads.shape[0]}, {items.shape[0]})"
    require(tuple(counts.shape) == (heads.shape[0], items.shape[0]), "counts", f"shape {tuple(counts.shape)}", need)
    require(tau > 0, "tau", tau, "a number above 0")
    teacher = (counts / (counts.amax(1, keepdim=True) + 1e-24) / tau).softmax(1)
    student = (heads @ items.T / tau).softmax(1)
    return -(teacher * (student + 1e-24).log()).sum(1).mean()


@dataclass(frozen=True)
class TransitionDistilledLoss:
    """The loss of MQSA-TED: next item + weight * distillation + l2 * half the squares of all parameters. For `train(loss=)`.

    Attributes:
        counts: of `transition_counts`, over the training sequences. weight: of the distillation; 0 leaves it out. tau: its temperature.
        l2: of the parameters.

    The model is `regard.models.MQSATED`, or has its `items`, `embed_items` and logits. A batch is (ids, the ids after them), both
    (B, N) and padded with `num_items`, as `next_item_batches` makes them. Every item of a batch distils as often as it is there.
    """

    counts: Tensor
    weight: float = 0.1
    tau: float = 0.1
    l2: float = 1e-4

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return sum(self.parts(model, batch).values())  # type: ignore[return-value]

    def parts(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The three summands, weighted: "next", "transition", "l2"."""
        ids, after = batch
        own: Any = getattr(model, "module", model)
        padding = own.num_items
        logits = model(ids)
        made = {"next": F.cross_entropy(logits.flatten(0, 1).float(), after.flatten(), ignore_index=padding)}
        if self.weight:
            heads = ids[ids != padding]
            tails = self.counts.to(heads.device).index_select(0, heads).to_dense()
            made["transition"] = self.weight * transition_distillation(
                own.embed_items(heads), own.items, tails, self.tau
            )
        if self.l2:
            made["l2"] = self.l2 / 2 * torch.stack([weight.square().sum() for weight in own.parameters()]).sum()
        return made
