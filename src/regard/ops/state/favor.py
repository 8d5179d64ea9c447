"""FAVOR+: random features that make a linear attention of softmax attention (or of another kernel).

Rethinking Attention with Performers (Choromanski et al. 2021, arXiv 2009.14794); code read for numbers: google-research/performer and
Shark-NLP/CAB @ 0e49696 (MIT), `efficient_attention/modules/performer.py`. With W of orthogonal rows, E[phi(q) . phi(k)] =
exp(q . k / sqrt(D)). Use: `linear_attention(softmax_features(q, w, query=True), softmax_features(k, w, query=False), v)` with its
normalisation on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor

__all__ = ["orthogonal_projection", "relu_features", "softmax_features"]


def orthogonal_projection(
    count: int,
    dim: int,
    num_heads: int | None = None,
    *,
    orthogonal: bool = True,
    regular: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random directions (count, dim), or (num_heads, count, dim) with draws of its own for each head.

    Rows are Gaussian; with `orthogonal` they are orthogonal within each run of `dim` rows (blocks are drawn anew) and keep the lengths
    of Gaussian vectors, or all have length sqrt(dim) with `regular`. generator: on the CPU. Draw again now and then in training.
    """
    require_int("count", count, 1)
    require_int("dim", dim, 1)
    if num_heads is not None:
        options = {
            "orthogonal": orthogonal,
            "regular": regular,
            "generator": generator,
            "dtype": dtype,
            "device": device,
        }
        heads = require_int("num_heads", num_heads, 1)
        return torch.stack([orthogonal_projection(count, dim, **options) for _ in range(heads)])  # type: ignore[arg-type]
    if not orthogonal:
        return torch.randn(count, dim, generator=generator, dtype=torch.float32).to(device, dtype)
    blocks = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0].T for _ in range(-(-count // dim))]
    rows = torch.cat(blocks)[:count]
    if regular:
        lengths = torch.full((count, 1), dim**0.5)
    else:
        lengths = torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)
    return (lengths * rows).to(device, dtype)


def softmax_features(x: Tensor, projection: Tensor, query: bool, eps: float = 1e-4) -> Tensor:
    """Positive features of exp(q . k / sqrt(D)): x (B, H, N, D), projection (F, D) or (H, F, D) -> (B, H, N, F).

    phi(x) = (exp(w . y - |y|^2 / 2 - c) + eps) / sqrt(F) with y = x / D^(1/4). c keeps exp in range and cancels in a normalised
    attention: for queries the row's maximum of w . y, for keys the maximum over all keys and features of a head. The latter looks at
    all keys: in causal attention the features of a token would (through eps and rounding) depend on later ones. Features are taken at
    least in float32.
    """
    y, products = _products(x, projection)
    if not x.shape[2]:
        return products.to(x.dtype)
    half = y.square().sum(-1, keepdim=True) / 2
    highest = products.detach().amax(-1 if query else (-1, -2), keepdim=True)
    return (((products - half - highest).exp() + eps) * projection.shape[-2] ** -0.5).to(x.dtype)


def relu_features(x: Tensor, projection: Tensor | None = None, eps: float = 1e-3, normalise: bool = True) -> Tensor:
    """Generalised features relu(w . y) + eps: x (B, H, N, D), projection (F, D) or (H, F, D) -> (B, H, N, F).

    projection None: relu(y) + eps, F = D. normalise: y = x / D^(1/4), else y = x. (google-research divides w . y by sqrt(F) too, which
    only rescales `eps`.)
    """
    if projection is None:
        require_tensor("x", x, dims=4, floating=True)
        return (x * x.shape[-1] ** -0.25 if normalise else x).relu() + eps
    _, products = _products(x, projection, normalise)
    return (products.relu() + eps).to(x.dtype)


def _products(x: Tensor, projection: Tensor, normalise: bool = True) -> tuple[Tensor, Tensor]:
    require_tensor("x", x, dims=4, floating=True)
    heads, dim = x.shape[1], x.shape[-1]
    shapes = ((projection.shape[-2], dim), (heads, projection.shape[-2], dim))
    need = f"(F, {dim}) or ({heads}, F, {dim})"
    require(tuple(projection.shape) in shapes, "projection", f"shape {tuple(projection.shape)}", need)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) * (dim**-0.25 if normalise else 1.0)
    return y, y @ projection.to(wide).transpose(-1, -2)
