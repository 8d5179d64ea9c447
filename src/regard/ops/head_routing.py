"""Routing tokens to attention heads: which heads a token uses, and with what weight.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842). Numbers read from SkyworkAI/MoH
(`MoH-DiT/models.py`, `MoH-ViT/attention.py`, `MoH-LLaMA3/Inference_code/modeling_llama.py`). The first `shared` heads serve every
token; of the other ones each token gets its `active - shared` best.

Released code and paper differ in the weights: the paper multiplies plain softmax probabilities, the released code renormalises
the kept ones and rescales each group by its size, so that the gates of a token average to about one per active head. Both are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from .attention import attention
from .masks import Mask, as_mask, from_function
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
        shared_logits: (B, N, shared) scores of the shared heads; may be None when `shared <= 1`.
        group_logits: (B, N, 2) scores of the two groups, shared then routed; needed when both groups are in use.
        shared: number of heads that serve every token, the first ones.
        active: heads in use per token, the shared ones included.
        variant: "released" (default): `2 softmax(group)`, `shared * softmax(shared)`, and routed probabilities renormalised over
            the kept ones times their number; with equal logits and all heads active every gate is 1. "paper": the three plain
            softmaxes, so the gates of a token sum to at most 1.

    Returns:
        `HeadRouting`; the balance loss is E * sum_e(mean probability_e * share of tokens_e) in the released variant (1 when
        perfectly balanced and one head is kept), without the factor E in the paper's.

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
        if shared == 1 and shared_logits is None:
            some = routed_logits if routed_logits is not None else group_logits
            if some is None:
                raise bad_value("shared_logits", None, "a (B, N, 1) tensor when no other logits tell the shape")
            shared_logits = some.new_zeros(*some.shape[:2], 1)
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
    some = parts[0]
    source = routed_logits if routed_logits is not None else shared_logits
    dtype = source.dtype if source is not None else some.dtype
    return HeadRouting(torch.cat(parts, -1).transpose(1, 2).to(dtype), torch.cat(chosen, -1).transpose(1, 2), loss)


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
    mask: Mask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention for the marked (head, token) pairs only; the other rows of the output are zero.

    The marked queries of each head are packed together (padded to the fullest head), so the cost is that of
    `max_h(selected tokens of head h)` queries per head instead of N. Exact, differentiable.

    Args:
        q: (B, H, N, D). k: (B, H, M, D). v: (B, H, M, Dv). selected: (B, H, N) bool.
        mask: a `regard.masks` mask, read at the queries' true positions (the last row is the last key's). scale, dropout: as in
            `regard.ops.attention`.
    """
    require_tensor("q", q, dims=4, floating=True)
    require(
        isinstance(selected, Tensor) and selected.dtype == torch.bool and selected.shape == q.shape[:3],
        "selected",
        tuple(selected.shape) if isinstance(selected, Tensor) else selected,
        f"a bool tensor of shape {tuple(q.shape[:3])}",
    )
    capacity = int(selected.sum(-1).max()) if selected.numel() else 0
    rows = selected.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :capacity]
    if mask is not None:
        inner, offset = as_mask(mask), k.shape[2] - q.shape[2]

        def at_true_positions(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return inner(b, h, rows[b, h, q_idx] + offset, kv_idx)

        mask = from_function(at_true_positions)
    packed = q.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1]))
    out = attention(packed, k, v, mask=mask, q_offset=0, scale=scale, dropout=dropout)
    out = out * selected.gather(2, rows).unsqueeze(-1)  # padding rows of the emptier heads
    index = rows.unsqueeze(-1).expand(-1, -1, -1, out.shape[-1])
    return torch.zeros(*q.shape[:3], v.shape[-1], dtype=out.dtype, device=out.device).scatter(2, index, out)


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
    load = selected.to(probs.dtype).mean((0, 1))
    loss = (probs.mean((0, 1)) * load).sum()
    return loss * probs.shape[-1] if released else loss
