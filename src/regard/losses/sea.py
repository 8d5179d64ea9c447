"""SEA's distillation: estimate, scores and result of a layer against those of the dense layer it replaces.

Lee et al. 2024 (arXiv 2310.01777). Code read for numbers (no licence): gmlwns2000/sea-attention @ 5609413,
`perlin_attention/attention.py`, `common/kl_div_for_atten.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import require, require_tensor
from ..nn.sequence.sparse_linear_attention import SparseLinearRecord


def sea_distillation(
    record: SparseLinearRecord, teacher_scores: Tensor, teacher_context: Tensor | None = None
) -> Tensor:
    """What one layer of SEA is trained by, beside the losses of the whole network.

    The sum of 0.1 KL(teacher | estimate) and the squared error of the two maps, the same pair for the layer's own dense scores, and
    the squared error of the result. Needs the N x N maps.

    Args:
        record: of the layer's forward. teacher_scores: (B, H, N, N), the dense teacher's scaled scores before the softmax; what may not
            be seen is masked here. teacher_context: (B, H, N, D), its head outputs, or None: no such term.
    Returns:
        scalar.
    """
    require_tensor("teacher_scores", teacher_scores, dims=4, floating=True)
    batch, heads, length, _ = record.q.shape
    need = (batch, heads, length, length)
    require(tuple(teacher_scores.shape) == need, "teacher_scores", f"shape {tuple(teacher_scores.shape)}", f"{need}")
    low = torch.finfo(record.q.dtype).min / 2
    hidden = ~record.visible()
    target = teacher_scores.detach().masked_fill(hidden, low).softmax(-1)
    total = record.q.new_zeros(())
    for scores in (record.scores(), record.q @ record.k.transpose(-1, -2) * record.scale):
        scores = scores.masked_fill(hidden, low)
        total = (
            total + 0.1 * _divergence(scores.log_softmax(-1), target, record) + F.mse_loss(scores.softmax(-1), target)
        )
    if teacher_context is not None:
        require_tensor("teacher_context", teacher_context, dims=4, floating=True)
        require(teacher_context.shape == record.context.shape, "teacher_context", f"shape {tuple(teacher_context.shape)}",
                f"{tuple(record.context.shape)}")  # fmt: skip
        total = total + F.mse_loss(record.context, teacher_context.detach())
    return total


def _divergence(log_probs: Tensor, target: Tensor, record: SparseLinearRecord) -> Tensor:
    """Causal: the mean over rows. Else: the sum over heads and pairs of real tokens, divided by the number of real tokens."""
    if record.causal:
        return F.kl_div(log_probs.flatten(0, 2), target.flatten(0, 2), reduction="batchmean")
    terms = target * ((target + 1e-12).log() - log_probs)
    batch, _, length, _ = target.shape
    exists = torch.ones(batch, length, device=target.device) if record.keys is None else record.keys.to(terms.dtype)
    terms = terms * (exists[:, None, None] * exists[:, None, :, None])
    return terms.sum() / (exists.sum() + 1e-8)
