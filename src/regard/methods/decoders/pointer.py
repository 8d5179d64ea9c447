"""The pointer-generator's parts as pure functions: copy gate, pointer distribution, mixture, and masks for doubtful source tokens.

From LargePiG (189, see `largepig`); the pointer-generator itself is See et al. 2017 (arXiv 1704.04368).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import bad_value, require
from .early_exit import js_divergence

__all__ = ["attended_source", "copy_gate", "mix_in_pointer", "pointer_distribution", "trusted_source"]


def copy_gate(
    mature: Tensor, early: Tensor, scale: float = 100.0, max_gate: float = 0.5, variant: str = "released"
) -> Tensor:
    """Probability of copying, (...): `scale` times the largest divergence of early from mature predictions, in [0, max_gate].

    Args:
        mature: logits (..., V). early: logits (L, ..., V). variant: which divergence, see `early_exit.js_divergence`.
    """
    return (scale * js_divergence(mature, early, variant).amax(0)).clamp(0.0, max_gate)


def pointer_distribution(
    attention: Tensor,
    source_ids: Tensor,
    vocab_size: int,
    source: Tensor | None = None,
    special: Tensor | None = None,
    normalize: bool | str = True,
) -> Tensor:
    """Attention on source tokens, gathered by token: a distribution over the vocabulary.

    Args:
        attention: weights of one query, head mean, (B, S), or (B, T, S) for T queries of the same source.
        source_ids: token ids (B, S).
        source: bool (B, S), which of them may be copied; None = all. special: bool (B, S), tokens that get no weight.
        normalize: True: after special tokens lost their weight, add 1e-7 to every source weight and divide by the sum, so that the
            result sums to 1 (authors' greedy decoding and scoring). "first": the same before (their sampling). False: neither,
            and the result sums to the attention that the source gets.

    Returns:
        float32 (B, V) or (B, T, V).
    """
    require(normalize in (True, False, "first"), "normalize", normalize, "True, False or 'first'")
    inside = torch.ones_like(source_ids, dtype=torch.bool) if source is None else source
    outside = torch.zeros_like(inside) if special is None else special
    weights = attention.float()
    if weights.dim() == 3:
        inside, outside, source_ids = inside[:, None], outside[:, None], source_ids[:, None].expand(weights.shape)
    weights = weights * inside
    if normalize == "first":
        weights = _normalized(weights, inside) * ~outside
    else:
        weights = weights * ~outside
        weights = _normalized(weights, inside) if normalize else weights
    out = weights.new_zeros(*weights.shape[:-1], vocab_size)
    return out.scatter_add_(-1, source_ids, weights)


def _normalized(weights: Tensor, inside: Tensor) -> Tensor:
    weights = weights + 1e-7 * inside
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def mix_in_pointer(scores: Tensor, pointer: Tensor, gate: Tensor) -> Tensor:
    """log((1 - gate) softmax(scores) + gate pointer), (..., V); rows with gate 0 are returned as they came.

    Args:
        scores: logits or log-probabilities (..., V). pointer: probabilities (..., V). gate: (...), in [0, 1].
    """
    gate = gate[..., None]
    mixed = ((1.0 - gate) * scores.float().softmax(-1) + gate * pointer).log()
    return torch.where(gate > 0, mixed.to(scores.dtype), scores)


def trusted_source(
    logits: Tensor,
    ids: Tensor,
    attention: Tensor,
    *,
    entropy: bool = False,
    history: float = 0.5,
    threshold: float = 0.5,
    skip: int = 6,
    share: float | None = 0.1,
    eps: float = 1e-7,
) -> Tensor:
    """Source tokens that the model does not find surprising, bool (B, S): a `source` for LargePiG that leaves doubtful ones out.

    A token's doubt is its loss (plus 2^entropy of the prediction), mixed with the doubt of the tokens that were attended to when
    it was predicted. Off in the authors' scripts. The defaults are those of their scoring (`calculate_hallucination_uncen_mask`);
    their decoding (`calculate_hallucination_mask`) has history=alpha, threshold=1, skip=0, share=None, eps=1e-10.

    Args:
        logits: of the source tokens, (B, S, V). ids: (B, S). attention: head mean, (B, S, S), of the source on the source.
        entropy: add 2 to the power of the prediction's entropy in bits, and V to the limit.
        history: share of a doubt that comes from attended tokens. threshold: factor on the limit, log V nats.
        skip: so many tokens after the first are trusted and take no part.
        share: distrust at most about this share of the tokens, those above the limit with the largest doubt. None: all above it.
        eps: added to probabilities before the logarithm.
    """
    require(
        logits.dim() == 3 and logits.shape[:2] == ids.shape, "logits", tuple(logits.shape), "(B, S, V) like ids (B, S)"
    )
    batch, length, vocab = logits.shape
    require(
        attention.shape == (batch, length, length),
        "attention",
        tuple(attention.shape),
        f"(B, S, S) = {(batch, length, length)}",
    )
    first = 1 + skip
    keep = torch.ones(batch, length, dtype=torch.bool, device=ids.device)
    if length <= first:
        return keep
    log_probs = logits[:, skip:-1].float().log_softmax(-1)
    probs = log_probs.exp()
    doubt = -(probs.gather(-1, ids[:, first:, None])[..., 0] + eps).log()
    limit = math.log(vocab)
    if entropy:
        bits = -torch.where(probs > 0, probs * log_probs / math.log(2.0), 0.0).sum(-1)
        doubt, limit = doubt + torch.exp2(bits), limit + vocab
    weights = attention[:, skip:-1, skip:-1].float()
    inherited = (weights @ doubt[..., None])[..., 0] + doubt * (1.0 - weights.sum(-1))
    doubt = history * inherited + (1.0 - history) * doubt
    if share is None:
        keep[:, first:] = doubt <= threshold * limit
    else:
        rank = int(doubt.shape[-1] * share)
        cut = doubt.sort(descending=True).values[:, rank, None].clamp(min=threshold * limit)
        keep[:, first:] = doubt < cut
    return keep


def attended_source(attention: Tensor, share: float = 0.1, part: float = 0.5) -> Tensor:
    """Source tokens that later source tokens look at, bool (B, S): the `share` least looked-at of the first `part` are left out.

    Args:
        attention: head mean, (B, S, S), of the source on the source. (`calculate_hallucination_attention_mask` of the authors.)
    """
    require(attention.dim() == 3, "attention", f"shape {tuple(attention.shape)}", "(B, S, S)")
    if not 0.0 <= share < 1.0:
        raise bad_value("share", share, "a fraction in [0, 1)")
    length = int(attention.shape[-1] * part)
    keep = torch.ones(attention.shape[:2], dtype=torch.bool, device=attention.device)
    if length == 0 or length == attention.shape[1]:
        return keep
    looked_at = attention[:, length:, :length].mean(1)
    cut = looked_at.sort().values[:, int(length * share), None]
    keep[:, :length] = looked_at > cut
    return keep
