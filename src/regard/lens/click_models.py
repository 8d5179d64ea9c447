"""What a click model has learned: does its search find what matters, do its gradients fight, do its features tell clicks apart.

The analyses of Long-Sequence Recommendation Models Need Decoupled Embeddings (Feng et al., ICLR 2025, arXiv 2410.02604); code read:
thuml/DARE @ c72e087 (no licence), `analysis/`. What differs: an event that never happened with one of the classes counts 0 times there, in
the code 1e-5 times; features are clustered by k-means on all rows, in the code by scikit-learn's mini-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor

__all__ = [
    "GradientConflict",
    "cluster_information",
    "gradient_conflict",
    "learned_correlation",
    "search_quality",
    "target_information",
]


def target_information(
    category: Tensor, history: Tensor, label: Tensor, num_categories: int, places: int | None = None
) -> Tensor:
    """How much "category b stands p places from the end" tells about a click on category a: (a, b, p) mutual information in bits.

    Args:
        category: (N,) of targets. history: (N, T) categories, the latest last, 0 for padding. label: (N,), 1 for a click and 0.
        num_categories: numbers run below it. places: how many of the latest; default all.

    [a, b, p] is of the rows with target a, place p from 0 (the latest). Zeros for categories that are no target.
    """
    require_tensor("history", history, dims=2)
    fits = category.shape == label.shape == history.shape[:1]
    require(
        fits,
        "history",
        f"shape {tuple(history.shape)}",
        f"({len(category)}, T), and category and label of equal length",
    )
    count = history.shape[1] if places is None else min(require_int("places", places, 1), history.shape[1])
    late = history.flip(1)[:, :count]
    both = torch.zeros(2, num_categories, num_categories, count, dtype=torch.float64)
    total = torch.zeros(2, num_categories, dtype=torch.float64)
    clicked = (label > 0.5).long()
    there = late > 0
    row, place = there.nonzero(as_tuple=True)
    both.index_put_(
        (clicked[row], category[row], late[row, place], place), torch.ones(len(row)).double(), accumulate=True
    )
    total.index_put_((clicked, category), torch.ones(len(label)).double(), accumulate=True)
    whole = total.sum(0)[:, None, None].clamp(min=1)
    made = torch.zeros_like(both[0])
    with_event, without = both.sum(0), whole - both.sum(0)
    for side in (0, 1):
        own = total[side][:, None, None]
        for joint, event in ((both[side], with_event), (own - both[side], without)):
            made += joint / whole * (joint * whole / (event * own).clamp(min=1e-300)).clamp(min=1e-300).log2()
    return made.clamp(min=0) * (total.sum(0) > 0)[:, None, None]


@torch.no_grad()
def learned_correlation(model: Any, places: int) -> Tensor:
    """What the model's attention says of the same: scores of category and position, softmax over (b, p) for each a, stretched to 0..1.

    (a, b, p), to be laid beside `target_information`. model: `regard.models.DARE` with dot products and positions one after another.
    """
    kind = getattr(model, "kind", type(model).__name__)
    require(
        getattr(model, "positions", None) == "concat" and kind != "din",
        "model",
        kind,
        "a DARE with dot scores and positions='concat'",
    )
    require(kind not in ("projection", "projection_by_field"), "model", kind, "tables without projections")
    tables: Any = model.tables
    one, other = tables["attention_target"], tables["attention_history"]
    kinds = one.category.weight @ other.category.weight.T * one.category.weight.shape[1] ** -0.5
    near, places_of = one.position.weight, other.position.weight
    far = places_of[1 : places + 1] @ near[0] * near.shape[1] ** -0.5
    weights = (kinds[:, :, None] + far).flatten(1).softmax(1)
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    return ((weights - low) / (high - low).clamp(min=1e-30)).unflatten(1, (len(kinds), places))


def search_quality(scores: Tensor, worth: Tensor, k: int = 20) -> Tensor:
    """How good a search is: worth of the k places of highest score, each divided by log2(rank + 2), over the best possible. (N,).

    Args:
        scores: (N, T) of the search. worth: (N, T), at least 0: `target_information` at the rows' places, or a known truth. k: places kept.

    NaN for rows in which nothing is worth anything.
    """
    require(
        scores.shape == worth.shape and scores.dim() == 2,
        "worth",
        f"shape {tuple(worth.shape)}",
        f"{tuple(scores.shape)}, that of scores",
    )
    kept = min(require_int("k", k, 1), scores.shape[1])
    falling = (torch.arange(kept) + 2.0).log2().reciprocal().to(worth)
    found = worth.gather(1, scores.topk(kept, dim=1).indices) @ falling
    return found / (worth.topk(kept, dim=1).values @ falling).masked_fill_(worth.amax(1) <= 0, torch.nan)


@dataclass(frozen=True)
class GradientConflict:
    """Gradients that attention and representation send to vectors they share.

    Attributes:
        cosine: (rows,), NaN for vectors that either sends nothing to. attention, representation: (rows,) norms.
    """

    cosine: Tensor
    attention: Tensor
    representation: Tensor

    @property
    def mean(self) -> float:
        """Of the cosines that there are."""
        return float(self.cosine.nanmean())

    @property
    def share(self) -> float:
        """Of the vectors that get both, those for which the two point against each other."""
        there = self.cosine[~self.cosine.isnan()]
        return float((there < 0).double().mean())


def gradient_conflict(model: nn.Module, batch: Mapping[str, Tensor], field: str = "category") -> GradientConflict:
    """Take apart what attention and what representation would do to the vectors of a model that shares them (`tables="twin"`).

    A copy of the model with two sets of equal vectors is differentiated; the model itself is left as it is.

    Args:
        model: DARE with tables "twin". batch: with labels. field: "category", "item" or "position".
    """
    require(
        getattr(model, "kind", None) == "twin",
        "model",
        getattr(model, "kind", type(model).__name__),
        "a DARE of tables 'twin'",
    )
    apart: Any = copy.deepcopy(model)
    for role in ("representation_target", "representation_history"):
        apart.tables[role] = copy.deepcopy(apart.tables[role])
    apart.tables["representation_history"] = apart.tables["representation_target"]
    apart.zero_grad()
    with torch.enable_grad():
        loss = apart(batch).loss
        require(loss is not None, "batch", sorted(batch), "'label' in it")
        loss.backward()
    tables: list[nn.Embedding] = [
        getattr(apart.tables[f"{kind}_target"], field) for kind in ("attention", "representation")
    ]
    one, other = (
        torch.zeros_like(table.weight) if table.weight.grad is None else table.weight.grad for table in tables
    )
    norms = one.norm(dim=1), other.norm(dim=1)
    cosine = (one * other).sum(1) / (norms[0] * norms[1])
    return GradientConflict(cosine.masked_fill((norms[0] == 0) | (norms[1] == 0), torch.nan), *norms)


def cluster_information(
    features: Tensor, label: Tensor, clusters: int, *, rounds: int = 30, seed: int = 0
) -> tuple[float, float]:
    """Mutual information (nats) of labels and k-means clusters of features, and the same normalised by the mean of the two entropies.

    Args:
        features: (N, F). label: (N,), whole numbers from 0. clusters: at most N. rounds: of k-means. seed: of its first means.
    """
    require_tensor("features", features, dims=2, floating=True)
    require(
        require_int("clusters", clusters, 1) <= len(features),
        "clusters",
        clusters,
        f"at most {len(features)}, the rows",
    )
    made = torch.Generator().manual_seed(seed)
    means = features[torch.randperm(len(features), generator=made)[:clusters]].clone()
    for _ in range(rounds):
        near = torch.cdist(features, means).argmin(1)
        size = torch.bincount(near, minlength=clusters)
        sums = torch.zeros_like(means).index_add_(0, near, features)
        means = torch.where(size[:, None] > 0, sums / size[:, None].clamp(min=1), means)
    near = torch.cdist(features, means).argmin(1)
    kinds = int(label.max()) + 1
    joint = torch.bincount(near * kinds + label.long(), minlength=clusters * kinds).double().reshape(
        clusters, kinds
    ) / len(label)
    one, other = joint.sum(1), joint.sum(0)
    entropies = torch.special.entr(one).sum(), torch.special.entr(other).sum()
    shared = float((entropies[0] + entropies[1] - torch.special.entr(joint).sum()).clamp(min=0))
    half = float(entropies[0] + entropies[1]) / 2
    return shared, shared / half if half > 0 else 0.0
