"""Rules on the scores of one decoded query: which keys it may look at, the same ones for all heads of a group.

Kinetics, Sadhukhan et al. (2025, arXiv 2506.05333), code read for numbers: Infini-AI-Lab/Kinetics @ af7fa57,
`LiteSys/litesys/attention/sparsity_utils.py` (no licence). The first `sink` keys and the last `recent` ones are always kept; between them a
rule chooses by the scores' mean over the query heads of a kv head. A sequence that is not longer than what would be kept is left whole.

Every rule takes raw scores (B, H, S) of one query (before the softmax) and gives a bool tensor (B, Hkv, S), True for kept keys; what lies
beyond a row's `lengths` is never kept. `apply_rule` puts it on the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor
from .blocks import share_scores


def grouped_topk(
    scores: Tensor, topk: int, *, num_kv_heads: int, recent: int, sink: int = 4, lengths: Tensor | None = None
) -> Tensor:
    """The `topk` keys between sinks and recent ones whose mean score is highest.

    Args:
        scores: (B, H, S). topk: keys chosen. recent, sink: keys at the end and at the start that are kept on top.
        lengths: int64 (B,), keys of each row; default S.
    """
    require_int("topk", topk, 0)
    mean, lengths, position = _frame(scores, num_kv_heads, recent, sink, lengths)
    inner = _between(position, sink, lengths - recent)
    chosen = _best(mean.masked_fill(~inner, -torch.inf), topk) & inner
    return _kept(chosen, inner, position, lengths, lengths > sink + topk + recent)


def grouped_block_topk(
    scores: Tensor,
    topk: int,
    *,
    num_kv_heads: int,
    recent: int,
    block_size: int = 16,
    sink: int = 4,
    lengths: Tensor | None = None,
) -> Tensor:
    """The `topk` blocks whose scores have the highest mean. Blocks begin after the sinks; keys that fill no block are recent.

    Arguments as in `grouped_topk`; a sequence is left whole unless it is longer than sinks, chosen and recent keys, rounded up to blocks.
    """
    require_int("topk", topk, 0)
    require_int("block_size", block_size, 1)
    mean, lengths, position = _frame(scores, num_kv_heads, recent, sink, lengths)
    count = ((lengths - recent - sink) // block_size).clamp(min=0)
    inner = _between(position, sink, sink + count * block_size)
    blocks = mean.masked_fill(~inner, 0.0)[..., sink:]
    blocks = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    exists = torch.arange(blocks.shape[-2], device=scores.device) < count[:, None, None]
    best = _best(blocks.mean(-1).masked_fill(~exists, -torch.inf), topk) & exists
    chosen = torch.zeros_like(inner).expand_as(mean).clone()
    chosen[..., sink:] = best.repeat_interleave(block_size, -1)[..., : mean.shape[-1] - sink]
    whole = -(-(sink + recent + topk * block_size) // block_size) * block_size
    return _kept(chosen & inner, inner, position, lengths, lengths > whole)


def strided_block_topk(
    scores: Tensor,
    topk: int,
    *,
    num_kv_heads: int,
    recent: int,
    block_size: int = 16,
    stride: int = 8,
    sink: int = 4,
    lengths: Tensor | None = None,
) -> Tensor:
    """Blocks that begin at every `stride`-th key after the sinks, so that they overlap: of the keys in the best `2 topk` blocks,
    the first `topk * block_size`.

    Arguments as in `grouped_block_topk`. Keys after the last whole block are dropped unless they are recent, as released.
    """
    require_int("topk", topk, 0)
    require_int("block_size", block_size, 1)
    require_int("stride", stride, 1)
    mean, lengths, position = _frame(scores, num_kv_heads, recent, sink, lengths)
    size = (lengths - recent - sink).clamp(min=0)
    inner = _between(position, sink, lengths - recent)
    room = max(0, scores.shape[-1] - sink)
    if room < block_size:
        return (position < lengths[:, None, None]).expand_as(mean).clone()
    keys = mean[..., sink:].masked_fill(~inner[..., sink:], 0.0)
    windows = keys.unfold(-1, block_size, stride).mean(-1)
    number = torch.arange(windows.shape[-1], device=scores.device)
    exists = number < ((size - block_size) // stride + 1)[:, None, None]
    best = _best(windows.masked_fill(~exists, -torch.inf), 2 * topk) & exists
    begins = torch.zeros_like(keys, dtype=torch.int32)
    begins[..., : windows.shape[-1] * stride : stride] = best.int()
    reach = torch.nn.functional.pad(begins, (block_size - 1, 0)).cumsum(-1)
    covered = (reach[..., block_size - 1 :] - torch.nn.functional.pad(reach, (1, 0))[..., :room]) > 0
    first = covered & (covered.int().cumsum(-1) <= topk * block_size)
    chosen = torch.nn.functional.pad(first, (sink, 0))
    return _kept(chosen, inner, position, lengths, size >= block_size)


def recent_only(
    scores: Tensor, *, num_kv_heads: int, recent: int, sink: int = 4, lengths: Tensor | None = None
) -> Tensor:
    """Sinks and recent keys alone."""
    mean, lengths, position = _frame(scores, num_kv_heads, recent, sink, lengths)
    inner = _between(position, sink, lengths - recent)
    return _kept(torch.zeros_like(mean, dtype=torch.bool), inner, position, lengths, lengths > sink + recent)


def random_select(
    scores: Tensor,
    samples: int,
    *,
    num_kv_heads: int,
    recent: int,
    sink: int = 4,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`samples` draws with replacement between sinks and recent keys: at most that many keys. Arguments as in `grouped_topk`."""
    require_int("samples", samples, 0)
    mean, lengths, position = _frame(scores, num_kv_heads, recent, sink, lengths)
    inner = _between(position, sink, lengths - recent)
    chosen = torch.zeros_like(mean, dtype=torch.bool)
    for row, length in enumerate(
        lengths.tolist()
    ):  # the authors draw row by row too, so that equal seeds draw the same
        if length > samples + sink + recent:
            shape = (num_kv_heads, samples)
            drawn = torch.randint(0, length - sink - recent, shape, device=scores.device, generator=generator)
            chosen[row].scatter_(-1, drawn + sink, True)
    return _kept(chosen, inner, position, lengths, lengths > samples + sink + recent)


def importance_shift(samples: int, *, recent: int, sink: int, lengths: Tensor) -> Tensor:
    """What `random_select` as an estimate of the whole adds to the scores of the keys it kept between sinks and recent ones:
    log of how many there were over how many were drawn, float32 (B,), 0 where nothing was left out."""
    between = (lengths - sink - recent).clamp(min=1).float()
    shift = between.log() - math.log(max(1, samples))
    return torch.where(lengths > samples + sink + recent, shift, torch.zeros_like(shift))


def random_sample(
    scores: Tensor,
    samples: int,
    *,
    num_kv_heads: int,
    recent: int,
    sink: int = 4,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The scores (B, H, S) after `random_select`, the drawn ones shifted by `importance_shift`, others at -inf."""
    options = {"num_kv_heads": num_kv_heads, "recent": recent, "sink": sink}
    kept = random_select(scores, samples, **options, lengths=lengths, generator=generator)
    _, lengths, position = _frame(scores, num_kv_heads, recent, sink, lengths)
    shift = importance_shift(samples, recent=recent, sink=sink, lengths=lengths)[:, None, None].to(scores.dtype)
    inner = _between(position, sink, lengths - recent)
    return apply_rule(torch.where(inner, scores + shift, scores), kept)


def oracle_sample(
    weights: Tensor,
    samples: int,
    *,
    recent: int,
    sink: int = 4,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights (B, H, S) estimated by drawing: of softmax weights, `samples + sink + recent` keys without replacement, in proportion to
    them, each given the weight 1 / that many. Every head draws for itself; a row that is not longer keeps its weights.
    """
    require_int("samples", samples, 0)
    budget = samples + sink + recent
    require(budget > 0, "samples, sink, recent", budget, "at least one key in all")
    _, lengths, _ = _frame(weights, weights.shape[1], recent, sink, lengths)
    out = weights.clone()
    for row, length in enumerate(lengths.tolist()):  # row by row like the authors, so that equal seeds draw the same
        if length > budget:
            drawn = torch.multinomial(weights[row, :, :length], budget, generator=generator)
            out[row, :, :length] = torch.zeros_like(out[row, :, :length]).scatter(-1, drawn, 1.0 / budget)
    return out


def apply_rule(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores (B, H, S) with -inf for keys that are not kept; `kept` (B, Hkv, S)."""
    require_tensor("kept", kept, dims=3)
    whole = kept.repeat_interleave(scores.shape[1] // kept.shape[1], 1)
    return scores.masked_fill(~whole, -torch.inf)


def _frame(
    scores: Tensor, num_kv_heads: int, recent: int, sink: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Group means (B, Hkv, S), lengths (B,), key positions (S,)."""
    require_tensor("scores", scores, dims=3, floating=True)
    require_int("recent", recent, 0)
    require_int("sink", sink, 0)
    batch, _, keys = scores.shape
    if lengths is None:
        lengths = torch.full((batch,), keys, device=scores.device)
    require_tensor("lengths", lengths, dims=1)
    require(lengths.shape[0] == batch, "lengths", f"{lengths.shape[0]} rows", f"{batch} rows")
    lengths = lengths.to(scores.device).long()
    if batch:
        require(
            int(lengths.min()) >= 0 and int(lengths.max()) <= keys, "lengths", lengths.tolist(), f"0 to {keys} keys"
        )
    mean = share_scores(scores[:, :, None], require_int("num_kv_heads", num_kv_heads, 1))[:, :, 0]
    return mean, lengths, torch.arange(keys, device=scores.device)


def _between(position: Tensor, low: int, high: Tensor) -> Tensor:
    """(B, 1, S): low <= position < high."""
    return (position >= low) & (position < high[:, None, None])


def _best(values: Tensor, count: int) -> Tensor:
    """Bool like `values`: the `count` largest along the last axis."""
    count = min(count, values.shape[-1])
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, values.topk(count, dim=-1).indices, True)


def _kept(chosen: Tensor, inner: Tensor, position: Tensor, lengths: Tensor, sparse: Tensor) -> Tensor:
    """Chosen keys and all outside of `inner`; everything in rows that are not `sparse`; never beyond a row's length."""
    return (chosen | ~inner | ~sparse[:, None, None]) & (position < lengths[:, None, None])
