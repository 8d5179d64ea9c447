"""The attention diversification loss (ADL), Guo et al., "Robustifying Token Attention for Vision Transformers"
(ICCV 2023, arXiv 2303.11126). Code read for numbers: guoyongcs/TAPADL @ 6e4dbff (MIT), `AttentionDiversificationLoss`.

What differs: the released function squeezes singleton dimensions, so that with a batch of one it averages over keys
where it means queries and (at its default threshold) is always zero. Here a batch of one is as any other;
`variant="released"` gives their number. The paper's pooling is `regard.nn.TokenAwarePooling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_name, require_tensor
from ..ops.reference import accumulation_dtype


@runtime_checkable
class RecordedWeights(Protocol):
    """What `regard.record` returns, as far as a loss needs it."""

    @property
    def layers(self) -> Sequence[int]: ...

    def weights(self, layer: int) -> Tensor: ...


def attention_diversification(
    attns: Sequence[Tensor] | RecordedWeights | Tensor,
    threshold: float = 2.0,
    *,
    variant: str = "paper",
) -> Tensor:
    """How alike the rows of the attention maps are: the mean cosine of each row with the mean row.

    Minimised beside the task's loss (the paper: `cross_entropy + 1.0 * attention_diversification(attns)`) it drives
    the tokens to look at different places. Instead of all pairs of rows, each row is compared with the mean over the
    queries, which costs O(N²). Per layer: average the heads; the mean row is taken over all queries; then what is at
    most `threshold / N` (N the number of keys: `threshold` times the uniform weight) is set to zero in the rows and in
    the mean row; the layer's loss is the mean over batch and queries of their cosine (0 where one of the two is all
    zero). Gradients flow through what is kept. The result is the mean over layers.

    Args:
        attns: attention weights after the softmax, one tensor (B, heads, queries, keys) a layer: a sequence, a single
            tensor, or the result of `regard.record` (anything with `.layers` and `.weights(layer)`). To train with it
            the weights must still have their autograd graph. Layers may differ in shape.
        threshold: in multiples of the uniform weight 1/N; default 2.
        variant: "paper" (default), or "released": the authors' code, which squeezes singleton dimensions. They
            differ at batch size 1 only (and for single-token maps), where the released one is broken; hence "paper".

    Returns:
        A scalar in [0, 1], in float32 for half-precision inputs.

    Raises:
        ValueError: no layers, a map that is not four-dimensional, a negative threshold, an unknown variant.
        TypeError: `attns` or one of its entries of another type.
    """
    require_name("variant", variant, ("paper", "released"))
    require(threshold >= 0, "threshold", threshold, "a number >= 0")
    maps = _layers(attns)
    if not maps:
        raise bad_value("attns", attns, "the attention weights of at least one layer")
    losses = [_row_similarity(weights, threshold, squeeze=variant == "released") for weights in maps]
    return torch.stack(losses).sum() / (len(maps) + 1e-6)  # the authors' divisor


def _layers(attns: Sequence[Tensor] | RecordedWeights | Tensor) -> list[Tensor]:
    if isinstance(attns, Tensor):
        return [attns]
    if isinstance(attns, RecordedWeights):
        return [attns.weights(layer) for layer in attns.layers]
    if isinstance(attns, Sequence) and not isinstance(attns, str):
        return list(attns)
    raise bad_type("attns", attns, "a sequence of attention weights, one tensor, or the result of regard.record")


def _row_similarity(weights: Tensor, threshold: float, squeeze: bool) -> Tensor:
    require_tensor("attns", weights, dims=4, floating=True)
    rows = weights.to(accumulation_dtype(weights.dtype)).mean(dim=1)
    if squeeze:
        rows = rows.squeeze()
    mean_row = rows.mean(dim=1, keepdim=True)
    bound = threshold / rows.shape[-1]
    rows = rows * (rows > bound)
    mean_row = mean_row * (mean_row > bound)
    return F.cosine_similarity(mean_row, rows, dim=-1).mean()
