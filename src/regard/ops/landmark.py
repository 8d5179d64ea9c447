"""Landmark attention: a softmax in two levels, blocks through their landmark tokens and tokens inside their block.

Mohtashami and Jaggi 2023 (NeurIPS), arXiv 2305.16300. Numbers from epfml/landmark-attention (Apache-2.0),
`lm_benchmark/models/landmark.py`.

After every block of ordinary tokens stands a landmark, a token of its own. A query takes one softmax over the ordinary tokens of its
own block (the last one it sees) and the landmarks of the blocks before; what a landmark receives is dealt out to the tokens of its
block by a softmax over these alone. Landmarks themselves receive nothing. The release reserves `max_groups_for_softmax` buckets and is
silently wrong with more landmarks; here there is no such limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, require, require_int, require_tensor
from .masks import Mask, as_mask, causal, dense
from .reference import attention_scores, softmax_with_lse, weighted_values

__all__ = ["insert_landmarks", "landmark_attention", "landmark_weights"]

_SCORES = 1 << 24  # scores made at once where no gradient is wanted


def insert_landmarks(ids: Tensor, landmark_id: int, every: int = 50, filled: int = 0) -> Tensor:
    """Token ids with a landmark after every `every` of them.

    Args:
        ids: (..., N), the same length in all rows. landmark_id: an id that means nothing else.
        filled: ordinary tokens of the first block that stand before `ids` (0 <= filled < every).
    Returns:
        (..., N + landmarks). A block that is not complete at the end gets none.
    """
    require_tensor("ids", ids)
    require_int("every", every, 1)
    require_int("landmark_id", landmark_id, 0)
    require_int("filled", filled, 0)
    require(filled < every, "filled", filled, f"less than every, {every}")
    length = ids.shape[-1]
    count = (filled + length) // every
    place = torch.arange(length, device=ids.device)
    place = place + (filled + place) // every
    out = ids.new_full((*ids.shape[:-1], length + count), landmark_id)
    out[..., place] = ids
    return out


def landmark_weights(scores: Tensor, is_landmark: Tensor, group_dropout: float = 0.0) -> Tensor:
    """Attention weights from scores: the softmax in two levels.

    Args:
        scores: (B, H, N, M), scaled, -inf where a query may not look. Differentiable.
        is_landmark: bool (B, M), which keys are landmarks; keys after the k-th landmark up to the next one are block k.
        group_dropout: probability with which what a landmark receives is dropped (what stays is divided by 1 - group_dropout; the
            own block is never touched). Always active when > 0.
    Returns:
        (B, H, N, M). Rows sum to 1 where every block seen has an ordinary token; landmarks get 0; a row that sees nothing is 0.
    """
    require_tensor("scores", scores, dims=4, floating=True)
    _check_landmarks(is_landmark, scores.shape[0], scores.shape[3])
    require(0.0 <= group_dropout < 1.0, "group_dropout", group_dropout, "a probability in [0, 1)")
    if scores.numel() == 0:
        return torch.zeros_like(scores)
    block = (is_landmark.cumsum(-1) - is_landmark.long())[:, None, None]  # landmarks strictly before
    seen, landmark = scores > -torch.inf, is_landmark[:, None, None]
    last = torch.where(seen, block, 0).amax(-1, keepdim=True)
    own, earlier = seen & (block == last) & ~landmark, seen & (block < last)
    total = softmax_with_lse(scores.masked_fill(~(own | (earlier & landmark)), -torch.inf))[1][..., None]

    # Inside the blocks: log-sum-exps of their ordinary tokens, (B, H, N, blocks)
    count = int(block.max()) + 1
    index = block.expand(scores.shape)
    inside = scores.masked_fill(~earlier | landmark, -torch.inf)
    shape = (*scores.shape[:3], count)
    top = scores.new_full(shape, -torch.inf).scatter_reduce(-1, index, inside.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    shifted = (inside - top.gather(-1, index)).exp()
    mass = torch.zeros_like(top).scatter_add(-1, index, shifted)
    lse = mass.clamp(min=torch.finfo(mass.dtype).tiny).log() + top

    # What each landmark receives, by block
    received = (scores - total).masked_fill(~(earlier & landmark), -torch.inf)
    received = scores.new_full(shape, -torch.inf).scatter_reduce(-1, index, received, "amax")
    share = received - lse
    if group_dropout > 0.0:
        kept = torch.rand(shape, device=scores.device) >= group_dropout
        share = share.masked_fill(~kept, -torch.inf) - torch.log1p(torch.tensor(-group_dropout))
    log_weight = torch.where(own, scores - total, inside + share.gather(-1, index))
    return log_weight.masked_fill(~(own | (earlier & ~landmark)), -torch.inf).exp()


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_landmark: Tensor,
    *,
    mask: Mask | Any = None,
    q_offset: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    group_dropout: float = 0.0,
) -> Tensor:
    """Causal attention with the softmax in two levels.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). is_landmark: bool (B, M).
        mask: further restriction (padding, say), as in `regard.ops.attention`; causality comes by itself.
        q_offset: position of query row 0, default M - N. scale: default D ** -0.5.
        dropout: on the weights. group_dropout: on what landmarks receive, see `landmark_weights`. Both always active when > 0.
    Returns:
        (B, H, N, Dv) in q's dtype. Without landmarks it is plain causal attention.

    Differentiable. Without a gradient, the matrix of scores is made for some rows at a time only.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
    batch, heads, rows, dim = q.shape
    length = k.shape[2]
    require(k.shape[3] == dim, "k", f"head_dim {k.shape[3]}", f"q's head_dim {dim}")
    require(heads % max(1, k.shape[1]) == 0, "k", f"{k.shape[1]} kv heads", f"a divisor of q's {heads} heads")
    _check_landmarks(is_landmark, batch, length)
    offset = length - rows if q_offset is None else q_offset
    scale = dim**-0.5 if scale is None else scale
    if isinstance(mask, Tensor):
        mask = dense(mask.expand(*mask.shape[:-2], rows, length), q_offset=offset)
    allowed = causal if mask is None else causal & as_mask(mask)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    at_once = rows if wants_grad else max(1, _SCORES // max(1, batch * heads * length))
    out = []
    for begin in range(0, rows, max(1, at_once)):
        part = q[:, :, begin : begin + at_once]
        scores = attention_scores(part, k, mask=allowed, q_offset=offset + begin, scale=scale)
        weights = landmark_weights(scores, is_landmark, group_dropout)
        if dropout > 0.0:
            weights = torch.nn.functional.dropout(weights, dropout)
        out.append(weighted_values(weights, v).to(q.dtype))
    return torch.cat(out, 2) if out else q.new_zeros(batch, heads, 0, v.shape[3])


def _check_landmarks(is_landmark: Tensor, batch: int, length: int) -> None:
    require_tensor("is_landmark", is_landmark, dims=2)
    if is_landmark.dtype != torch.bool:
        raise bad_type("is_landmark", is_landmark.dtype, "a bool tensor")
    got = tuple(is_landmark.shape)
    require(got == (batch, length), "is_landmark", f"shape {got}", f"(B, M) = ({batch}, {length})")
