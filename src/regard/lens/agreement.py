"""How attention agrees with saliency, and with what people mark: correlations row by row, ERASER's figures for rationales.

Correlation of attention with gradients after Jain and Wallace 2019 (arXiv 1902.10186), as Attention AT (003) reports it; agreement with
rationales after DeYoung et al. 2020 (ERASER, arXiv 1911.03429), as Attention VAT (028) does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_name, require_tensor
from .head_scores import _ranks
from .saliency import saliency

__all__ = ["attention_agreement", "correlation", "rationale_agreement"]


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / (a.norm() * b.norm())  # NaN where one is constant


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    return _pearson(_ranks(a), _ranks(b))


def _kendall(a: Tensor, b: Tensor) -> Tensor:
    """Tau-b: ties in either count in neither numerator nor, in full, denominator."""
    first, second = (torch.sign(x[:, None] - x) for x in (a, b))
    return (first * second).sum() / (first.abs().sum() * second.abs().sum()).sqrt()


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pearson": _pearson, "spearman": _spearman, "kendall": _kendall}


def correlation(first: Tensor, second: Tensor, kind: str = "kendall", mask: Tensor | None = None) -> Tensor:
    """Correlation of two tables (B, T), row by row over the places where `mask` is true: (B,), float64.

    kind: "pearson", "spearman" (ties share their mean rank) or "kendall" (tau-b). NaN: fewer than two places, or no variation.
    """
    require_name("kind", kind, KINDS)
    require_tensor("first", first, dims=2)
    require(first.shape == second.shape, "second", f"shape {tuple(second.shape)}", f"{tuple(first.shape)}")
    keep = torch.ones_like(first, dtype=torch.bool) if mask is None else mask.bool()
    require(keep.shape == first.shape, "mask", f"shape {tuple(keep.shape)}", f"{tuple(first.shape)}")
    found = []
    for a, b, real in zip(first.detach().double().cpu(), second.detach().double().cpu(), keep.cpu()):
        few = int(real.sum()) < 2
        found.append(torch.tensor(float("nan"), dtype=torch.float64) if few else KINDS[kind](a[real], b[real]))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def attention_agreement(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: str = "gradient_input",
    *,
    attention: Tensor | None = None,
    magnitude: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Correlations, each (B,), of a model's attention with its saliency: {"pearson", "spearman", "kendall"}.

    Args:
        model, inputs, method, magnitude, options: as in `saliency`.
        attention: (B, T), weights to compare; None: `attention` of the model's output (`AttentionClassifier`). For a transformer, give a
            row of `attention_rollout`, or of `record.weights`, averaged as you please.
    """
    found = saliency(model, inputs, method, magnitude=magnitude, **options)
    if attention is None:
        training = model.training
        with torch.no_grad():
            output = model.eval()(**inputs)
        model.train(training)
        attention = getattr(output, "attention", None)
        if attention is None:
            raise ValueError(f"attention: got None, need weights (B, T): {type(output).__name__} has no 'attention'")
    mask = inputs.get("attention_mask")
    if mask is None and inputs.get("input_ids") is not None and getattr(model, "pad_id", None) is not None:
        mask = inputs["input_ids"] != model.pad_id
    return {kind: correlation(attention, found, kind, mask) for kind in KINDS}


def rationale_agreement(
    scores: Tensor, rationale: Tensor, mask: Tensor | None = None, *, k: int | None = None, threshold: float = 0.5
) -> dict[str, float]:
    """How well token scores find the words that decide.

    Args:
        scores: (B, T), attention or saliency. rationale: (B, T) bool. mask: real places.
        k: tokens taken from each row, the highest; None: as many as the row's rationale has. threshold: of the overlap of two spans.

    Returns:
        {"auprc": mean area under the rows' precision-recall curves (trapezoids); "token_f1": mean F1 of the tokens taken; "iou_f1":
        F1 over all spans (runs of neighbouring tokens), where one counts as found if it overlaps one of the other side by at least
        `threshold` (intersection over union)}. Rows whose rationale is empty are left out; with none left all are NaN.
    """
    require_tensor("scores", scores, dims=2)
    require(rationale.shape == scores.shape, "rationale", f"shape {tuple(rationale.shape)}", f"{tuple(scores.shape)}")
    if k is not None:
        require_int("k", k, 1)
    keep = torch.ones_like(rationale, dtype=torch.bool) if mask is None else mask.bool()
    areas, f1s, hits, made, wanted = [], [], [0, 0], 0, 0
    for row, truth, real in zip(scores.detach().double().cpu(), rationale.bool().cpu(), keep.cpu()):
        row, truth = row[real], truth[real]
        count = int(truth.sum())
        if count == 0:
            continue
        areas.append(_area(row, truth))
        taken = torch.zeros_like(truth)
        taken[row.argsort(descending=True, stable=True)[: count if k is None else k]] = True
        f1s.append(2 * int((taken & truth).sum()) / (int(taken.sum()) + count))
        ours, theirs = _spans(taken), _spans(truth)
        hits[0] += sum(any(_overlap(a, b) >= threshold for b in theirs) for a in ours)
        hits[1] += sum(any(_overlap(a, b) >= threshold for a in ours) for b in theirs)
        made, wanted = made + len(ours), wanted + len(theirs)
    if not areas:
        return dict.fromkeys(("auprc", "token_f1", "iou_f1"), float("nan"))
    precision, recall = hits[0] / made, hits[1] / wanted
    iou = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"auprc": sum(areas) / len(areas), "token_f1": sum(f1s) / len(f1s), "iou_f1": iou}


def _area(scores: Tensor, truth: Tensor) -> float:
    """Under the precision-recall curve, a point for each different score."""
    order = scores.argsort(descending=True, stable=True)
    ordered = scores[order]
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])
    found = truth[order].cumsum(0)[last].double()
    taken = torch.arange(1, len(scores) + 1)[last].double()
    precision, recall = found / taken, found / int(truth.sum())
    whole = int((recall < 1).sum()) + 1  # what lies behind full recall adds nothing
    precision = torch.cat([torch.ones(1, dtype=torch.float64), precision[:whole]])
    recall = torch.cat([torch.zeros(1, dtype=torch.float64), recall[:whole]])
    return float(torch.trapezoid(precision, recall))


def _spans(marks: Tensor) -> list[tuple[int, int]]:
    edges = torch.diff(marks.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    both = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    return both / (a[1] - a[0] + b[1] - b[0] - both)
