"""Rows to learn clicks from: a target, what its user did before, and whether it was clicked; made, batched and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_tensor
from .interactions import Interactions
from .metrics import auc, grouped_auc

__all__ = ["ClickRows", "click_rows", "evaluate_clicks"]


@dataclass(frozen=True)
class ClickRows:
    """Rows of a click model. Numbers of items and categories are from 1; 0 is padding, before the first of a history.

    Attributes:
        item, category: (N,) int64 of the target. history_items, history_categories: (N, T) int64, the latest last. label: (N,) float32, 1
            for a click.
    """

    item: Tensor
    category: Tensor
    history_items: Tensor
    history_categories: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, rows: Tensor | slice) -> ClickRows:
        return ClickRows(*(getattr(self, one.name)[rows] for one in fields(self)))

    def batch(self) -> dict[str, Tensor]:
        """As the dict that click models take."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def batches(self, batch: int, seed: int = 0) -> Callable[[int], dict[str, Tensor]]:
        """number -> dict of `batch` rows: what `train` takes. Every epoch has an order of its own; a last part of a batch is left out."""
        require_int("batch", batch, 1)
        require(batch <= len(self), "batch", batch, f"at most {len(self)}, the rows")
        each = len(self) // batch

        def make(number: int) -> dict[str, Tensor]:
            epoch, part = divmod(number, each)
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            return self[order[part * batch : (part + 1) * batch]].batch()

        return make


def click_rows(
    met: Interactions,
    categories: Tensor,
    *,
    length: int = 200,
    places: range = range(3, 94, 5),
    least: int = 210,
    negatives: int = 2,
    seed: int = 0,
) -> ClickRows:
    """Rows from interactions without labels, as DARE's data are made: what came next is a click, items drawn at random are not.

    Args:
        met: interactions. categories: (num_items,) int64 from 0, -1 for none (`Interactions.item_codes`).
        length: of the history. places: which interactions of a user become targets, counted from the end (1: the last).
        least: interactions a user needs; others are left out. negatives: drawn items for each target, none of them ever met by the user.

    The defaults are those of the authors' training rows; `range(2, 3)` and `range(1, 2)` make their validation and test rows.
    """
    require_tensor("categories", categories, dims=1)
    fits = len(categories) == met.num_items
    require(fits, "categories", f"{len(categories)} numbers", f"one for each of {met.num_items} items")
    require(len(places) > 0 and min(places) >= 1, "places", places, "numbers from 1 on")
    generator = torch.Generator().manual_seed(seed)
    common = torch.bincount(met.items, minlength=met.num_items).double()
    targets, histories, labels = [], [], []
    for row in met.sequences():
        if len(row) < least:
            continue
        free = common.clone()
        free[row] = 0
        for place in places:
            if place >= len(row):
                break
            drawn = row[:0]
            if negatives:
                require(bool(free.sum() > 0), "negatives", negatives, "items that a user has not met")
                drawn = torch.multinomial(free, negatives, replacement=True, generator=generator)
            past = torch.zeros(length, dtype=torch.int64)
            before = row[:-place][-length:] + 1
            past[length - len(before) :] = before
            targets += [row[-place : len(row) - place + 1], drawn]
            histories += [past] * (1 + negatives)
            labels += [1.0] + [0.0] * negatives
    require(bool(labels), "least", least, "few enough that a user is left")
    item, history = torch.cat(targets) + 1, torch.stack(histories)
    code = torch.cat((torch.zeros(1, dtype=torch.int64), categories + 1))
    return ClickRows(item, code[item], history, code[history], torch.tensor(labels))


@torch.no_grad()
def evaluate_clicks(
    model: nn.Module, rows: ClickRows, batch: int = 1024, *, variant: str = "paper"
) -> dict[str, float]:
    """`auc`, `gauc` (by target category) and `loss` of the click probability `model(batch).p[:, 0]`; variant: as `auc`."""
    device, was = next(model.parameters()).device, model.training
    model.eval()
    try:
        found = [
            model({name: value.to(device) for name, value in rows[some].batch().items()}).p[:, 0].float().cpu()
            for some in torch.arange(len(rows)).split(batch)
        ]
    finally:
        model.train(was)
    p = torch.cat(found)
    likely = torch.where(rows.label > 0.5, p, 1 - p).clamp(min=1e-8)
    return {
        "auc": auc(p, rows.label, variant=variant),
        "gauc": grouped_auc(p, rows.label, rows.category, variant=variant),
        "loss": float(-likely.log().mean()),
    }
