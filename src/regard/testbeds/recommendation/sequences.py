"""Sequences of items for models that say which comes next: batches to learn from, and the full ranking they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_name
from .interactions import LeaveOneOut
from .metrics import rank_metrics

__all__ = ["evaluate_ranking", "next_item_batches", "pad_left"]


def pad_left(sequences: Sequence[Tensor], length: int, pad: int) -> Tensor:
    """(rows, length) int64: the last `length` of each sequence at the right, `pad` before them."""
    require_int("length", length, 1)
    made = torch.full((len(sequences), length), pad, dtype=torch.int64)
    for row, items in zip(made, sequences):
        if len(items):
            row[-min(length, len(items)) :] = items[-length:]
    return made


def next_item_batches(
    sequences: Sequence[Tensor], num_items: int, length: int, batch: int, seed: int = 0
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """number -> (items (B, length), the items after them), left-padded with `num_items`: what `train` takes.

    Every epoch goes through all sequences of two items or more once, in an order of its own; its last batch may be smaller.
    """
    require_int("batch", batch, 1)
    rows = [row[-(length + 1) :] for row in sequences if len(row) > 1]
    require(bool(rows), "sequences", "none of two items", "at least one")
    inputs, targets = (
        pad_left([r[:-1] for r in rows], length, num_items),
        pad_left([r[1:] for r in rows], length, num_items),
    )
    each = -(-len(rows) // batch)

    def make(number: int) -> tuple[Tensor, Tensor]:
        epoch, part = divmod(number, each)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen = order[part * batch : (part + 1) * batch]
        return inputs[chosen], targets[chosen]

    return make


@torch.no_grad()
def evaluate_ranking(
    model: nn.Module,
    split: LeaveOneOut,
    part: str = "test",
    *,
    length: int,
    k: Sequence[int] = (5, 10, 20),
    batch: int = 256,
) -> dict[str, float]:
    """`rank_metrics` of the item left out, among all items that a user has not met.

    Args:
        model: has `scores(ids (B, length)) -> (B, num_items)` for what comes after the last place.
        split: who met what. part: "valid", or "test" (the validation item is then the last one met). length: of the input.
        k, batch: lengths of the list; users at a time.
    """
    require_name("part", part, ("valid", "test"))
    target = split.valid if part == "valid" else split.test
    users = (target >= 0).nonzero()[:, 0]
    require(len(users) > 0, "split", "no user with three items", "at least one")
    device = next(model.parameters()).device
    was, sums = model.training, dict[str, float]()
    model.eval()
    try:
        for some in users.split(batch):
            past = [
                split.train[u] if part == "valid" else torch.cat((split.train[u], split.valid[u : u + 1])) for u in some
            ]
            seen = torch.zeros(len(some), split.num_items, dtype=torch.bool)
            for row, items in zip(seen, past):
                row[items[-length:] if part == "valid" else items[-length - 1 :]] = True
            scores = model.scores(pad_left(past, length, split.num_items).to(device)).float().cpu()  # type: ignore[operator]
            for name, value in rank_metrics(scores, target[some], seen, k).items():
                sums[name] = sums.get(name, 0.0) + value * len(some)
    finally:
        model.train(was)
    return {name: value / len(users) for name, value in sums.items()}
