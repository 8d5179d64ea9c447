"""How good a ranking is (hit rate, recall, NDCG, MRR) and how well clicks are told from no clicks (AUC, AUC by group)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_name, require_tensor

__all__ = ["auc", "grouped_auc", "rank_metrics", "ranks"]


def ranks(scores: Tensor, target: Tensor, seen: Tensor | None = None) -> Tensor:
    """Place of each target among all items, from 0; items of equal score share the middle of their places.

    Args:
        scores: (B, items). target: (B,) or (B, R) int64, -1 for none. seen: (B, items) bool, items put behind all others; a target that
            was seen is put there too.

    Returns:
        float64 of target's shape, NaN for none.
    """
    require_tensor("scores", scores, dims=2, floating=True)
    require_tensor("target", target)
    wanted = target[:, None] if target.dim() == 1 else target
    need = f"({scores.shape[0]},) or ({scores.shape[0]}, R)"
    require(wanted.dim() == 2 and len(wanted) == len(scores), "target", f"shape {tuple(target.shape)}", need)
    fits = not wanted.numel() or (int(wanted.min()) >= -1 and int(wanted.max()) < scores.shape[1])
    require(fits, "target", "numbers out of range", f"numbers of items from 0 to {scores.shape[1] - 1}, or -1")
    if torch.isnan(scores).any():
        raise bad_value("scores", "NaN", "numbers")
    if seen is not None:
        require(
            seen.shape == scores.shape, "seen", f"shape {tuple(seen.shape)}", f"{tuple(scores.shape)}, that of scores"
        )
        scores = scores.masked_fill(seen.bool(), -torch.inf)
    own = scores.gather(1, wanted.clamp(min=0))
    above = torch.stack([(scores > one[:, None]).sum(1) for one in own.T], 1)
    same = torch.stack([(scores == one[:, None]).sum(1) for one in own.T], 1) - 1
    found = (above + same / 2).double().masked_fill(wanted < 0, torch.nan)
    return found[:, 0] if target.dim() == 1 else found


def rank_metrics(
    scores: Tensor, target: Tensor, seen: Tensor | None = None, k: Sequence[int] = (5, 10, 20)
) -> dict[str, float]:
    """Means over the rows that have a target: `hr@k`, `recall@k`, `ndcg@k` for each k, and `mrr`.

    Args:
        scores, target, seen: as `ranks`. k: lengths of the list that is looked at.

    With one target a row recall is the hit rate, and NDCG is 1 / log2(place + 2) within the list, place from 0. With several, a hit is any
    of them, recall their share, NDCG is over the best possible, MRR that of the first found.
    """
    for length in k:
        require_int("k", length, 1)
    found = ranks(scores, target, seen)
    found = found[:, None] if found.dim() == 1 else found
    there = ~found.isnan()
    found, there = found[there.any(1)], there[there.any(1)]
    require(len(found) > 0, "target", "none in any row", "at least one row with a target")
    place, count = found.nan_to_num(torch.inf), there.sum(1)
    made: dict[str, float] = {}
    for length in k:
        hit = place < length
        gain = ((place + 2).log2().reciprocal() * hit).sum(1)
        ideal = (torch.arange(length, device=place.device).double() + 2).log2().reciprocal().cumsum(0)
        made[f"hr@{length}"] = float(hit.any(1).double().mean())
        made[f"recall@{length}"] = float((hit.sum(1) / count).double().mean())
        made[f"ndcg@{length}"] = float((gain / ideal[count.clamp(max=length) - 1]).mean())
    made["mrr"] = float((place.min(1).values + 1).reciprocal().mean())
    return made


def auc(scores: Tensor, labels: Tensor, *, variant: str = "paper") -> float:
    """Area under the ROC curve: the chance that a click scores above a non-click.

    Args:
        scores: (N,). labels: (N,), 1 for clicks and 0.
        variant: "paper", the definition, ties counting half. "released", as DARE's code computes it: ties in the order given, and between
            two non-clicks the curve is a straight line from 0 on, which takes 1 / (2 * non-clicks) from a perfect ranking (it gives 0.5 for
            one click above one non-click). Not the default because small groups suffer from it.

    Raises a `ValueError` where one of the classes is missing.
    """
    require_tensor("scores", scores, dims=1, floating=True)
    require(
        labels.shape == scores.shape, "labels", f"shape {tuple(labels.shape)}", f"{tuple(scores.shape)}, that of scores"
    )
    require_name("variant", variant, ("paper", "released"))
    hit = labels.to(scores.device) > 0.5
    clicks, others = int(hit.sum()), int((~hit).sum())
    require(clicks > 0 and others > 0, "labels", f"{clicks} clicks and {others} others", "both")
    if torch.isnan(scores).any():
        raise bad_value("scores", "NaN", "numbers")
    if variant == "released":
        order = scores.argsort(descending=True, stable=True)
        height = hit[order].cumsum(0)[~hit[order]].double() / clicks
        before = torch.cat((height.new_zeros(1), height[:-1]))
        return float((height + before).sum() / 2 / others)
    _, level, size = scores.unique(return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - (size - 1) / 2).double()[level]  # from 1, ties at the middle
    return float((rank[hit].sum() - clicks * (clicks + 1) / 2) / (clicks * others))


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor, *, variant: str = "paper") -> float:
    """Mean of the AUC of each group, weighted by its size; groups of one class are left out (GAUC).

    Args:
        scores, labels, variant: as `auc`. groups: (N,) int64: of users, or of target categories as in DARE.
    """
    require(
        groups.shape == scores.shape, "groups", f"shape {tuple(groups.shape)}", f"{tuple(scores.shape)}, that of scores"
    )
    order = groups.argsort(stable=True)
    total, size = 0.0, 0
    for one in order.split(groups[order].unique_consecutive(return_counts=True)[1].tolist()):
        hit = labels[one] > 0.5
        if hit.all() or not hit.any():
            continue
        total += len(one) * auc(scores[one], labels[one], variant=variant)
        size += len(one)
    require(size > 0, "groups", "none with both classes", "at least one")
    return total / size
