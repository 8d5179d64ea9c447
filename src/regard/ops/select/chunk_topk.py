"""Chunk top-k: score chunks of keys, hand each key its chunk's score, give every query block a budget of keys.

DHSA, Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (2025, arXiv 2510.24606).
Code read for numbers (no licence): xiongsiheng/DHSA @ cc8e9c7, `legacy/utils/helper.py` (`_obtain_dhsa_mask`, `dhsa_sdpa`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_name, require_tensor, resolve_budget
from ..reference import accumulation_dtype
from ..selection import Selection
from .summaries import block_lengths, check_boundaries, chunk_means, chunk_of, split_blocks

POOLINGS = ("sqrt", "mean", "max")


def chunk_scores(q: Tensor, k: Tensor, boundaries: Tensor, block_q: int = 128, pooling: str = "sqrt") -> Tensor:
    """How much each query block wants each chunk: the dot product of their summaries, without 1/sqrt(D).

    Heads are averaged first. A query block is the mean over `block_q` rows (rows missing in the last block count as zeros), a
    chunk the mean of its keys; with `pooling="sqrt"` each is multiplied by the square root of its real length, so that long
    chunks are not drowned by their mean; with "max" queries are pooled by their element-wise maximum.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). boundaries: (C + 1,) or (B|1, C + 1) ascending cuts, 0 first and M last.
    Returns:
        (B, ceil(N / block_q), C), float32 for half types. The order of heads does not matter.
    """
    _check(q, k)
    require_name("pooling", pooling, POOLINGS)
    require_int("block_q", block_q, 1)
    boundaries = check_boundaries(boundaries, k.shape[0], k.shape[2]).to(k.device)
    dtype = accumulation_dtype(q.dtype)
    blocks = split_blocks(q.mean(dim=1, dtype=dtype), block_q)  # (B, nQ, block_q, D)
    queries = blocks.amax(2) if pooling == "max" else blocks.mean(2)
    chunks, lengths = chunk_means(k.mean(dim=1, dtype=dtype), boundaries)
    if pooling == "sqrt":
        queries = queries * block_lengths(q.shape[2], block_q, q.device)[:, None].to(dtype).sqrt()
        chunks = chunks * lengths.clamp(min=1)[..., None].sqrt()
    return queries @ chunks.transpose(1, 2)


def chunk_topk_keys(
    q: Tensor,
    k: Tensor,
    boundaries: Tensor,
    budget: int | float = 1024,
    block_q: int = 128,
    local: int = 128,
    sink: int = 128,
    *,
    pooling: str = "sqrt",
    window: int | None = None,
    q_offset: int | None = None,
    variant: str = "released",
) -> Tensor:
    """The keys that DHSA gathers for each query block, as a list: arguments as in `chunk_topk`.

    Returns:
        int64 (B, ceil(N / block_q), T). In variant "released" exactly as the authors' code lists them: unused places hold the last
        key, M - 1, and a key can stand there several times (see `chunk_topk`); in variant "paper" unused places hold -1.
    """
    _check(q, k)
    for name, value in (("local", local), ("sink", sink)):
        require_int(name, value, 0)
    require_name("variant", variant, ("released", "paper"))
    batch, _, rows, _ = q.shape
    length = k.shape[2]
    offset = length - rows if q_offset is None else require_int("q_offset", q_offset, 0)
    require(0 <= offset <= length - rows, "q_offset", offset, f"0 to M - N = {length - rows}")
    tokens = min(resolve_budget("budget", budget, length), length)
    if window is not None:
        tokens = min(tokens, require_int("window", window, 1))
    with torch.no_grad():
        scores = chunk_scores(q, k, boundaries, block_q, pooling)
        owner = chunk_of(check_boundaries(boundaries, batch, length).to(k.device), length)
        paper = variant == "paper"
        lists = []
        for i in range(scores.shape[1]):
            start = offset + i * block_q
            stop = start + block_q  # may lie beyond the last row: the last block is treated as if it were whole
            end, low = min(stop, length), 0 if window is None else min(max(0, stop - window), length)
            by_key = scores[:, i].gather(1, owner)
            globals_from = 0 if window is None else max(0, start - window)
            pick = _paper_list if paper else _released_list
            lists.append(pick(by_key, low, end, tokens, local, sink, globals_from))
    if not lists:
        return torch.zeros((batch, 0, tokens), dtype=torch.long, device=q.device)
    width = max(x.shape[1] for x in lists)
    return torch.stack([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=-1) for x in lists], dim=1)


def chunk_topk(
    q: Tensor,
    k: Tensor,
    boundaries: Tensor,
    budget: int | float = 1024,
    block_q: int = 128,
    local: int = 128,
    sink: int = 128,
    *,
    pooling: str = "sqrt",
    window: int | None = None,
    q_offset: int | None = None,
    variant: str = "released",
) -> Selection:
    """DHSA's selection: for each query block, shared by all heads, `budget` keys from the chunks with the highest scores.

    Every key before the block's end inherits the score of its chunk (`chunk_scores`). The last `local` keys before the block's end
    are always taken, the rest of the budget by score (ties inside a chunk in the order of `torch.topk`).

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D): keys that exist, no padding.
        boundaries: (C + 1,) or (B|1, C + 1) ascending cuts, 0 first and M last (`even_boundaries`, `pick_boundaries`).
        budget: keys a query block, int tokens or float in (0, 1], a fraction of M.
        block_q: rows a query block. local: keys before its end that are always taken. sink: keys at the start likewise.
        pooling: "sqrt" (the paper's length normalisation), "mean" or "max", see `chunk_scores`.
        window: for layers with a sliding window: only keys from `block end - window` on compete, the budget is at most `window`,
            and the "start" that `sink` means is `block start - window`.
        q_offset: position of query row 0, default M - N.
        variant: "released" or "paper". In the paper the `sink` keys come on top of the budget. The released code writes them
            over the first `sink` entries of the sorted list instead, so that the smallest chosen keys are lost even where they
            were no sinks; and where the block ends before key `sink`, it repeats the block's last key in their place, which
            then counts several times in the softmax of the block's last row (only when block_q < sink). A `Selection` holds a
            key once; `key_counts` tells how often the released code counts it.

    Returns:
        `Selection` (B, 1, ceil(N / block_q), K) with `block_k` = 1. Causality is the mask beside it.

    Raises:
        ValueError, TypeError: shapes or ranges that do not fit.
    """
    keys = chunk_topk_keys(
        q,
        k,
        boundaries,
        budget,
        block_q,
        local,
        sink,
        pooling=pooling,
        window=window,
        q_offset=q_offset,
        variant=variant,
    )
    return Selection(keys[:, None], block_q=block_q, block_k=1, q_len=q.shape[2], kv_len=k.shape[2])


def key_counts(keys: Tensor, *, block_q: int, q_len: int, kv_len: int, q_offset: int) -> Tensor | None:
    """How often each key stands in the lists of `chunk_topk_keys`, float32 (B, nQ, kv_len); at least 1.

    None when every key that a row of the block can see stands there at most once, the usual case.
    """
    last_row = (torch.arange(1, keys.shape[1] + 1, device=keys.device) * block_q).clamp(max=q_len) - 1 + q_offset
    seen = (keys >= 0) & (keys <= last_row[:, None])
    counts = torch.zeros((*keys.shape[:2], kv_len), device=keys.device)
    counts.scatter_add_(2, keys.clamp(min=0), seen.to(counts.dtype))
    return counts.clamp(min=1) if counts.numel() and bool((counts > 1).any()) else None


def _released_list(by_key: Tensor, low: int, end: int, tokens: int, local: int, sink: int, globals_from: int) -> Tensor:
    """Keys of one query block, (B, tokens). by_key (B, M): scores; allowed keys are low .. end - 1."""
    batch, length = by_key.shape
    recent = min(local, tokens, end - low)
    nothing = length - 1 if end > low else 0
    chosen = by_key.new_full((batch, tokens), nothing, dtype=torch.long)
    chosen[:, tokens - recent :] = torch.arange(end - recent, end, device=by_key.device)
    by_score = min(tokens - recent, end - low - recent)
    if by_score:
        chosen[:, :by_score] = _best(by_key, low, end - recent, by_score)
    chosen = chosen.sort(dim=1).values
    overwritten = min(sink, tokens)
    chosen[:, :overwritten] = (globals_from + torch.arange(overwritten, device=by_key.device)).clamp(max=end - 1)
    return chosen


def _paper_list(by_key: Tensor, low: int, end: int, tokens: int, local: int, sink: int, globals_from: int) -> Tensor:
    """Keys of one query block, (B, at most tokens + sink), each once."""
    recent = min(local, tokens, end - low)
    low = max(low, globals_from)
    first_free = min(max(low, globals_from + sink), end - recent)
    by_score = max(0, min(tokens - recent, end - recent - first_free))
    fixed = [*range(globals_from, min(globals_from + sink, end - recent)), *range(end - recent, end)]
    always = torch.tensor(fixed, dtype=torch.long, device=by_key.device).expand(by_key.shape[0], -1)
    return torch.cat((_best(by_key, first_free, end - recent, by_score), always), dim=1).sort(dim=1).values


def _best(by_key: Tensor, low: int, high: int, count: int) -> Tensor:
    """The `count` best of keys low .. high - 1, (B, count)."""
    # The others take part at -inf, as in the authors' code: torch.topk breaks ties by where they stand in the whole row.
    others = by_key.clone()
    others[:, :low] = -torch.inf
    others[:, high:] = -torch.inf
    return others.topk(count, dim=1).indices


def _check(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        require_tensor(name, tensor, dims=4, floating=True)
    batch, heads, _, dim = q.shape
    require(
        k.shape[0] == batch and k.shape[3] == dim, "k", f"shape {tuple(k.shape)}", f"({batch}, Hkv, M, {dim}) like q"
    )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise bad_value("k", f"{k.shape[1]} kv heads", f"a divisor of q's {heads} heads")
