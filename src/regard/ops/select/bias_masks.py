"""Masks made of an additive bias on the keys: the largest biases of each row, or the positive ones, smoothed over blocks.

Shi et al., "Trainable Dynamic Mask Sparse Attention" (2025, arXiv 2508.02124). Code read for numbers: SmallDoges/flash-dmattn @ f024c28
(BSD-3; package `flash_sparse_attn`), `utils/mask.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor
from ..mask_base import Bounds, Mask
from ..range_extremes import range_extremes, range_table

_AT_ONCE = 1 << 24


def topk_bias_mask(bias: Tensor, keep: int, mask: Tensor | None = None, block: int | None = None) -> Tensor:
    """The `keep` largest entries of each row of `bias` (all that are allowed, where these are fewer).

    Args:
        bias: (..., M). mask: bool, broadcastable: what is allowed; the others are never kept.
        block: smooth the result, see `block_smooth`.
    Returns:
        bool, the broadcast shape. No gradient passes; ties are broken as `torch.topk` breaks them.
    """
    require_tensor("bias", bias, floating=True)
    keep = min(require_int("keep", keep, 1), bias.shape[-1])
    bias = _allowed(bias, mask)
    found = bias.topk(keep, dim=-1, sorted=False)
    kept = torch.zeros_like(bias, dtype=torch.bool).scatter_(-1, found.indices, found.values > -torch.inf)
    return kept if block is None else block_smooth(kept, block)


def relu_bias_mask(bias: Tensor, mask: Tensor | None = None, block: int | None = None) -> Tensor:
    """The entries of `bias` above 0, as bool; arguments as in `topk_bias_mask`."""
    require_tensor("bias", bias, floating=True)
    kept = _allowed(bias, mask) > 0
    return kept if block is None else block_smooth(kept, block)


def _allowed(bias: Tensor, mask: Tensor | None) -> Tensor:
    bias = bias.detach()
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.tensor(-torch.inf, dtype=bias.dtype, device=bias.device))


def block_smooth(kept: Tensor, block: int) -> Tensor:
    """All of a block of `block` keys where more than half of it was kept, else none of it; the shorter last block likewise.

    kept: bool (..., M). What was not allowed inside a kept block is kept too: the mask has to be applied again.
    """
    require_int("block", block, 1)
    length = kept.shape[-1]
    padded = torch.nn.functional.pad(kept, (0, -length % block)).unflatten(-1, (-1, block))
    sizes = (length - torch.arange(0, length, block, device=kept.device)).clamp(max=block)
    most = padded.sum(-1) * 2 > sizes
    return most[..., None].expand(padded.shape).flatten(-2)[..., :length]


@torch.no_grad()
def topk_expiry(values: Tensor, keep: int) -> Tensor:
    """When each key falls out of the `keep` largest of a growing row.

    Query i sees keys 0 .. i and keeps the `keep` largest of them: key j is kept by the queries j <= i < expiry[j], an interval,
    because larger keys only ever come to join. Of equal keys the later is the larger, so that constant values keep a sliding window.

    Args:
        values: (..., M), without NaN.
    Returns:
        int64 (..., M): a position, M where the key is never lost; at most j where even its own query does not keep it.
    """
    require_tensor("values", values, floating=True)
    require_int("keep", keep, 1)
    length = values.shape[-1]
    flat = values.reshape(-1, length)
    rows = flat.shape[0]
    rank = torch.empty_like(flat, dtype=torch.long)
    order = flat.sort(dim=-1, stable=True).indices
    rank.scatter_(-1, order, torch.arange(length, device=flat.device).expand(rows, -1).contiguous())
    expiry = torch.full_like(rank, length)
    top_rank = rank.new_full((rows, keep), -1)  # ascending; -1: nothing yet
    top_at = rank.new_zeros((rows, keep))
    step = max(16, min(256, _AT_ONCE // max(1, rows * (keep + 256))))
    for start in range(0, length, step):
        new = rank[:, start : start + step]
        at = torch.arange(start, start + new.shape[1], device=rank.device).expand(rows, -1)
        both, both_at = torch.cat((top_rank, new), dim=1), torch.cat((top_at, at), dim=1)
        larger = keep - torch.searchsorted(top_rank, both.contiguous(), right=True)  # entries of the top above each
        count = (new[:, None, :] > both[:, :, None]).cumsum(-1, dtype=torch.int32) + larger[..., None]
        out = (count < keep).sum(-1)  # steps of this part that it survives
        lost = (out < new.shape[1]) & (both >= 0)
        row, column = lost.nonzero(as_tuple=True)
        expiry[row, both_at[row, column]] = start + out[row, column]
        best = both.topk(keep, dim=1)
        top_rank, place = best.values.sort(dim=1)
        top_at = both_at.gather(1, best.indices).gather(1, place)
    return expiry.reshape(values.shape)


class LiveKeys(Mask):
    """Keeps key j for queries before `expiry[b, h', j]`, h' the kv head of query head h. expiry: int64 (B|1, Hkv, M)."""

    varies_head = True

    def __init__(self, expiry: Tensor, num_heads: int) -> None:
        require_tensor("expiry", expiry, dims=3)
        heads = expiry.shape[1]
        require(heads > 0 and num_heads % heads == 0, "expiry", f"{heads} heads", f"a divisor of {num_heads} heads")
        self.expiry, self.group = expiry, num_heads // heads
        self.varies_batch = expiry.shape[0] > 1
        self._table: Tensor | None = None

    def _row(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return (b if self.varies_batch else torch.zeros_like(b)), h // self.group

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx < self.expiry.to(q_idx.device)[(*self._row(b, h), kv_idx)]

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        if self._table is None:
            self._table = range_table(self.expiry.flatten(0, 1))
        batch_row, head_row = self._row(b, h)
        row, lo, hi = torch.broadcast_tensors(batch_row * self.expiry.shape[1] + head_row, kv_lo, kv_hi)
        low, high = range_extremes(self._table.to(q_lo.device), row, lo, hi)
        return high > q_lo, low > q_hi

    def __repr__(self) -> str:
        return f"live_keys({tuple(self.expiry.shape)})"
