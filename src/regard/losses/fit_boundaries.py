"""Training DHSA's boundary predictor beside a frozen model: labels from the model's own attention, layer by layer, over any text.

Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (2025, arXiv 2510.24606). Code read for
numbers (no licence): xiongsiheng/DHSA @ cc8e9c7, `legacy/boundary_predictor/train.py`, `metrics.py`. The authors store the labels first and
read them in training; here both happen in one pass, and only one layer's attention matrix (the mean of its heads) exists at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..ops.select.boundaries import attention_mass_ratio
from .focal_bce import focal_bce, soft_label_transform
from .runner import Fitted, fit, layer_loss


def boundary_loss(
    logits: Tensor,
    ratio: Tensor,
    *,
    window: int = 4,
    alpha: float = 2.0,
    beta: float = math.log(2.0 + 1e-6),
    gamma: float = 2.0,
    pos_weight: float | None = 1.3,
    start: Tensor | None = None,
) -> Tensor:
    """Focal loss of gap scores against the gaps where attention changes: those of a ratio above e^beta (2 as released).

    Args:
        logits: (B, N). ratio: (B, N), from `regard.ops.select.attention_mass_ratio`. window: of the ratio; the first 2 window - 1 and
            the last 2 window gaps do not count. alpha, beta: of `soft_label_transform`; labels are hard at 1/2.
        start: int64 (B,), left padding of each row: gaps there do not count either.
    """
    inner, targets = boundary_labels(ratio, window=window, alpha=alpha, beta=beta, start=start)
    require(logits.shape == ratio.shape, "logits", f"shape {tuple(logits.shape)}", f"ratio's {tuple(ratio.shape)}")
    return focal_bce(logits, targets, inner, pos_weight=pos_weight, gamma=gamma)


def boundary_labels(
    ratio: Tensor,
    *,
    window: int = 4,
    alpha: float = 2.0,
    beta: float = math.log(2.0 + 1e-6),
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which gaps count, and which of them are boundaries, both bool (B, N)."""
    require_tensor("ratio", ratio, dims=2, floating=True)
    require_int("window", window, 1)
    gap = torch.arange(ratio.shape[1], device=ratio.device)
    first = 2 * window - 1 + (0 if start is None else start.to(ratio.device)[:, None])
    inner = ((gap >= first) & (gap < ratio.shape[1] - 2 * window)).expand(ratio.shape)
    return inner, soft_label_transform(ratio.clamp(min=1.0), alpha=alpha, beta=beta) >= 0.5


def boundary_metrics(logits: Tensor, ratio: Tensor, k: int = 500, **labels: Any) -> dict[str, float]:
    """How well gap scores find the boundaries: precision, recall and F1 of scores above 0, and the overlap of the `k` best gaps by score
    with the `k` best by ratio (a share; k is at most the gaps that count). `labels` as in `boundary_labels`."""
    require_int("k", k, 1)
    inner, targets = boundary_labels(ratio, **labels)
    found, true = (torch.sigmoid(logits) >= 0.5) & inner, targets & inner
    hits = float((found & true).sum())
    precision, recall = hits / max(1.0, float(found.sum())), hits / max(1.0, float(true.sum()))
    count = min(k, int(inner.sum()))
    overlap = 0.0
    if count:
        best, wanted = (x[inner].topk(count).indices for x in (logits, ratio))
        overlap = float(torch.isin(best, wanted).sum()) / count
    f1 = 2 * precision * recall / (precision + recall + 1e-8)
    return {"precision": precision, "recall": recall, "f1": f1, "overlap": overlap}


def fit_boundaries(
    model: nn.Module,
    predictor: nn.Module,
    batches: Any,
    *,
    layers: Iterable[int] | None = None,
    steps: int | None = None,
    lr: float = 1e-4,
    alpha: float = 2.0,
    beta: float = math.log(2.0 + 1e-6),
    gamma: float = 2.0,
    pos_weight: float | None = 1.3,
    **options: Any,
) -> Fitted:
    """Train one boundary predictor for all layers of a frozen model, by Adam, each layer of each batch a loss of its own.

    Args:
        model: a causal language model of transformers. predictor: a `regard.nn.BoundaryPredictor` for its keys.
        batches: see `regard.losses.fit`: token ids (B, N), or mappings for the model (a
            mask of left padding is honoured). Rows of a few hundred to a few thousand tokens.
        layers: numbers of the layers to learn from (negative from the end); None: all with causal self-attention.
        lr, alpha, beta, gamma, pos_weight: as the authors have them; `boundary_loss`.
        options: of `fit` (out, save_every, resume, seed, progress, …).
    Returns:
        `Fitted`; `.modules` is the predictor, for `regard.DHSA(predictor=...)`. Keep it with its `save`.
    """
    window = getattr(predictor, "window", 4)
    wanted = None if layers is None else set(layers)

    def loss_of_call(call: Any) -> Tensor | None:
        ratio = _ratio(call, wanted, window)
        if ratio is None:
            return None
        shape: dict[str, Any] = {
            "window": window,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "pos_weight": pos_weight,
        }
        logits = predictor(call.k.detach())
        return boundary_loss(logits, ratio.to(logits.dtype), **shape, start=call.start)

    options.setdefault("optimizer", lambda parameters: torch.optim.Adam(parameters, lr=lr))
    options.setdefault("label", "boundary predictor")
    return fit(predictor, layer_loss(model, loss_of_call), batches, steps=steps, lr=lr, frozen=model, **options)


@torch.no_grad()
def score_boundaries(
    model: nn.Module, predictor: nn.Module, batches: Iterable[Any], *, layers: Iterable[int] | None = None, k: int = 500
) -> dict[int, dict[str, float]]:
    """`boundary_metrics` on held-out batches: layer -> mean over the batches."""
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    window = getattr(predictor, "window", 4)
    wanted = None if layers is None else set(layers)

    def loss_of_call(call: Any) -> None:
        ratio = _ratio(call, wanted, window)
        if ratio is not None:
            found[call.layer].append(boundary_metrics(predictor(call.k), ratio, k, window=window, start=call.start))

    run = layer_loss(model, loss_of_call)
    training = predictor.training
    predictor.eval()
    for batch in batches:
        run(batch)
    predictor.train(training)
    return {
        layer: {name: sum(one[name] for one in many) / len(many) for name in many[0]}
        for layer, many in sorted(found.items())
    }


@torch.no_grad()
def _ratio(call: Any, wanted: set[int] | None, window: int) -> Tensor | None:
    """The mass ratio of a call's own attention, (B, N) float64; None for a call that has no part in this."""
    if call.kind != "self" or call.q_len != call.kv_len or (call.mask is None and not call.causal and call.q_len > 1):
        return None
    if wanted is not None and call.layer not in wanted and call.layer - call.num_layers not in wanted:
        return None
    mean = call.q.new_zeros(call.batch, call.q_len, call.kv_len, dtype=torch.float32)
    for head in range(call.num_heads):  # head by head: one N x N matrix at a time
        mean += call.weights([head])[:, 0]
    return attention_mass_ratio(mean / call.num_heads, window, sliding=call.window)
