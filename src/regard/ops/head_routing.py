"""Routing tokens to attention heads: which heads a token uses, and with what weight.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842). Numbers read from SkyworkAI/MoH
(`MoH-DiT/models.py`, `MoH-ViT/attention.py`, `MoH-LLaMA3/Inference_code/modeling_llama.py`). The first `shared` heads serve every
token; of the other ones each token gets its `active - shared` best.

Released code and paper differ in the weights: the paper multiplies plain softmax probabilities, the released code renormalises
the kept ones and rescales each group by its size, so that the gates of a token average to about one per active head. Both are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from . import masks
from .attention import attention
from .reference import accumulation_dtype

__all__ = [
    "HeadRouting",
    "head_balance_loss",
    "query_norm_routing",
    "route_by_query_norm",
    "route_heads",
    "selected_rows_attention",
]

VARIANTS = ("released", "paper")


class HeadRouting(NamedTuple):
    """What a router decided for every token.

    gates: (B, H, N) factor on each head's output, 0 where the head is off for that token.
    selected: (B, H, N) bool, True where the head is on; shared heads are always on.
    balance_loss: scalar, before any coefficient; None where nothing is routed.
    """

    gates: Tensor
    selected: Tensor
    balance_loss: Tensor | None


def route_heads(
    routed_logits: Tensor | None,
    shared_logits: Tensor | None = None,
    group_logits: Tensor | None = None,
    *,
    shared: int,
    active: int,
    variant: str = "released",
) -> HeadRouting:
    """Gates of a learned two-stage router, from its logits.

    Args:
        routed_logits: (B, N, E) scores of the E heads that are not shared; None when `active == shared` (nothing routed).
        shared_logits: (B, N, shared) scores of the shared heads; None when `shared == 0`. A single one is always weighed 1.
        group_logits: (B, N, 2) scores of the two groups, shared then routed; needed when both groups are in use.
        shared: number of heads that serve every token, the first ones.
        active: heads in use per token, the shared ones included.
        variant: "released" (default): `2 softmax(group)`, `shared * softmax(shared)`, and routed probabilities renormalised over
            the kept ones times their number; with equal logits and all heads active every gate is 1. "paper": the three plain
            softmaxes, so the gates of a token sum to at most 1.

    Returns:
        `HeadRouting`. Its balance loss is E * sum_e(mean probability of e * share of the tokens that use e) in the released variant,
        which is `active - shared` when balanced and rises to E when all tokens want one head; without the factor E in the paper's.

    Raises:
        ValueError, TypeError: missing or misshapen logits, counts out of range.
    """
    require_name("variant", variant, VARIANTS)
    require_int("shared", shared)
    require_int("active", active, max(shared, 1))
    released = variant == "released"
    keep = active - shared
    loss = None
    parts, chosen = [], []
    if shared:
        shared_probs = _probabilities("shared_logits", shared_logits, shared)
        parts.append(shared_probs * shared if released else shared_probs)
        chosen.append(torch.ones_like(shared_probs, dtype=torch.bool))
    if keep:
        require_tensor("routed_logits", routed_logits, dims=3, floating=True)
        assert routed_logits is not None
        num_routed = routed_logits.shape[-1]
        require(keep <= num_routed, "active", active, f"at most shared + routed = {shared + num_routed} heads")
        probs = _probabilities("routed_logits", routed_logits, num_routed)
        selected = _top(probs, keep)
        loss = _balance(probs, selected, released)
        kept = probs * selected
        if released:
            kept = keep * kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps)
        if shared:
            groups = _probabilities("group_logits", group_logits, 2) * (2 if released else 1)
            parts[0] = parts[0] * groups[..., :1]
            kept = kept * groups[..., 1:]
        parts.append(kept)
        chosen.append(selected)
    elif routed_logits is not None:
        raise bad_value(
            "routed_logits", f"shape {tuple(routed_logits.shape)}", "None when active == shared (nothing is routed)"
        )
    source = shared_logits if routed_logits is None else routed_logits
    assert source is not None
    gates = torch.cat(parts, -1).transpose(1, 2).to(source.dtype)
    return HeadRouting(gates, torch.cat(chosen, -1).transpose(1, 2), loss)


def query_norm_routing(q: Tensor, *, shared: int, active: int, straight_through: bool = False) -> HeadRouting:
    """Routing without router weights: a head matters for a token as much as its query is long (MoH on LLaMA-3).

    score_h = ||q_h||_2 over the H - shared last heads, divided by its standard deviation over those heads (unbiased), softmax,
    top `active - shared`. Gates are exactly 0 or 1, not renormalised. Rotary embeddings keep norms, so `q` may be taken before or
    after them. MoH-LLaMA3 uses shared = H/2, active = 3H/4; here any counts do (the released code builds the mask of the shared
    heads with the shape of the routed one, right only for H/2).

    Args:
        q: (B, H, N, D) queries.
        shared: heads always on, the first ones; 0 <= shared <= H.
        active: heads on per token, shared included; shared <= active <= H.
        straight_through: give the gates the gradient of the softmax probabilities (the forward value stays 0 or 1), as in the
            paper's continued training; without it the gates carry no gradient.
    """
    require_tensor("q", q, dims=4, floating=True)
    num_heads = q.shape[1]
    require_int("shared", shared)
    require_int("active", active)
    require(shared <= active <= num_heads, "active", active, f"shared ({shared}) <= active <= {num_heads} heads")
    on = torch.ones(q.shape[0], shared, q.shape[2], dtype=torch.bool, device=q.device)
    if shared == num_heads:
        return HeadRouting(on.to(q.dtype), on, None)
    norms = torch.linalg.vector_norm(q[:, shared:].to(accumulation_dtype(q.dtype)), dim=-1).transpose(1, 2)
    if norms.shape[-1] > 1:  # one head has no spread, equal norms have none either: leave those as they are
        spread = norms.std(-1, keepdim=True)
        norms = norms / torch.where(spread > 0, spread, 1.0)
    probs = norms.softmax(-1)
    keep = active - shared
    selected = _top(probs, keep)
    gates = selected.to(probs.dtype)
    if straight_through:
        gates = gates + probs - probs.detach()
    gates = torch.cat([on.to(probs.dtype), gates.transpose(1, 2)], 1).to(q.dtype)
    loss = _balance(probs, selected, released=True) if keep else None
    return HeadRouting(gates, torch.cat([on, selected.transpose(1, 2)], 1), loss)


def route_by_query_norm(q: Tensor, head_outputs: Tensor, *, shared: int, active: int) -> Tensor:
    """Head outputs (B, H, N, Dv) with those heads of each token set to zero that `query_norm_routing(q)` leaves off."""
    require_tensor("head_outputs", head_outputs, dims=4, floating=True)
    require_tensor("q", q, dims=4, floating=True)
    same = head_outputs.shape[:3] == q.shape[:3]
    require(same, "head_outputs", f"shape {tuple(head_outputs.shape)}", f"(B, H, N, Dv) like q's {tuple(q.shape)}")
    gates = query_norm_routing(q, shared=shared, active=active).gates
    return head_outputs * gates.unsqueeze(-1).to(head_outputs.dtype)


def head_balance_loss(routings: Iterable[HeadRouting], coefficient: float = 0.01) -> Tensor:
    """`coefficient` times the mean balance loss over the layers that route (layers with nothing to route do not count).

    0.01 is MoH-ViT's coefficient. Zero (no gradient) when no layer routes.
    """
    losses = []
    for routing in routings:
        if not isinstance(routing, HeadRouting):
            raise bad_type("routings", routing, "an iterable of HeadRouting (the aux output of MixtureOfHead layers)")
        if routing.balance_loss is not None:
            losses.append(routing.balance_loss)
    return coefficient * torch.stack(losses).mean() if losses else torch.zeros(())


def selected_rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    *,
    shared: int = 0,
    mask: Any = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention for the marked (head, token) pairs only; the other rows of the output are zero.

    The marked queries of each head are packed together, padded to the fullest head, so a head costs
    `max_h(tokens that use head h)` queries instead of N. Exact up to rounding, differentiable.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        selected: (B, H, N) bool, which rows to compute. The first `shared` heads are taken as used by every token.
        mask: as in `regard.ops.attention`, read at the queries' true positions (the last row stands at the last key).
        scale, dropout: as in `regard.ops.attention`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
    require_tensor("selected", selected, dims=3)
    require(selected.dtype == torch.bool, "selected", selected.dtype, "a bool tensor")
    require(selected.shape == q.shape[:3], "selected", f"shape {tuple(selected.shape)}", f"{tuple(q.shape[:3])} like q")
    groups = k.shape[1] and q.shape[1] % k.shape[1] == 0 and v.shape[1] == k.shape[1]
    require(bool(groups), "k, v", f"{k.shape[1]} and {v.shape[1]} heads", f"one divisor of q's {q.shape[1]} heads")
    if k.shape[1] < q.shape[1]:  # which heads a packed row belongs to has nothing to do with groups
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    require_int("shared", shared)
    require(shared <= q.shape[1], "shared", shared, f"at most q's {q.shape[1]} heads")
    q_len, kv_len = q.shape[2], k.shape[2]
    if isinstance(mask, Tensor):
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        mask = mask.expand(*mask.shape[:2], q_len, kv_len)
    whole = None if mask is None else masks.as_mask(mask)
    parts = []
    if shared:
        parts.append(attention(q[:, :shared], k[:, :shared], v[:, :shared], mask=whole, scale=scale, dropout=dropout))
    if shared < q.shape[1]:
        q, k, v, selected = q[:, shared:], k[:, shared:], v[:, shared:], selected[:, shared:]
        capacity = int(selected.sum(-1).max()) if selected.numel() else 0
        rows = selected.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :capacity]
        index = rows.unsqueeze(-1)
        packed = q.gather(2, index.expand(-1, -1, -1, q.shape[-1]))
        if whole is masks.causal:
            out = _packed_causal(packed, k, v, rows + (kv_len - q_len), scale, dropout)
        else:
            out = attention(
                packed, k, v, mask=_moved(whole, rows, shared, kv_len - q_len), q_offset=0, scale=scale, dropout=dropout
            )
        out = out * selected.gather(2, rows).unsqueeze(-1)  # rows that only pad the emptier heads
        blank = torch.zeros(*q.shape[:3], v.shape[-1], dtype=out.dtype, device=out.device)
        parts.append(blank.scatter(2, index.expand(-1, -1, -1, v.shape[-1]), out))
    return torch.cat(parts, 1)


def _packed_causal(q: Tensor, k: Tensor, v: Tensor, places: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Packed queries that stand at `places` (B, H, n), rising: heads become batch rows, each query an interval of keys."""
    if not q.numel():
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    batch, heads = q.shape[:2]
    q, k, v = (t.flatten(0, 1).unsqueeze(1) for t in (q, k, v))
    mask = masks.intervals(torch.zeros_like(places).flatten(0, 1), places.flatten(0, 1))
    out = attention(q, k, v, mask=mask, q_offset=0, scale=scale, dropout=dropout)
    return out.squeeze(1).unflatten(0, (batch, heads))


def _moved(mask: masks.Mask | None, rows: Tensor, shared: int, offset: int) -> masks.Mask | None:
    """`mask` for packed queries: row i of head h is row `rows[b, h, i]` of head `h + shared` of the whole."""
    if mask is None:
        return None

    def at_true_positions(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask(b, h + shared, rows[b, h, q_idx] + offset, kv_idx)

    return masks.from_function(at_true_positions)


def _probabilities(name: str, logits: Tensor | None, width: int) -> Tensor:
    require_tensor(name, logits, dims=3, floating=True)
    assert logits is not None
    require(logits.shape[-1] == width, name, f"shape {tuple(logits.shape)}", f"(B, N, {width})")
    return logits.to(accumulation_dtype(logits.dtype)).softmax(-1)


def _top(probs: Tensor, keep: int) -> Tensor:
    """Bool mask of the `keep` largest entries of the last axis."""
    indices = probs.topk(keep, dim=-1).indices
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, indices, True)


def _balance(probs: Tensor, selected: Tensor, released: bool) -> Tensor:
    tokens = max(probs.shape[0] * probs.shape[1], 1)
    load = selected.to(probs.dtype).sum((0, 1)) / tokens
    loss = (probs.sum((0, 1)) / tokens * load).sum()
    return loss * probs.shape[-1] if released else loss
