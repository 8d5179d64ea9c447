"""LongHeads: chunks of a long text chosen by each query and head, and put side by side so that no position is beyond training.

Lu et al. 2024 (EMNLP Findings), arXiv 2402.10685. Numbers from LuLuLuyi/LongHeads, `modeling_llama.py:LlamaAttention` (no licence,
read only). Keys are kept as turned inside their chunk, positions 0 to chunk - 1; a chunk that stands at rank s of a query's list is
moved to s * chunk by turning the query back by as much, which is the same score. So no key is turned twice.

Differences: kv heads may be shared by query heads (a chunk's feature is then the mean over the group); while fewer chunks than fit are
there, all are attended (the release takes chunks of the future then).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor
from ..attention import attention
from ..reference import softmax_with_lse

Rotate = Callable[[Tensor, Tensor], Tensor]
"""`rotate(x (B, H, n, D), positions int64 (B, n))`: the rotary embedding of unrotated vectors."""

_TILE = 64  # queries that meet one chunk in one matrix product
_SCORES = 1 << 24  # scores made at once


def chunk_features(q: Tensor, k: Tensor, v: Tensor, chunk: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """What a chunk is about: one key for each chunk of tokens, and the query that made it.

    Inside a chunk everybody attends to everybody; the mean of the outputs is the chunk's own query, and what this query gathers of the
    chunk's keys is its feature.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D), both turned at positions 0 ... chunk - 1 inside their chunk. v: (B, Hkv, N, D).
        chunk: tokens of a chunk; only complete chunks get features. scale: default D ** -0.5.
    Returns:
        features (B, Hkv, N // chunk, D) and chunk queries, likewise.
    """
    require_int("chunk", chunk, 1)
    require(
        v.shape[-1] == k.shape[-1], "v", f"head_dim {v.shape[-1]}", f"k's, {k.shape[-1]}: outputs are used as queries"
    )
    batch, heads, length, _ = q.shape
    kv_heads, count = k.shape[1], length // chunk

    def chunks(x: Tensor) -> Tensor:
        x = x[:, :, : count * chunk].unflatten(2, (count, chunk))
        return x.transpose(1, 2).flatten(0, 1)

    if count == 0:
        return k[:, :, :0], k[:, :, :0]
    q, k, v = chunks(q), chunks(k), chunks(v)
    query = attention(q, k, v, scale=scale).mean(2).unflatten(1, (kv_heads, heads // kv_heads)).mean(2, keepdim=True)
    feature = attention(query, k, k, scale=scale)
    return tuple(x.unflatten(0, (batch, count))[:, :, :, 0].transpose(1, 2) for x in (feature, query))  # type: ignore[return-value]


def choose_chunks(scores: Tensor, last: Tensor, forced: Tensor, count: Tensor) -> Tensor:
    """The chunks that are attended to, ascending.

    Args:
        scores: (..., G), of all chunks. last: (...), the last chunk that may be chosen. forced: bool, like scores, chosen in any case.
        count: (...), how many are chosen, at most last + 1 (else all up to last are).
    Returns:
        int64 (..., K) with K the largest count; -1 behind the shorter lists.
    """
    number = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(number > last[..., None], -torch.inf)
    count = torch.minimum(count, last + 1).clamp(min=0)
    width = int(count.max()) if count.numel() else 0
    chosen = scores.topk(width, dim=-1).indices
    chosen = torch.where(torch.arange(width, device=scores.device) < count[..., None], chosen, scores.shape[-1])
    chosen = chosen.sort(-1).values
    return chosen.masked_fill(chosen == scores.shape[-1], -1)


def prompt_chunks(scores: Tensor, position: Tensor, chunk: int, count: int, start: int) -> Tensor:
    """Chunks of queries at `position` (n,), from scores (H, n, G): the first, the one before the own, the own, and the best of the rest.

    Queries before `start` take all chunks up to their own.
    """
    own = position // chunk
    number = torch.arange(scores.shape[-1], device=scores.device)
    forced = (number == 0) | (number == own[:, None]) | (number == own[:, None] - 1)
    many = torch.where(position < start, own + 1, count)
    shape = scores.shape[:-1]
    return choose_chunks(scores, own.expand(shape), forced.expand(scores.shape), many.expand(shape))


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    position: Tensor,
    chunk: int,
    rotate: Rotate,
    include: Tensor,
    scale: float,
    score_mod: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention of one head over each query's list of chunks, put side by side.

    Args:
        q: (n, D), not turned. k: (M, D), turned inside chunks. v: (M, Dv); M a multiple of `chunk`.
        chosen: (n, K), ascending, -1 last; the last chunk of a list is the query's own.
        position: (n,), of the queries. include: bool (n,), whether a query sees its own key.
    Returns:
        (n, Dv).
    """
    count = (chosen >= 0).sum(-1)
    row, rank = (chosen >= 0).nonzero(as_tuple=True)
    number = chosen[row, rank]
    inside = position % chunk
    turn = (count[row] - 1 - rank) * chunk + inside[row]  # how far the query stands behind the start of this chunk
    visible = torch.where(rank == count[row] - 1, inside[row] + include[row].long(), chunk)
    # pairs of a query and a chunk, those of one chunk side by side, in tiles of equal size
    order = torch.argsort(number, stable=True)
    per_chunk = torch.bincount(number, minlength=k.shape[0] // chunk)
    tiles = -(-per_chunk // _TILE)
    first_tile = tiles.cumsum(0) - tiles
    nth = torch.arange(len(order), device=q.device) - (per_chunk.cumsum(0) - per_chunk)[number[order]]
    slot = (first_tile[number[order]] + nth // _TILE) * _TILE + nth % _TILE
    pair = torch.full((int(tiles.sum()) * _TILE,), -1, dtype=torch.long, device=q.device)
    pair[slot] = order
    chunk_of_tile = torch.repeat_interleave(torch.arange(len(tiles), device=q.device), tiles)
    keys, values = k.unflatten(0, (-1, chunk)), v.unflatten(0, (-1, chunk))
    out = q.new_zeros(len(row), v.shape[-1])
    lse = torch.full(
        (len(row),), -torch.inf, dtype=torch.float32 if q.dtype != torch.float64 else q.dtype, device=q.device
    )
    at_once = max(1, _SCORES // (_TILE * chunk))
    for begin in range(0, len(chunk_of_tile), at_once):
        mine = pair[begin * _TILE : (begin + at_once) * _TILE]
        which = chunk_of_tile[begin : begin + at_once]
        some = mine.clamp(min=0)
        query = rotate(q[row[some]][None, None], turn[some][None])[0, 0].unflatten(0, (-1, _TILE))
        sees = torch.arange(chunk, device=q.device) < visible[some][:, None]
        part, top = attention(
            query[:, None], keys[which][:, None], values[which][:, None],
            mask=sees.view(len(which), 1, _TILE, chunk), score_mod=score_mod, scale=scale, return_lse=True,
        )  # fmt: skip
        real = mine >= 0
        out[mine[real]] = part[:, 0].flatten(0, 1)[real]
        lse[mine[real]] = top[:, 0].flatten()[real].to(lse.dtype)
    gathered = torch.full((*chosen.shape,), -torch.inf, dtype=lse.dtype, device=q.device)
    gathered[row, rank] = lse
    weight = softmax_with_lse(gathered)[0][row, rank]
    total = torch.zeros(len(q), v.shape[-1], dtype=lse.dtype, device=q.device)
    return total.index_add_(0, row, weight[:, None] * out.to(lse.dtype)).to(q.dtype)


def chunk_select_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor | None = None,
    *,
    rotate: Rotate,
    chunk: int = 256,
    budget: int = 4096,
    start: int | None = None,
    include_self: bool = True,
    scale: float | None = None,
) -> Tensor:
    """LongHeads over a whole text: each query attends to at most `budget` tokens, at positions below `budget`.

    Queries before `start` attend to everything before them, as usual. A later one, in chunk c, takes chunks 0, c - 1 and c and those
    with the highest features of the rest, `budget // chunk` in all, keeps their order, and closes the gaps between them.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D), both before the rotary embedding. v: (B, Hkv, N, D).
        features: (B, Hkv, >= N // chunk, D), see `chunk_features`; None: made here.
        rotate: the rotary embedding, `rotate(x (B, H, n, D), positions (B, n))`.
        chunk: tokens of a chunk. budget: tokens attended to, at least 3 chunks. start: None = budget.
        include_self: whether a query from `start` on sees its own key. The released prefill does not let it.
        scale: default D ** -0.5.
    Returns:
        (B, H, N, D). With `budget >= N` this is causal attention.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
    require_int("chunk", chunk, 1)
    require_int("budget", budget, 3 * chunk)
    batch, _, length, dim = q.shape
    require(k.shape[2] == length, "k", f"length {k.shape[2]}", f"q's, {length}")
    position = torch.arange(length, device=q.device)
    local = (position % chunk).expand(batch, -1)
    turned = rotate(k, local)
    if features is None:
        features = chunk_features(rotate(q, local), turned, v, chunk, scale)[0]
    scale = dim**-0.5 if scale is None else scale
    start = budget if start is None else require_int("start", start, 0)
    rows = [
        attend_prompt(q[b], turned[b], v[b], features[b], 0, chunk, budget // chunk, start, include_self, rotate, scale)
        for b in range(batch)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(q)


def attend_prompt(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, begin: int,
    chunk: int, count: int, start: int, include_self: bool, rotate: Rotate, scale: float,
    score_mod: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """One text's queries from position `begin` on.

    q (H, n, D), not turned; k (Hkv, begin + n, D), turned inside chunks; features (Hkv, G, D). Gives (H, n, Dv).
    """
    heads, rows, _ = q.shape
    group, total = heads // k.shape[0], k.shape[1]
    if rows == 0:
        return q.new_zeros(heads, 0, v.shape[-1])
    position = torch.arange(begin, begin + rows, device=q.device)
    missing = -total % chunk
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (k, v))
    known = min(features.shape[1], k.shape[1] // chunk)
    out = q.new_empty(heads, rows, v.shape[-1])
    include = (position < start) | include_self
    for h in range(heads):
        scores = torch.zeros(rows, k.shape[1] // chunk, dtype=q.dtype, device=q.device)
        scores[:, :known] = q[h] @ features[h // group, :known].to(q).T
        chosen = prompt_chunks(scores[None].float(), position, chunk, count, start)[0]
        out[h] = attend_chunks(
            q[h], k[h // group], v[h // group], chosen, position, chunk, rotate, include, scale, score_mod
        )
    return out
