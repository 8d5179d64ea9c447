"""Linear attention of every query to all keys, with a rule for what each row of weights is made to sum to.

The weights are w_ij = factor_i * a_ij + offset_i with a_ij = scale * phi(q_i) . phi(k_j). A `Normaliser` gives factor and offset from the
row's sum s_i = sum_j a_ij and the number of keys N, so that the N x N matrix is never needed:

- `ratio`: a_ij / s_i (Katharopoulos et al. 2020), or a_ij / max(s_i, floor) (L2ViT, Zheng 2025, arXiv 2501.16182);
- `subtract`: a_ij - s_i / N + 1 / N (InLine, Han et al. 2024, arXiv 2412.06590): injective in the query, rows sum to 1;
- `magnitude`: (1 + 1 / s_i) a_ij - s_i / N (MALA, Fan et al. 2025, arXiv 2507.00698): the size of phi(q_i) is kept, rows sum to 1.

Code read for numbers: ChuanyangZheng/L2ViT @ fad0341 (MIT), LeapLabTHU/InLine @ e463a6f and qhfan/MALA @ 7114e63 (no licence). Each of them
is one case of this op; GQA, cross-attention, padding and any width are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._checks import bad_type, require, require_name
from .linear import FeatureMapArgument, _check, _features, linear_attention
from .tensors import accumulate_dtype, expand_heads, no_autocast

__all__ = [
    "NORMALISERS",
    "Normaliser",
    "global_linear_attention",
    "global_linear_weights",
    "magnitude",
    "ratio",
    "subtract",
]

Normaliser = Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]
"""(row sums (B, H, N, 1), number of keys (B or 1, 1, 1, 1)) -> (factor, offset), each to broadcast with the sums."""


def ratio(floor: float | None = None, eps: float = 0.0) -> Normaliser:
    """a_ij / (s_i + eps); with `floor`, a_ij / max(s_i, floor): rows then sum to less than 1 where s_i is below it."""
    require(floor is None or floor > 0, "floor", floor, "None or a number > 0")

    def rule(total: Tensor, count: Tensor) -> tuple[Tensor, float]:
        return 1 / ((total if floor is None else total.clamp(min=floor)) + eps), 0.0

    return rule


def subtract() -> Normaliser:
    """a_ij - s_i / N + 1 / N."""
    return lambda total, count: (1.0, (1 - total) / count)


def magnitude(eps: float = 1e-6) -> Normaliser:
    """(1 + 1 / (s_i + eps)) a_ij - s_i / N. Wants feature maps that are positive."""
    return lambda total, count: (1 + 1 / (total + eps), -total / count)


def _none(total: Tensor, count: Tensor) -> tuple[float, float]:
    return 1.0, 0.0


NORMALISERS: dict[str, Normaliser] = {
    "none": _none,
    "ratio": ratio(eps=1e-6),
    "subtract": subtract(),
    "magnitude": magnitude(),
}


def global_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normaliser: str | Normaliser = "ratio",
    feature_map: FeatureMapArgument = None,
    scale: float | None = None,
    rotate: Callable[[Tensor], Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """sum_j (factor_i a_ij + offset_i) v_j with a_ij = scale * phi(q_i) . phi(k_j), in time linear in N and M.

    Shapes: q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), one dtype, H a multiple of Hkv. Returns (B, H, N, Dv) in that dtype.

    normaliser: "none", "ratio", "subtract", "magnitude", or a callable (row sums, number of keys) -> (factor, offset), such as
        `ratio(floor=100.0)`. See this module.
    feature_map: as in `regard.ops.linear_attention`; None is the identity.
    scale: factor of phi(q) . phi(k). None is D ** -0.5 / M, D the width before the map: InLine's and MALA's, at which sums do not grow with
        the number of keys. It cancels in a ratio without floor or eps.
    rotate: applied to phi(q) and phi(k) (rotary positions), after the sums of the rows were taken: as MALA does, whose rows then
        sum to 1 only approximately, because a rotated sum can be 0 or negative.
    lengths: (B,) integers, valid keys of each sequence, counted from the left; the rest is padding. A sequence without keys gives zeros.

    Half types accumulate in float32. There is no causal form: these papers have none. Raises ValueError or TypeError naming the argument.
    """
    fq, fk, v_all, count, scale_of = _prepare(q, k, v, normaliser, feature_map, scale, rotate, lengths)
    rule = NORMALISERS[normaliser] if isinstance(normaliser, str) else normaliser
    groups = q.shape[1] // k.shape[1]
    with no_autocast(q.device):
        factor, offset = rule(_row_sums(fq, fk, groups) * scale_of, count)
        turned_q, turned_k = (fq, fk) if rotate is None else (rotate(fq), rotate(fk))
        out = linear_attention(turned_q, turned_k, v_all, causal=False)
        assert isinstance(out, Tensor)
        out = out * (scale_of * factor)
        if not isinstance(offset, float) or offset != 0.0:
            out = out + offset * expand_heads(v_all.sum(dim=2, keepdim=True), groups)
        return _wipe_empty(out, lengths).to(v.dtype)


def global_linear_weights(
    q: Tensor,
    k: Tensor,
    *,
    normaliser: str | Normaliser = "ratio",
    feature_map: FeatureMapArgument = None,
    scale: float | None = None,
    rotate: Callable[[Tensor], Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The weights (B, H, N, M) that `global_linear_attention` applies without writing them down: to look at, and as its definition."""
    value = k.new_ones(*k.shape[:3], 1) if isinstance(k, Tensor) and k.dim() == 4 else k
    fq, fk, valid, count, scale_of = _prepare(q, k, value, normaliser, feature_map, scale, rotate, lengths)
    rule = NORMALISERS[normaliser] if isinstance(normaliser, str) else normaliser
    groups = q.shape[1] // k.shape[1]
    turned_q, turned_k = (fq, fk) if rotate is None else (rotate(fq), rotate(fk))
    factor, offset = rule(_row_sums(fq, fk, groups) * scale_of, count)
    weights = factor * (turned_q @ expand_heads(turned_k, groups).transpose(-1, -2) * scale_of) + offset
    return _wipe_empty(weights * expand_heads(valid, groups).transpose(-1, -2), lengths).to(k.dtype)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normaliser: str | Normaliser,
    feature_map: FeatureMapArgument,
    scale: float | None,
    rotate: Callable[[Tensor], Tensor] | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Checked features and values in the accumulation type, padding wiped; number of keys and scale, (B or 1, 1, 1, 1)."""
    _check(q, k, v, None, False, lengths)
    if isinstance(normaliser, str):
        require_name("normaliser", normaliser, NORMALISERS)
    elif not callable(normaliser):
        raise bad_type("normaliser", normaliser, "a name or a callable (row sums, number of keys) -> (factor, offset)")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise bad_type("scale", scale, "a number or None")
    if rotate is not None and not callable(rotate):
        raise bad_type("rotate", rotate, "a callable on (B, H, N, F), or None")
    acc, padding = accumulate_dtype(q.dtype), None
    count = torch.full((1, 1, 1, 1), float(k.shape[2]), dtype=acc, device=q.device)
    if lengths is not None:
        padding = (torch.arange(k.shape[2], device=k.device) >= lengths.to(k.device)[:, None])[:, None, :, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        count = lengths.to(device=q.device, dtype=acc)[:, None, None, None]
    count = count.clamp(min=1)  # an empty sequence divides by nothing; its rows are wiped at the end
    fq, fk = _features(q.to(acc), k.to(acc), feature_map)
    if padding is not None:
        fk = fk.masked_fill(padding, 0)  # a feature map need not keep zero
    scale_of = q.shape[-1] ** -0.5 / count if scale is None else torch.full_like(count, float(scale))
    return fq, fk, v.to(acc), count, scale_of


def _row_sums(fq: Tensor, fk: Tensor, groups: int) -> Tensor:
    """sum_j phi(q_i) . phi(k_j), (B, H, N, 1)."""
    return fq @ expand_heads(fk.sum(dim=2)[..., None], groups)


def _wipe_empty(rows: Tensor, lengths: Tensor | None) -> Tensor:
    if rows.shape[-1] == 0 or lengths is None:
        return rows
    return rows.masked_fill((lengths.to(rows.device) == 0)[:, None, None, None], 0)
