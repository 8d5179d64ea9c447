"""Angular locality-sensitive hashing (Charikar 2002), as HyperAttention sorts with it (Han et al. 2023, arXiv 2310.05869).

Code read for numbers: insuhan/hyper-attn @ 68b91e9 (Apache-2.0), `AngularLSH`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_name, require_tensor
from ..reference import accumulation_dtype

MAX_PROJECTIONS = 62


def draw_projections(
    dim: int, count: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """`count` Gaussian directions for vectors of `dim` channels, float32 (1, 1, dim, count), one set for all heads."""
    require_int("dim", dim, 1)
    require_int("count", count, 0)
    where = generator.device if generator is not None else device
    return torch.randn(1, 1, dim, count, generator=generator, device=where).to(device or where or "cpu")


@torch.no_grad()
def angular_lsh(x: Tensor, projections: Tensor, *, variant: str = "paper") -> Tensor:
    """The bucket of each vector: which side of each of r planes it lies on, numbered so that near buckets stand near each other.

    Args:
        x: (B, H, N, D). projections: (D, r), or broadcastable to (B, H, D, r), 0 <= r <= 62; bit i of a vector is x . p_i > 0.
        variant: how the 2^r sign patterns are numbered. "paper": neighbours differ in one sign (the inverse of the Gray code).
            "released": the authors' numbering, by the Gray code itself, whose neighbours can differ in two.
    Returns:
        int64 (B, H, N), in [0, 2^r); zeros for r = 0.
    """
    require_tensor("x", x, dims=4, floating=True)
    require_tensor("projections", projections, floating=True)
    require_name("variant", variant, ("paper", "released"))
    count = projections.shape[-1] if projections.dim() in (2, 3, 4) else -1
    fits = 0 <= count <= MAX_PROJECTIONS and projections.shape[-2] == x.shape[-1]
    require(fits, "projections", f"shape {tuple(projections.shape)}", f"({x.shape[-1]}, r) with r <= {MAX_PROJECTIONS}")
    dtype = accumulation_dtype(x.dtype)
    try:
        above = x.to(dtype) @ projections.to(device=x.device, dtype=dtype) > 0
    except RuntimeError:
        raise bad_value(
            "projections", f"shape {tuple(projections.shape)}", f"broadcastable over {tuple(x.shape[:2])}"
        ) from None
    bits = torch.zeros(above.shape[:-1], dtype=torch.long, device=x.device)
    for i in range(count):
        bits += above[..., i].long() << i
    if variant == "released":
        return bits ^ (bits >> 1)
    shift = 1
    while shift < count:  # the prefix XOR undoes b ^ (b >> 1)
        bits = bits ^ (bits >> shift)
        shift *= 2
    return bits
