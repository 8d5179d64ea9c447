"""DARE: click models over long histories with one set of vectors for attention and another for representation; TWIN and DIN beside it.

Long-Sequence Recommendation Models Need Decoupled Embeddings (Feng et al., ICLR 2025, arXiv 2410.02604). Code read for numbers: thuml/DARE
@ c72e087 (no licence), `model/base_model_pytorch.py`, `model/din_pytorch.py`. What differs: the code's
further projections, which the authors call failures, are not here, nor is its `short_seq_split`, which does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_name
from ..nn.layers import rename_keys
from ..nn.sequence.target_attention import TargetAttended, TargetAttention

__all__ = ["DARE", "DAREOutput", "click_loss"]

TABLES = {
    "dare": (0, 0, 1, 1),
    "twin": (0, 0, 0, 0),
    "projection": (0, 0, 0, 0),
    "projection_by_field": (0, 0, 0, 0),
    "four": (0, 1, 2, 3),
    "three": (0, 1, 2, 2),
    "din": (0, 0, 0, 0),
}
"""Which of the roles share tables; roles in the order of ROLES."""
ROLES = ("attention_target", "attention_history", "representation_target", "representation_history")
FIELDS = ("item", "category", "position")


@dataclass
class DAREOutput:
    """p: (B, 2), chances of a click and of none. loss: scalar, or None without labels; aux_loss is part of it. features: (B, F) of the last
    MLP. attended: what was searched and found."""

    p: Tensor
    loss: Tensor | None
    aux_loss: Tensor | None
    features: Tensor
    attended: TargetAttended

    @property
    def probability(self) -> Tensor:
        """(B,), of a click."""
        return self.p[:, 0]


class FieldTables(nn.Module):
    """Vectors of items, categories and positions, one after another or with positions added: numbers (...) each -> (..., width)."""

    def __init__(self, sizes: tuple[int, int, int], dims: tuple[int, int, int], positions: str | None) -> None:
        super().__init__()
        self.item, self.category = nn.Embedding(sizes[0], dims[0]), nn.Embedding(sizes[1], dims[1])
        self.position = None if positions is None else nn.Embedding(sizes[2], dims[2])

    def forward(self, item: Tensor, category: Tensor, position: Tensor) -> list[Tensor]:
        found = [self.item(item), self.category(category)]
        return found if self.position is None else [*found, self.position(position)]


class DARE(nn.Module):
    """A batch of targets with histories -> `DAREOutput`.

    Args:
        num_items, num_categories: rows of the tables; number 0 is padding.
        dims: widths of item, category and position vectors. attention_dims: those of the attention tables, default the same ("dare",
            "four", "three" alone): narrow ones make the search cheap.
        tables: who shares vectors. "dare": attention and representation apart, target and history together. "twin": one set for all.
            "projection": one set, a linear map for each of the four roles ("projection_by_field": for each field of each, without bias).
            "four": a set each; "three": representation shared; "din": one set and a learned score.
        positions: "concat", "add" (their width is that of item and category together) or None. num_positions: rows of their table.
        search: "soft", or "hard": the latest of the target's category; "recent", "None": as `TargetAttention`. top_k; variant.
        product: features target, history, target * history; without it the first two. only_product: the third alone.
        average: also the mean of the history (divided by its count + 1). aux: an MLP on the whole history, its loss added.
        hidden: widths of the last MLP. aux_hidden.

    The batch is a mapping: `item`, `category` (B,), `history_items`, `history_categories` (B, T), the latest last; if wanted `label` (B,),
    1 for a click, `mask` (B, T) (default: items that are not 0), `position` (B,), `history_positions` (B, T) (default: 0, and T to 1).
    """

    def __init__(
        self,
        num_items: int,
        num_categories: int,
        dims: tuple[int, int, int] = (16, 16, 16),
        attention_dims: tuple[int, int, int] | None = None,
        *,
        tables: str = "dare",
        positions: str | None = "concat",
        num_positions: int = 2000,
        search: str | None = "soft",
        top_k: int = 20,
        product: bool = True,
        only_product: bool = False,
        average: bool = False,
        aux: bool = True,
        hidden: tuple[int, int] = (200, 80),
        aux_hidden: int = 200,
        variant: str = "released",
    ) -> None:
        super().__init__()
        self.num_items, self.num_categories = (
            require_int("num_items", num_items, 1),
            require_int("num_categories", num_categories, 1),
        )
        self.kind = require_name("tables", tables, TABLES)
        require(positions in ("concat", "add", None), "positions", positions, "'concat', 'add' or None")
        require(search in ("soft", "hard", "recent", None), "search", search, "'soft', 'hard', 'recent' or None")
        narrow = dims if attention_dims is None else attention_dims
        apart = attention_dims is None or tables in ("dare", "four", "three")
        require(apart, "attention_dims", attention_dims, "None where attention and representation share tables")
        require(product or not only_product, "only_product", only_product, "product=True beside it")
        for given in (dims, narrow):
            need = f"item + category = position for positions='add', got {given}"
            require(positions != "add" or given[0] + given[1] == given[2], "dims", given, need)
        self.positions, self.num_positions, self.search = positions, num_positions, search
        self.product, self.only_product, self.average = product, only_product, average
        sizes = (num_items, num_categories, num_positions)
        made: dict[int, FieldTables] = {}
        for role, number in zip(ROLES, TABLES[tables]):
            made.setdefault(number, FieldTables(sizes, narrow if role.startswith("attention") else dims, positions))
        self.tables = nn.ModuleDict({role: made[number] for role, number in zip(ROLES, TABLES[tables])})
        self.project = nn.ModuleDict(
            {role: self._projection(narrow if role.startswith("attention") else dims) for role in ROLES}
        )
        parts = (narrow[0] + narrow[1], narrow[2]) if positions == "concat" else (narrow[0] + narrow[1],)
        score = "learned" if tables == "din" else "dot"
        looked = "recent" if search == "hard" else search
        self.attention = TargetAttention(parts, score=score, search=looked, top_k=top_k, variant=variant)
        width = sum(dims) if positions == "concat" else dims[0] + dims[1]
        count = (not only_product) * (2 + average) + product * (1 + average)
        self.head = _mlp([width * count, *hidden, 2])
        self.aux_head = _mlp([width * ((not only_product) * 2 + product), aux_hidden, 2]) if aux else None

    def _projection(self, dims: tuple[int, int, int]) -> nn.Module:
        kept = dims if self.positions is not None else dims[:2]
        if self.kind == "projection":
            width = sum(kept) if self.positions == "concat" else dims[0] + dims[1]
            return nn.Linear(width, width)
        if self.kind == "projection_by_field":
            return nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name, dim in zip(FIELDS, kept)})
        return nn.Identity()

    def embed(self, role: str, item: Tensor, category: Tensor, position: Tensor) -> Tensor:
        """Vectors of one of the four roles: numbers (...) -> (..., width)."""
        found = self.tables[require_name("role", role, ROLES)](item, category, position)
        maps = self.project[role]
        if isinstance(maps, nn.ModuleDict):
            found = [to(one) for to, one in zip(maps.values(), found)]
        made = torch.cat(found[:2], -1) + found[2] if self.positions == "add" else torch.cat(found, -1)
        return maps(made) if isinstance(maps, nn.Linear) else made

    def forward(self, batch: Mapping[str, Tensor]) -> DAREOutput:
        target, history, mask = self._read(batch)
        look = [self.embed(role, *who) for role, who in zip(ROLES, (target, history, target, history))]
        attended = self.attention(look[0], look[1], look[3], mask)
        found = [attended.out]
        if self.average:
            found.append(torch.einsum("bt,btd->bd", mask, look[3]) / (mask.sum(1, keepdim=True) + 1.0))
        features = self._features(look[2], found)
        p = self.head(features).softmax(1) + 1e-8
        label, loss, aux_loss = batch.get("label"), None, None
        if label is not None:
            loss = click_loss(p, label)
            if self.aux_head is not None:
                whole = self.aux_head(self._features(look[2], [attended.whole]))
                aux_loss = click_loss(whole.softmax(1) + 1e-8, label)
                loss = loss + aux_loss
        return DAREOutput(p, loss, aux_loss, features, attended)

    def _features(self, target: Tensor, found: list[Tensor]) -> Tensor:
        plain = [] if self.only_product else [target, *found]
        return torch.cat([*plain, *([target * one for one in found] if self.product else [])], dim=1)

    def _read(self, batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        if not isinstance(batch, Mapping):
            raise bad_type("batch", batch, "a mapping of names to tensors")
        for name in ("item", "category", "history_items", "history_categories"):
            require(name in batch, "batch", sorted(batch), f"{name!r} in it")
        item, past = batch["item"], batch["history_items"]
        fits = past.dim() == 2 and tuple(item.shape) == tuple(past.shape[:1])
        require(fits, "history_items", f"shape {tuple(past.shape)} for item of {tuple(item.shape)}", "(B, T) and (B,)")
        for name, limit in (("item", self.num_items), ("category", self.num_categories)):
            for one in (name, {"item": "history_items", "category": "history_categories"}[name]):
                numbers = batch[one]
                good = not numbers.numel() or (int(numbers.min()) >= 0 and int(numbers.max()) < limit)
                require(good, one, "numbers out of range", f"0 to {limit - 1}")
        places = past.shape[1]
        require(
            self.positions is None or places < self.num_positions,
            "history_items",
            f"{places} places",
            f"< {self.num_positions}",
        )
        position = batch.get("position", torch.zeros_like(item))
        positions = batch.get("history_positions", torch.arange(places, 0, -1, device=past.device).expand_as(past))
        mask = (batch.get("mask", past > 0) > 0).to(next(self.parameters()).dtype)
        if self.search == "hard":
            mask = mask * (batch["history_categories"] == batch["category"][:, None])
        return (item, batch["category"], position), (past, batch["history_categories"], positions), mask

    @torch.no_grad()
    def official_init_(self, std: float = 0.01) -> DARE:
        """Draw all that is no bias from N(0, std), slopes and scales of norms too, as the authors' training does. Returns the model."""
        for name, parameter in self.named_parameters():
            if "bias" not in name:
                nn.init.normal_(parameter, std=std)
        return self

    def penalty(self) -> Tensor:
        """Sum of squares of the weights outside the tables and without biases: what the authors add 1e-6 of to the loss."""
        return torch.stack(
            [p.square().sum() for n, p in self.named_parameters() if "bias" not in n and not n.startswith("tables")]
        ).sum()

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `DIN` (any `model_name`) in our names; ours pass unchanged. Tables that a model without positions never reads go."""
        role = {"target": "target", "behavior": "history"}
        field = {"item": "item", "category": "category", "time": "position"}
        renamed = rename_keys(
            state,
            (
                r"^(item|category|time)_id_embedding_layer_for_(attention|representation)_of_(target|behavior)",
                lambda m: f"tables.{m[2]}_{role[m[3]]}.{field[m[1]]}",
            ),
            (
                r"^mlp_for_(item|category|time)_(attention|representation)_of_(target|behavior)",
                lambda m: f"project.{m[2]}_{role[m[3]]}.{field[m[1]]}",
            ),
            (r"^mlp_for_(attention|representation)_of_(target|behavior)", lambda m: f"project.{m[1]}_{role[m[2]]}"),
            (r"^attention_model\.main_model\.", "attention.mlp."),
            (r"^main_mlp\.", "head."),
            (r"^auxiliary_mlp\.", "aux_head."),
        )
        gone = () if self.positions is not None else (".position.weight",)
        gone = (*gone, *(() if self.aux_head is not None else ("aux_head.",)))
        return {name: value for name, value in renamed.items() if not any(part in name for part in gone)}

    def extra_repr(self) -> str:
        return f"tables={self.kind}, positions={self.positions}, search={self.search}"


def click_loss(p: Tensor, label: Tensor) -> Tensor:
    """-log p of what happened, mean over rows. p: (B, 2), click and none; label: (B,), 1 for a click and 0."""
    require(tuple(label.shape) == tuple(p.shape[:1]), "label", f"shape {tuple(label.shape)}", f"({p.shape[0]},)")
    likely = torch.where(label > 0.5, p[:, 0], p[:, 1])
    return -likely.log().mean()


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[Any] = [nn.BatchNorm1d(widths[0])]
    for i, (one, other) in enumerate(pairwise(widths)):
        layers += [nn.Linear(one, other)] + ([nn.PReLU(init=0.1)] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers)
