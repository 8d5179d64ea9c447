"""What a layer trained on in-context regression has in its heads (182): the diagonal KQ and the last-entry OV.

He, Pan, Chen, Yang (2025), arXiv 2503.12734; XintianPan/ICL_linear @ 87ed34f read for numbers (no licence).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import bad_type, require, require_fraction
from ..nn.sequence.in_context_attention import InContextAttention

__all__ = ["ICLCircuits", "icl_circuits"]


@dataclass
class ICLCircuits:
    """Heads of an in-context layer as matrices and as the numbers of the paper's pattern.

    Attributes:
        kq (H, d + r, d + r), ov (H, d + r, r): the circuits, d features and r responses.
        diagonal (H, d): of KQ over the features, divided by sqrt(d + r) like the scores. omega (H,): its mean.
        mu (H,), for r > 1 (H, r): how each response is passed on.
        kq_error (H,): Frobenius norm of KQ less diag(omega, ..., omega, 0), as a share of KQ's. off_diagonal (H,): of what is off the
            diagonal (features may weigh differently, as with two regressions). Both over the columns of features: a question holds 0
            for its responses, so that the other columns have no effect, get no gradient and stay as they began. ov_error (H,): of
            what in OV is not a response passed on to itself. All 0 for a matrix of zeros.
        roles: "positive" (omega > 0), "negative" or "dummy" a head.
    """

    kq: Tensor
    ov: Tensor
    diagonal: Tensor
    omega: Tensor
    mu: Tensor
    kq_error: Tensor
    off_diagonal: Tensor
    ov_error: Tensor
    roles: list[str]

    @property
    def active(self) -> Tensor:
        """(H,) bool: heads that are no dummies."""
        return torch.tensor([role != "dummy" for role in self.roles])

    @property
    def mu_sum(self) -> Tensor:
        """Sum of mu over heads: near 0 where heads pair up. Scalar, or (r,)."""
        return self.mu.sum(0)

    @property
    def omega_spread(self) -> float:
        """Largest |omega| of the active heads over their smallest: 1 where all attend equally sharply."""
        sizes = self.omega[self.active].abs()
        return float(sizes.max() / sizes.min()) if len(sizes) else float("nan")


@torch.no_grad()
def icl_circuits(layer: InContextAttention, dummy: float = 0.1) -> ICLCircuits:
    """Read omega, mu and the distance from the pattern off a layer's weights.

    Args:
        layer: tokens of d features followed by `out_dim` responses (out_dim < dim).
        dummy: a head is one where |omega| * |mu| is below this share of the largest head's.

    The authors' notebook divides KQ by sqrt(d + 2) though the layer divides scores by sqrt(d + 1) (one response); here it is the
    layer's own scale, so that `softmax_heads(prompt, omega, mu)` is the layer.
    """
    if not isinstance(layer, InContextAttention):
        raise bad_type("layer", layer, "an InContextAttention")
    require_fraction("dummy", dummy)
    features = layer.dim - layer.out_dim
    require(features > 0, "layer", f"dim {layer.dim}, out_dim {layer.out_dim}", "more entries than responses")
    kq, ov = layer.circuits()
    diagonal = kq.diagonal(dim1=1, dim2=2)[:, :features] / layer.dim**0.5
    omega = diagonal.mean(1)
    even, own = torch.zeros_like(kq), torch.zeros_like(kq)
    even.diagonal(dim1=1, dim2=2)[:, :features] = omega[:, None] * layer.dim**0.5
    own.diagonal(dim1=1, dim2=2)[:, :features] = diagonal * layer.dim**0.5
    mu = ov[:, features:].diagonal(dim1=1, dim2=2)
    passed = torch.zeros_like(ov)
    passed[:, features:] = torch.diag_embed(mu)
    weight = omega.abs() * mu.norm(dim=1)
    is_dummy = (weight < dummy * weight.max()) | (weight == 0)
    roles = ["dummy" if idle else "positive" if w > 0 else "negative" for w, idle in zip(omega.tolist(), is_dummy)]
    return ICLCircuits(
        kq, ov, diagonal, omega, mu[:, 0] if layer.out_dim == 1 else mu,
        _share((kq - even)[..., :features], kq[..., :features]), _share((kq - own)[..., :features], kq[..., :features]),
        _share(ov - passed, ov), roles,
    )  # fmt: skip


def _share(part: Tensor, whole: Tensor) -> Tensor:
    size = whole.flatten(1).norm(dim=1)
    return torch.where(size > 0, part.flatten(1).norm(dim=1) / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
