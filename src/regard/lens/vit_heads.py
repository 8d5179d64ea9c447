"""How much each head of a vision transformer matters: what happens to the prediction when it is pruned.

Paper: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (IEEE TVCG, arXiv 2303.13731). No code
was published. Pruning a head sets its output to zero before the output projection: at all tokens, at the class token alone, or at the
patches alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_name
from ..integrations.transformers import attach
from ..methods.call import AttentionCall, Method
from .head_scores import HeadScores
from .head_search import chosen_numbers

__all__ = ["PruneHeads", "head_importance"]

METRICS = ("probability", "cross-entropy", "js", "rank")
PARTS = ("all", "prefix", "patches")


@dataclass
class PruneHeads(Method):
    """Set heads' outputs to zero, at all tokens, at the prefix (class token and the like) or at the patches.

    Args:
        heads: (layer, head) pairs. part: "all", "prefix", "patches". prefix: tokens before the patches.
    """

    heads: Any
    part: str = "all"
    prefix: int = 1

    def __post_init__(self) -> None:
        require_name("part", self.part, PARTS)
        require_int("prefix", self.prefix)
        self._pairs = {(int(layer), int(head)) for layer, head in self.heads}

    def edit(self, call: AttentionCall) -> None:
        heads = sorted(head for layer, head in self._pairs if layer == call.layer)
        if not heads:
            return
        require(heads[0] >= 0 and heads[-1] < call.num_heads, "heads", heads, f"head numbers in [0, {call.num_heads})")
        rows = {"all": slice(None), "prefix": slice(self.prefix), "patches": slice(self.prefix, None)}[self.part]

        def prune(out: Tensor) -> Tensor:
            out = out.clone()
            out[:, heads, rows] = 0.0
            return out

        call.on_output(prune)


@torch.no_grad()
def head_importance(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    metrics: Sequence[str] = METRICS,
    part: str = "all",
    prune: str = "head",
    prefix: int | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
) -> dict[str, HeadScores]:
    """Prune one head after another and compare with the whole model, image by image.

        found = regard.lens.head_importance(vit, [(images, labels)])
        found["js"].top(5)

    Args:
        model: a classifier of timm or transformers that `attach` can join. data: batches (images (B, C, H, W), labels (B,)).
        metrics: "probability": drop of the true class's probability; "cross-entropy": its rise, in nats; "js": Jensen-Shannon divergence of
            the class distributions, in nats; "rank": by how many places the true class falls.
        part: "all" tokens of the head, the "prefix" (class token) alone, or the "patches" alone.
        prune: "head": that head; "others": all other heads of its layer, so that the score says what the head can do alone.
        prefix: tokens before the patches. None: those of the model (`num_prefix_tokens` in timm), else 1.
        layers, heads: which to try; None = all.

    Returns:
        metric -> `HeadScores` (L, H), the mean over images; `runs` (images, L, H). More is more important, with `prune="others"` less.
        Cost: 1 + layers x heads forwards of every batch.
    """
    wanted = [require_name("metrics", metric, METRICS) for metric in metrics]
    require(bool(wanted), "metrics", "none", f"some of {METRICS}")
    require_name("part", part, PARTS)
    require_name("prune", prune, ("head", "others"))
    if prefix is None:
        prefix = int(getattr(model, "num_prefix_tokens", 1))
    batches = list(data)
    require(bool(batches), "data", "none", "at least one batch (images, labels)")
    num_layers, num_heads = _shape(model, batches[0])
    tried_layers = chosen_numbers("layers", layers, num_layers)
    tried_heads = chosen_numbers("heads", heads, num_heads)
    parts = []
    for images, labels in batches:
        whole = _log_probs(model, images)
        fits = (
            labels.dim() == 1
            and len(labels) == len(whole)
            and bool((labels >= 0).all())
            and int(labels.max()) < whole.shape[1]
        )
        require(fits, "data", f"labels of shape {tuple(labels.shape)}", f"(B,) class numbers in [0, {whole.shape[1]})")
        tables = {
            metric: torch.full((len(whole), num_layers, num_heads), torch.nan, dtype=torch.float64) for metric in wanted
        }
        for layer in tried_layers:
            for head in tried_heads:
                gone = [(layer, head)] if prune == "head" else [(layer, h) for h in range(num_heads) if h != head]
                with attach(model, PruneHeads(gone, part, prefix)):
                    pruned = _log_probs(model, images)
                for metric in wanted:
                    tables[metric][:, layer, head] = _compare(metric, whole, pruned, labels.to(whole.device))
        parts.append(tables)
    info = {"part": part, "prune": prune}
    return {
        metric: HeadScores.from_runs(torch.cat([tables[metric] for tables in parts]), name=metric, info=info)
        for metric in wanted
    }


def _compare(metric: str, whole: Tensor, pruned: Tensor, labels: Tensor) -> Tensor:
    """(B,) on the CPU, from log-probabilities (B, classes)."""
    true = [log_probs.gather(1, labels[:, None]) for log_probs in (whole, pruned)]
    if metric == "probability":
        made = true[0].exp() - true[1].exp()
    elif metric == "cross-entropy":
        made = true[0] - true[1]
    elif metric == "rank":
        before, after = ((log_probs > own).sum(1, keepdim=True) for log_probs, own in zip((whole, pruned), true))
        made = after - before
    else:
        made = jensen_shannon(whole, pruned)[:, None]
    return made[:, 0].double().cpu()


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions given as log-probabilities (..., classes), in nats: in [0, log 2]."""
    middle = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0, dtype=first.dtype))
    ours, theirs = (torch.where(p == -torch.inf, 0.0, p.exp() * (p - middle)).sum(-1) for p in (first, second))
    return ((ours + theirs) / 2).clamp(min=0.0)


def _log_probs(model: nn.Module, images: Any) -> Tensor:
    if not isinstance(images, Tensor):
        raise bad_type("data", images, "batches (images, labels) of tensors")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        made = model(images.to(device))
    finally:
        model.train(training)
    return getattr(made, "logits", made).double().log_softmax(-1)


def _shape(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[int, int]:
    found: list[int] = []
    with attach(model) as session:
        session.observers.append(lambda call: found.append(call.num_heads))
        _log_probs(model, batch[0][:1])
        return session.num_layers, max(found)
