"""Block top-k: each block of queries reads the blocks of keys whose summaries it likes best. No training.

The scheme that block-sparse methods share when their scores are not learned: with "minmax" summaries that of Tang et al., "Quest:
Query-Aware Sparsity for Efficient Long-Context LLM Inference" (2024, arXiv 2406.10774), with "mean" that of many others (MoBA, Kinetics).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor
from ..attention import attention
from ..masks import causal as causal_mask
from ..selection import Selection
from .blocks import BlockGrid, block_scores, query_features, select_blocks
from .running_summaries import BlockSummaries
from .summaries import block_summaries, block_summary

_SCORES_AT_ONCE = 1 << 25


def block_topk(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    summary: str = "mean",
    share: str = "mean",
    rows: str = "mean",
    summaries: Tensor | BlockSummaries | None = None,
    q_offset: int | None = None,
    causal: bool = True,
    **rule: Any,
) -> Selection:
    """Choose key blocks for every query block.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D).
        block_q, block_k: rows a query block, keys a key block.
        summary: what stands for a key block, see `block_summaries`. share, rows: see `block_scores`; with share "mean" or "max" the
            query heads of a kv head make one choice.
        summaries: of `k`, if they are at hand (of the kind `summary`).
        q_offset: position of query row 0, default M - N. causal: whether blocks after the query block count as well.
        rule: `topk`, `budget`, `ratio` or `threshold`, and `sink`, `recent`: see `select_blocks`.
    Returns:
        `Selection` (B, Hkv, nQ, K), with share "none" (B, H, nQ, K).
    """
    require_tensor("q", q, dims=4, floating=True)
    require_tensor("k", k, dims=4, floating=True)
    length = k.shape[2]
    offset = length - q.shape[2] if q_offset is None else require_int("q_offset", q_offset, 0)
    require_int("block_q", block_q, 1)
    grid = BlockGrid(q.shape[2], length, block_q, block_k, offset)
    with torch.no_grad():
        if isinstance(summaries, BlockSummaries):
            summaries = summaries.values
        elif summaries is None:
            summaries = block_summaries(k, block_k, summary)
        need = (k.shape[0], k.shape[1], grid.num_k_blocks)
        require(tuple(summaries.shape[:3]) == need, "summaries", f"shape {tuple(summaries.shape)}", f"{need} + (F,)")
        step = max(1, _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * grid.num_k_blocks)) * block_q
        parts = []
        for start in range(0, q.shape[2], step) or [0]:
            part = q[:, :, start : start + step]
            scores = block_scores(part, summaries, summary, block_q=block_q, share=share, rows=rows)
            parts.append(
                select_blocks(
                    scores, grid._replace(q_len=part.shape[2], q_offset=offset + start), causal=causal, **rule
                )
            )
    if len(parts) == 1:
        return parts[0]
    width = max(part.indices.shape[-1] for part in parts)
    lists = [torch.nn.functional.pad(part.indices, (0, width - part.indices.shape[-1]), value=-1) for part in parts]
    return grid.selection(torch.cat(lists, dim=2))


def tree_topk(
    q: Tensor,
    summaries: BlockSummaries,
    topk: int,
    *,
    block_q: int = 1,
    q_offset: int | None = None,
    sink: int = 0,
    recent: int = 1,
    beam: int = 2,
) -> Selection:
    """`block_topk` by a search down a hierarchy of summaries, for rows so long that scoring every block is too much. Causal.

    At each level the `beam * topk` best blocks (at the last level `topk`) are kept and split. Query heads of a kv head choose
    together (the mean of their scores). With `beam` so large that nothing is dropped it is `block_topk`.

    Args:
        q: (B, H, N, D), the last rows of the sequence unless `q_offset` says otherwise. summaries: of its keys, with 2 or more levels.
        topk: key blocks a query block, forced ones (`sink`, `recent` as in `select_blocks`) among them.
    Returns:
        `Selection` (B, Hkv, nQ, <= topk, or as many as are forced).
    """
    for name, value in (("topk", topk), ("beam", beam), ("block_q", block_q)):
        require_int(name, value, 1)
    length, fan = summaries.length, summaries.fan
    offset = length - q.shape[2] if q_offset is None else require_int("q_offset", q_offset, 0)
    grid = BlockGrid(q.shape[2], length, block_q, summaries.block, offset)
    kv_heads = summaries.values.shape[1]
    with torch.no_grad():
        features = query_features(block_summary(q, block_q), summaries.kind).unflatten(1, (kv_heads, -1)).mean(2)
        last = grid.last_rows(q.device)[:, None] // summaries.block  # the last block that a query block sees
        forced = grid.forced(sink, recent, q.device) & grid.visible(q.device)
        top = summaries.levels - 1
        index = torch.arange(summaries.level(top).shape[2], device=q.device).expand(*features.shape[:3], -1)
        for level in range(top, -1, -1):
            if level < top:
                index = (index[..., None] * fan + torch.arange(fan, device=q.device)).flatten(-2)
            rows = summaries.level(level)
            exists = (index >= 0) & (index < rows.shape[2]) & (index * fan**level <= last)
            at = index.clamp(0, rows.shape[2] - 1)
            scores = _gathered_scores(features, rows, at).masked_fill(~exists, -torch.inf)
            if level == 0:
                break
            held = (
                torch.nn.functional.pad(forced, (0, -forced.shape[-1] % fan**level))
                .unflatten(-1, (-1, fan**level))
                .any(-1)
            )
            must = held.expand(*at.shape[:2], -1, -1).gather(-1, at) & exists
            scores = scores.masked_fill(must, torch.inf)
            best = scores.topk(min(scores.shape[-1], max(beam * topk, int(held.sum(-1).max()))), dim=-1)
            index = torch.where(best.values > -torch.inf, index.gather(-1, best.indices), -1)
        whole = scores.new_full((*scores.shape[:3], grid.num_k_blocks + 1), -torch.inf)
        whole.scatter_(-1, torch.where(exists, at, grid.num_k_blocks), scores)
    return select_blocks(whole[..., :-1], grid, topk=topk, sink=sink, recent=recent)


def _gathered_scores(features: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """features (B, Hkv, nQ, F) times rows (B, Hkv, n, F) at (B, Hkv, nQ, c): (B, Hkv, nQ, c)."""
    batch, heads, blocks, width = at.shape
    picked = rows.gather(2, at.reshape(batch, heads, -1)[..., None].expand(-1, -1, -1, rows.shape[-1]))
    return (picked.unflatten(2, (blocks, width)) @ features.to(rows.dtype)[..., None])[..., 0]


def block_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **options: Any,
) -> Any:
    """Causal attention over the blocks that `block_topk` chooses; `options` are its arguments.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). scale, return_lse, backend: as in `regard.ops.attention`.
    Returns:
        (B, H, N, Dv), with `return_lse` also (B, H, N).
    """
    selection = block_topk(q, k, **options)
    mask = causal_mask if options.get("causal", True) else None
    return attention(
        q,
        k,
        v,
        mask=mask,
        selection=selection,
        q_offset=options.get("q_offset"),
        scale=scale,
        return_lse=return_lse,
        backend=backend,
    )
