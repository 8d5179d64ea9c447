"""Combiner attention, Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost" (2021, NeurIPS, arXiv 2107.05768).

Code read for numbers: google-research/google-research `combiner/combiner/jax/model/layer.py` @ 4c42994 (causal) and
`combiner/combiner/tf/approx_attention.py` @ 5b09c22 (both directions), Apache-2.0.

Every query attends to all tokens: to some directly, to the others through summaries of spans, under one softmax. A span's key is the
largest (per channel) of its keys, its query the largest of its queries, its value what that query finds in the span. No parameters. (The
"axial_rowmajor" pattern has some: `regard.nn.CombinerAttention`.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import require, require_int, require_name, require_tensor
from . import masks
from .attention import attention
from .groups import group_attention
from .reference import merge_lse

PATTERNS = ("fixed", "logsparse", "axial_mixture")
SUMMARIES = ("max", "mean", "sum")
RUNNING = ("max", "sum")
Part = tuple[Tensor, Tensor]


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: str = "fixed",
    segment: int = 32,
    causal: bool = True,
    summary: str = "max",
    running: str | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    variant: str = "released",
    backend: str = "auto",
) -> Tensor:
    """Attention to every allowed token, directly or through the summary of a span that it lies in.

    Patterns (i a query, s = `segment`):
        "fixed": directly its own segment of s tokens; a summary for every earlier segment. N (s + N / s) scores.
        "logsparse": directly itself; a summary for each set bit of i, of the aligned block of 2^bit tokens before it. N log N scores;
            causal only, `segment` is not used.
        "axial_mixture": tokens as rows of s; directly its column and its row; a summary of what is above it in every other column, and
            of what is left and right of its column in every earlier row. N (3 N / s + 2 s) scores.

    A causal sequence may have any length: what is left over at the end is seen directly and is in no span.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D). v: (B, Hkv, N, Dv). H is a multiple of Hkv.
        causal: whether a token sees no later ones. Otherwise, for "axial_mixture", `segment` must divide N.
        summary: how the queries and keys of a segment are pooled in "fixed": "max", "mean" or "sum".
        running: how those of growing spans are pooled in "axial_mixture": "max", or "sum" as the authors' TensorFlow code does. Default:
            "max" if causal, else "sum", as released.
        scale: factor on q k^T, default D ** -0.5 (queries are scaled before they are pooled).
        dropout: on the weights inside summaries; the joint softmax has none, as in the authors' JAX code.
        variant: "released" (default) or "paper". They differ for "logsparse" where N - 1 is a power of two (the code has one level too
            few, so the last token sees nothing but itself), and where not causal: the code counts a token's own segment ("fixed") or
            the token itself ("axial_mixture") twice, and lets empty spans take part with score 0 and the mean of their row or column.
        backend: as in `regard.ops.attention`.

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError, TypeError: shapes or options that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=4, floating=True)
        require(x.shape[2] == q.shape[2], name, f"length {x.shape[2]}", f"q's length {q.shape[2]}")
    heads, kv_heads, length = q.shape[1], k.shape[1], q.shape[2]
    fits = kv_heads > 0 and heads % kv_heads == 0 and v.shape[1] == kv_heads
    require(fits, "k", f"{kv_heads} heads", f"a divisor of q's {heads} heads, and as many as v's")
    require_name("pattern", pattern, PATTERNS)
    require_name("summary", summary, SUMMARIES)
    require_name("variant", variant, ("released", "paper"))
    require_int("segment", segment, 1)
    running = ("max" if causal else "sum") if running is None else require_name("running", running, RUNNING)
    if length == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    released, options = variant == "released", {"scale": 1.0, "backend": backend}
    if pattern == "fixed":
        return _fixed(q, k, v, segment, causal, summary, dropout, released, options)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) if kv_heads < heads else x for x in (k, v))
    if pattern == "logsparse":
        require(causal, "causal", causal, "True for pattern='logsparse'")
        return _logsparse(q, k, v, dropout, released)
    if causal:
        return _mixture_causal(q, k, v, segment, running, dropout, options)
    require(length % segment == 0, "segment", segment, f"a divisor of the length, {length}, where not causal")
    return _mixture_bidirectional(q, k, v, segment, running, dropout, released, options)


def pool(x: Tensor, how: str) -> Tensor:
    """Over the tokens (the last axis but one) of each group."""
    if how == "max":
        return x.amax(-2)
    return x.mean(-2) if how == "mean" else x.sum(-2)


def span_summary(
    q: Tensor, k: Tensor, v: Tensor, *, summary: str = "max", dropout: float = 0.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """One key and one value for each span.

    Args:
        q: (B, H, G, n, D), already scaled. k: (B, Hkv, G, n, D). v: (B, Hkv, G, n, Dv). summary: "max", "mean" or "sum".
    Returns:
        keys (B, H, G, D): the pooled keys; values (B, H, G, Dv): attention of the pooled query over the span.
    """
    require_name("summary", summary, SUMMARIES)
    query = pool(q, summary)[..., None, :]
    values = group_attention(query, k, v, scale=options.pop("scale", 1.0), dropout=dropout, **options)
    keys = pool(k, summary).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return keys, values[..., 0, :]


def rows_of(x: Tensor, segment: int) -> Tensor:
    """(B, H, N, D) -> (B, H, rows, segment, D), zeros at the ragged end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % segment)).unflatten(2, (-1, segment))


def merged(parts: list[Part], length: int) -> Tensor:
    """The joint softmax of parts (B, H, rows, segment, Dv), (B, H, rows, segment), as (B, H, length, Dv)."""
    out, _ = merge_lse([out for out, _ in parts], [lse for _, lse in parts])
    return out.flatten(2, 3)[:, :, :length]


def in_columns(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Part:
    """Attention along columns: arguments and results (B, H, rows, segment, ·), mask (…, segment, rows, rows)."""
    out, lse = group_attention(*(x.transpose(2, 3) for x in (q, k, v)), mask=mask, return_lse=True, **options)
    return out.transpose(2, 3), lse.transpose(2, 3)


def _fixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: int,
    causal: bool,
    summary: str,
    dropout: float,
    released: bool,
    options: dict[str, Any],
) -> Tensor:
    length = q.shape[2]
    whole = length // segment
    own = [rows_of(x, segment) for x in (q, k, v)]
    if causal:
        mask: Any = masks.causal
    else:
        place = torch.arange(own[0].shape[2] * segment, device=q.device).view(1, 1, -1, 1, segment)
        mask = None if length % segment == 0 else place < length
    out, lse = group_attention(*own, mask=mask, return_lse=True, **options)
    parts = [(out.flatten(2, 3)[:, :, :length], lse.flatten(2, 3)[:, :, :length])]
    if whole:
        keys, values = span_summary(*(x[:, :, :whole] for x in own), summary=summary, dropout=dropout, **options)
        number = torch.arange(length, device=q.device) // segment
        if causal:
            others: Any = masks.intervals(torch.zeros_like(number), number - 1)
        else:
            others = None if released else masks.from_function(lambda b, h, i, j: j != i // segment)
        parts.append(attention(q, keys, values, mask=others, q_offset=0, return_lse=True, **options))
    return merge_lse([out for out, _ in parts], [lse for _, lse in parts])[0]


def _logsparse(q: Tensor, k: Tensor, v: Tensor, dropout: float, released: bool) -> Tensor:
    length = q.shape[2]
    levels = (length - 1).bit_length()
    if released:
        levels = math.ceil(math.log2(length - 1)) if length > 1 else 0
    scores, values = [(q * k).sum(-1)], []
    for level in range(levels):
        size = 1 << level
        # pairs of blocks: tokens of the second see the summary of the first
        pairs = [F.pad(x, (0, 0, 0, -length % (2 * size))).unflatten(2, (-1, 2, size)) for x in (q, k, v)]
        keys, found = span_summary(*(x[:, :, :, 0] for x in pairs), dropout=dropout)
        score = torch.einsum("bhmcd,bhmd->bhmc", pairs[0][:, :, :, 1], keys)
        score = torch.stack([torch.full_like(score, -torch.inf), score], dim=3)
        scores.append(score.flatten(2)[:, :, :length])
        values.append(found)
    weights = torch.stack(scores, dim=-1).softmax(-1)
    out = weights[..., :1] * v
    for level, found in enumerate(values):
        size = 1 << level
        weight = F.pad(weights[..., level + 1], (0, -length % (2 * size))).unflatten(2, (-1, 2, size))
        part = weight[:, :, :, 1, :, None] * found[:, :, :, None]
        out = out + torch.stack([torch.zeros_like(part), part], dim=3).flatten(2, 4)[:, :, :length]
    return out


def _running(x: Tensor, dim: int, how: str, reverse: bool = False) -> Tensor:
    """Running maximum or sum along `dim`, from the end if `reverse`."""
    x = x.flip(dim) if reverse else x
    x = x.cummax(dim).values if how == "max" else x.cumsum(dim)
    return x.flip(dim) if reverse else x


def _shifted(x: Tensor, dim: int, by: int) -> Tensor:
    """Moved by one place along `dim` (2 or 3), towards the end (by = 1) or the start (-1); zeros come in."""
    pad = [0, 0] * (x.dim() - 1 - dim) + ([1, 0] if by > 0 else [0, 1])
    return F.pad(x, pad).narrow(dim, 0 if by > 0 else 1, x.shape[dim])


def _mixture_causal(
    q: Tensor, k: Tensor, v: Tensor, segment: int, running: str, dropout: float, options: dict[str, Any]
) -> Tensor:
    length = q.shape[2]
    q, k, v = (rows_of(x, segment) for x in (q, k, v))
    rows = q.shape[2]
    row, column = (torch.arange(n, device=q.device) for n in (rows, segment))
    above = row[:, None] > row
    parts = [
        in_columns(q, k, v, above, **options),
        group_attention(q, k, v, mask=masks.causal, return_lse=True, **options),
    ]

    inner = options | {"dropout": dropout}
    # what stands above, in every other column
    values, _ = in_columns(_running(q, 2, running), k, v, row[:, None] >= row, **inner)
    keys = _shifted(_running(k, 2, running), 2, 1)
    others = (column[:, None] != column) & (row[:, None, None] > 0)
    parts.append(group_attention(q, keys, _shifted(values, 2, 1), mask=others, return_lse=True, **options))
    # what stands left and right, in every earlier row
    for side in (1, -1):
        reach = column[:, None] >= column if side > 0 else column[:, None] <= column
        query = _running(q, 3, running, reverse=side < 0)
        values = group_attention(query, k, v, mask=reach, **inner)
        keys = _shifted(_running(k, 3, running, reverse=side < 0), 3, side)
        some = column > 0 if side > 0 else column < segment - 1
        parts.append(in_columns(q, keys, _shifted(values, 3, side), above & some[:, None, None], **options))
    return merged(parts, length)


def _mixture_bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: int,
    running: str,
    dropout: float,
    released: bool,
    options: dict[str, Any],
) -> Tensor:
    length = q.shape[2]
    q, k, v = (rows_of(x, segment) for x in (q, k, v))
    rows = q.shape[2]
    row, column = (torch.arange(n, device=q.device) for n in (rows, segment))
    itself = row[:, None] != row
    parts = [
        group_attention(q, k, v, return_lse=True, **options),
        in_columns(q, k, v, None if released else itself, **options),
    ]
    inner = options | {"dropout": dropout}
    for dim, place in ((2, row), (3, column)):
        for side in (1, -1):
            before = place[:, None] > place if side > 0 else place[:, None] < place
            query, keys = (_shifted(_running(x, dim, running, reverse=side < 0), dim, side) for x in (q, k))
            if dim == 2:
                values, _ = in_columns(query, k, v, before, **inner)
            else:
                values = group_attention(query, k, v, mask=before, **inner)
            first = place == (0 if side > 0 else len(place) - 1)  # the span before it is empty
            empty = first[:, None] if dim == 2 else first
            if released:
                values = torch.where(empty[..., None], v.mean(dim, keepdim=True).to(values.dtype), values)
            # summaries of columns are seen along the row, those of rows along the column
            seen = None if released else ~empty
            if dim == 2:
                mask = None if seen is None else seen[:, None, :].expand(rows, segment, segment)
                parts.append(group_attention(q, keys, values, mask=mask, return_lse=True, **options))
            else:
                mask = None if seen is None else seen[:, None, None].expand(segment, rows, rows)
                parts.append(in_columns(q, keys, values, mask, **options))
    return merged(parts, length)
