"""Gaussian adaptive attention: entries are weighed by how likely learned Gaussians about their mean make them.

Paper: "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities" (Ioannides et al.
2024, arXiv 2401.11143). Code read for numbers: gioannides/Gaussian-Adaptive-Attention @ 145d1bc (Apache-2.0), `GaussianBlock.py`.
As there, the densities of a head are multiplied (though the paper speaks of a mixture) and padding is by value. Here it is computed in
log space, so that many wide Gaussians do not underflow; the authors' floor of 1e-8 under the sum is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_tensor

__all__ = ["GaussianAdaptiveAttention", "GaussianBlock", "gaussian_gate", "importance_factor"]

EPS = 1e-8


def gaussian_gate(
    x: Tensor,
    offsets: Tensor,
    widths: Tensor,
    axis: int = -1,
    *,
    padding: Tensor | None = None,
    floor: float = EPS,
    count_padding: bool = True,
) -> Tensor:
    """Weights of the entries of x along one axis, in x's shape: the product of G Gaussian densities, normalised along it.

    Entry x with mean m and unbiased variance s^2 (plus 1e-8) along the axis weighs
    prod_i N((x - m - offsets_i) / s; 0, widths_i^2), over the larger of the sum of these along the axis and `floor`.

    Args:
        x: floating, at least 1 dimension, at least 2 entries along `axis`.
        offsets, widths: (G,) each; of widths only the square counts.
        padding: bool in x's shape, True for entries that are none. They are zeros for the mean and the variance.
        floor: least sum. 0: weights always sum to 1.
        count_padding: as the authors', padding counts as zeros in mean and variance and its own densities in the sum. False: it has
            no part in any of these and weighs 0 (of fewer than two entries the variance is taken as 0).

    Half types are computed in float32.
    """
    require_tensor("x", x, floating=True)
    require(x.dim() >= 1 and -x.dim() <= axis < x.dim(), "axis", axis, f"an axis of x ({x.dim()} dimensions)")
    require(x.shape[axis] >= 2, "x", f"shape {tuple(x.shape)}", f"at least 2 entries along axis {axis}, for a variance")
    for name, value in (("offsets", offsets), ("widths", widths)):
        require_tensor(name, value, dims=1, floating=True)
    require(offsets.shape == widths.shape, "widths", f"shape {tuple(widths.shape)}", f"{tuple(offsets.shape)}")
    require(floor >= 0, "floor", floor, "a number >= 0")
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    if padding is None:
        mean, variance = x.mean(axis, keepdim=True), x.var(axis, keepdim=True)
    else:
        require_tensor("padding", padding)
        require(padding.shape == x.shape, "padding", f"shape {tuple(padding.shape)}", f"{tuple(x.shape)}, that of x")
        padding = padding.bool()
        kept = x.masked_fill(padding, 0)
        if count_padding:
            mean, variance = kept.mean(axis, keepdim=True), kept.var(axis, keepdim=True)
        else:
            number = (~padding).sum(axis, keepdim=True)
            mean = kept.sum(axis, keepdim=True) / number.clamp(min=1)
            away = (x - mean).masked_fill(padding, 0).square().sum(axis, keepdim=True)
            variance = away / (number - 1).clamp(min=1)
    deviation = (variance + EPS).sqrt()
    log = torch.zeros_like(x)
    for offset, width in zip(
        offsets.to(x.dtype), widths.to(x.dtype)
    ):  # few; together they would need G times the memory
        far = (x - (mean + offset)) / deviation
        log = log - 0.5 * (far / width).square() - 0.5 * (2 * math.pi * width.square()).log()
    if padding is not None and not count_padding:
        log = log.masked_fill(padding, torch.finfo(log.dtype).min)
    total = log.logsumexp(axis, keepdim=True)
    if floor > 0:
        total = total.clamp(min=math.log(floor))
    weights = (log - total).exp()
    if padding is not None and not count_padding:
        weights = weights.masked_fill(padding, 0)
    return weights.to(dtype)


class GaussianAdaptiveAttention(nn.Module):
    """x -> x * weights, weights along one axis from `gaussian_gate`. No queries, no keys; 2 * num_gaussians numbers a head.

    Args:
        axis: which axis of x, -1 for channels, 1 for the tokens of (B, N, C).
        num_heads: x is cut into as many pieces along the axis, the last taking what is left over; each has its own Gaussians and is
            weighed by itself, so no head sees another's piece.
        num_gaussians: of a head.
        padding_value: entries equal to it are padding (`gaussian_gate`) and are returned as they are.
        floor, count_padding: of `gaussian_gate`.

    Offsets start at 0, widths at exp of normal numbers. Along the axis of tokens every token has a say in every weight of its head: not
    causal. Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        axis: int = -1,
        num_heads: int = 4,
        num_gaussians: int = 4,
        padding_value: float | None = None,
        *,
        floor: float = EPS,
        count_padding: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise bad_type("axis", axis, "an int")
        self.axis, self.num_heads = axis, require_int("num_heads", num_heads, 1)
        self.num_gaussians = require_int("num_gaussians", num_gaussians, 1)
        require(floor >= 0, "floor", floor, "a number >= 0")
        self.padding_value, self.floor, self.count_padding = padding_value, floor, count_padding
        self.offsets = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        self.widths = nn.Parameter(torch.randn(num_heads, num_gaussians).exp())

    def forward(self, x: Tensor, return_weights: bool = False) -> Any:
        """x in its shape; with `return_weights` a pair with the weights (detached, in x's shape)."""
        require_tensor("x", x, floating=True)
        require(x.dim() >= 2, "x", f"shape {tuple(x.shape)}", "at least 2 dimensions")
        require(-x.dim() <= self.axis < x.dim(), "x", f"shape {tuple(x.shape)}", f"one that has axis {self.axis}")
        size = x.shape[self.axis] // self.num_heads
        need = f"at least {2 * self.num_heads} along axis {self.axis}: two for each of {self.num_heads} heads"
        require(size >= 2, "x", f"shape {tuple(x.shape)}", need)
        cuts = [size] * (self.num_heads - 1)
        cuts.append(x.shape[self.axis] - sum(cuts))
        padding = None if self.padding_value is None else x == self.padding_value
        pieces = x.split(cuts, self.axis)
        masks = [None] * len(cuts) if padding is None else padding.split(cuts, self.axis)
        weights = torch.cat(
            [
                gaussian_gate(
                    piece, offsets, widths, self.axis, padding=mask, floor=self.floor, count_padding=self.count_padding
                )
                for piece, mask, offsets, widths in zip(pieces, masks, self.offsets, self.widths)
            ],
            dim=self.axis,
        )
        y = x * weights
        if padding is not None:
            y = torch.where(padding, x, y)
        return (y, weights.detach()) if return_weights else y

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' one module a head (`attention_heads.N.mean_offsets`, `.c`), or their single head (`mean_offsets`, `c`)."""
        if "offsets" in state:
            return dict(state)
        if "c" in state:
            return {"offsets": state["mean_offsets"][None], "widths": state["c"][None]}
        heads = [f"attention_heads.{head}." for head in range(self.num_heads)]
        ours = {
            "offsets": torch.stack([state[head + "mean_offsets"] for head in heads]),
            "widths": torch.stack([state[head + "c"] for head in heads]),
        }
        known = {head + name for head in heads for name in ("mean_offsets", "c")}
        return ours | {name: tensor for name, tensor in state.items() if name not in known}

    def extra_repr(self) -> str:
        return f"axis={self.axis}, num_heads={self.num_heads}, num_gaussians={self.num_gaussians}"


class GaussianBlock(nn.Module):
    """Layers of `GaussianAdaptiveAttention` with a residual around each: x -> layer(x) + x, shape kept.

    Args:
        axis, num_heads, num_gaussians: of all layers, or a sequence with one for each. num_layers. options: of each layer.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        num_heads: int | Sequence[int] = 4,
        num_gaussians: int | Sequence[int] = 4,
        num_layers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        require_int("num_layers", num_layers, 1)
        listed = []
        for name, value in (("axis", axis), ("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            values = [value] * num_layers if isinstance(value, int) else list(value)
            require(len(values) == num_layers, name, value, f"an int or {num_layers} of them, one for each layer")
            listed.append(values)
        self.layers = nn.ModuleList(GaussianAdaptiveAttention(*own, **options) for own in zip(*listed))

    def forward(self, x: Tensor, return_weights: bool = False) -> Any:
        """x in its shape; with `return_weights` a pair with the list of the layers' weights."""
        weights = []
        for layer in self.layers:
            y, own = layer(x, return_weights=True)
            weights.append(own)
            x = y + x
        return (x, weights) if return_weights else x

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layers, each as `GaussianAdaptiveAttention` has them."""
        ours: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            start = f"layers.{index}."
            own = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
            ours |= {start + name: tensor for name, tensor in layer.official_keys(own).items()}  # type: ignore[operator]
        return ours | {
            name: t
            for name, t in state.items()
            if not name.startswith(tuple(f"layers.{i}." for i in range(len(self.layers))))
        }


def importance_factor(weights: Tensor | Iterable[Tensor]) -> Tensor:
    """What the weights of a data set single out: their mean over samples, brought to [0, 1] by its least and largest entry.

    Args:
        weights: (B, ...) of one batch, or an iterable of those of several, all but B alike.

    Returns:
        (...) at least float32; zeros where the mean is the same everywhere.
    """
    total, count = None, 0
    for batch in [weights] if isinstance(weights, Tensor) else weights:
        require_tensor("weights", batch, floating=True)
        require(batch.dim() >= 2, "weights", f"shape {tuple(batch.shape)}", "samples first, then at least one axis")
        summed = batch.to(torch.promote_types(batch.dtype, torch.float32)).sum(0)
        require(
            total is None or total.shape == summed.shape, "weights", f"{tuple(batch.shape)}", "batches of one shape"
        )
        total, count = summed if total is None else total + summed, count + len(batch)
    require(total is not None and count > 0, "weights", "nothing", "at least one sample")
    assert total is not None
    mean = total / count
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low) if high > low else torch.zeros_like(mean)
