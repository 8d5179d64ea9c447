"""How well predicted label sets match the true ones: Hamming loss, and precision, recall, F1 over all (micro) and by label (macro)."""

from __future__ import annotations

from torch import Tensor

from .._checks import require, require_tensor

__all__ = ["multilabel_scores"]


def multilabel_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """predicted, truth: (N, L) bool or 0/1 -> {"hamming_loss", "micro_precision", "micro_recall", "micro_f1", "macro_f1"}.

    Hamming loss: share of the N * L decisions that are wrong. A ratio without anything below the line is 0, as scikit-learn has it.
    """
    require_tensor("predicted", predicted, dims=2)
    require(truth.shape == predicted.shape, "truth", f"shape {tuple(truth.shape)}", f"{tuple(predicted.shape)}")
    require(predicted.numel() > 0, "predicted", f"shape {tuple(predicted.shape)}", "at least one text and label")
    said, real = predicted.bool(), truth.bool()
    hit, made, wanted = (x.sum(0).double() for x in (said & real, said, real))

    def ratio(above: Tensor, below: Tensor) -> Tensor:
        return above / below.clamp(min=1)

    return {
        "hamming_loss": float((said != real).double().mean()),
        "micro_precision": float(ratio(hit.sum(), made.sum())),
        "micro_recall": float(ratio(hit.sum(), wanted.sum())),
        "micro_f1": float(ratio(2 * hit.sum(), made.sum() + wanted.sum())),
        "macro_f1": float(ratio(2 * hit, made + wanted).mean()),
    }
