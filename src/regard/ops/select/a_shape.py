"""Blocks in the shape of an A: the first block, the diagonal, and between them the blocks that block means, or the last queries, point to.

DHSA's later version at the root of its repository (after Xiong et al., 2025, arXiv 2510.24606). Code read for numbers (no licence):
xiongsiheng/DHSA @ cc8e9c7, `Block-Sparse-Attention/DHSA_patch.py`, the functions `_generate_sparsity_mask*`.

For prompts: queries and keys are the same tokens. The release pads tokens to whole blocks with zeros; here a ragged last block is
averaged over the tokens that it has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import require, require_fraction, require_int, require_name, require_tensor
from ..selection import Selection
from .blocks import BlockGrid, block_scores
from .summaries import block_summaries

PATTERNS = ("a-shape", "vertical-slash", "vertical-slash-blocks", "topk")


def a_shape_blocks(
    q: Tensor,
    k: Tensor,
    topk: int,
    *,
    block_q: int = 128,
    block_k: int = 32,
    pattern: str = "a-shape",
    vertical_share: float = 0.5,
    band: bool | None = None,
) -> Selection:
    """Choose `topk` key blocks for every query block of a prompt.

    A query block that sees no more than `topk` blocks has all of them. The others have the first block, the most recent one, and:

    - "a-shape": of those between, the ones whose mean key fits the mean query best;
    - "vertical-slash": those that hold the columns and diagonals on which the last query block rests most of its attention (a share
      `vertical_share` of the token budget in columns, the rest in diagonals); the first rows, as many as the budget, and the last query
      block are dense;
    - "vertical-slash-blocks": the same by block means, without that attention.
    - "topk": nothing is forced and nothing known of the future is left out: the best blocks by means, as the release's default runs.
      What lies in the future counts among the `topk`, so that early rows may be left with nothing.

    Args:
        q: (B, H, N, D). k: (B, Hkv, N, D). topk: key blocks. block_q, block_k: rows and keys of a block.
        band: keep all blocks of the query block's own rows, not only the most recent: with `block_q` above `block_k` its first rows
            may otherwise not see their neighbourhood. These count among the `topk`, and more are kept where they are more. None: as
            released (only in "vertical-slash-blocks").
    Returns:
        `Selection` (B, H, nQ, K); causality inside blocks is the mask to be given beside it.
    """
    require_tensor("q", q, dims=4, floating=True)
    require_tensor("k", k, dims=4, floating=True)
    length = q.shape[2]
    require(k.shape[2] == length, "k", f"{k.shape[2]} keys", f"the {length} tokens of q: the whole prompt")
    require_int("topk", topk, 1)
    require_int("block_q", block_q, 1)
    require_int("block_k", block_k, 1)
    require_name("pattern", pattern, PATTERNS)
    share = require_fraction("vertical_share", vertical_share)
    grid = BlockGrid(length, length, block_q, block_k, 0)
    if length == 0:
        return grid.selection(torch.full((*q.shape[:2], 0, 0), -1, device=q.device))
    topk = min(topk, grid.num_k_blocks)
    with torch.no_grad():
        rows = _Rows(grid, topk, q.device)
        if pattern in ("a-shape", "topk"):
            scores = block_scores(q, block_summaries(k, block_k), block_q=block_q, share="none")
            if pattern == "topk":
                best = scores.topk(topk, dim=-1).indices
                return grid.selection(best)
            kept = rows.fill(rows.a_shape(prefix=0, last=False, band=bool(band)), scores)
        elif pattern == "vertical-slash":
            shape = rows.a_shape(prefix=rows.prefix, last=True, band=bool(band))
            kept = rows.fill(shape, _line_scores(q, k, grid, topk, share))
        else:
            shape = rows.a_shape(prefix=rows.prefix, last=True, band=band is not False)
            kept = rows.fill(shape, _block_line_scores(q, k, rows, topk, share))
    return Selection.from_block_map(kept, block_q=block_q, block_k=block_k, q_len=length, kv_len=length)


class _Rows:
    """What is known of each query block before anything is scored."""

    def __init__(self, grid: BlockGrid, topk: int, device: torch.device) -> None:
        self.topk, self.grid = topk, grid
        row = torch.arange(grid.num_q_blocks, device=device)
        last = grid.num_k_blocks - 1
        self.block = torch.arange(grid.num_k_blocks, device=device)
        self.recent = (((row + 1) * grid.block_q - 1) // grid.block_k).clamp(
            max=last
        )  # the last block that a query block sees
        self.first = (row * grid.block_q // grid.block_k).clamp(max=last)  # the block of its first row
        self.row = row
        self.prefix = min(grid.num_q_blocks, math.ceil(min(grid.kv_len, topk * grid.block_k) / grid.block_q))

    def a_shape(self, *, prefix: int, last: bool, band: bool = False) -> tuple[Tensor, Tensor]:
        """Forced blocks, bool (nQ, nK), and how many more each query block has, int64 (nQ,)."""
        recent, block = self.recent[:, None], self.block
        dense = (self.recent + 1 <= self.topk) | (self.row < prefix)
        if last:
            dense = dense | (self.row == self.grid.num_q_blocks - 1)
        begins = self.first if band else self.recent
        forced = (block == 0) | ((block >= begins[:, None]) & (block <= recent))
        count = self.recent - begins + 1 + (begins > 0).long()
        left = torch.minimum((self.topk - count).clamp(min=0), (self.recent - 1).clamp(min=0))
        return torch.where(dense[:, None], block <= recent, forced), torch.where(dense, 0, left)

    def fill(self, shape: tuple[Tensor, Tensor], scores: Tensor) -> Tensor:
        """Forced blocks and the best ones between the first and the most recent, (B, H, nQ, nK)."""
        forced, left = shape
        between = (self.block > 0) & (self.block < self.recent[:, None])
        most = int(left.max())
        kept = forced.expand(*scores.shape[:2], -1, -1).clone()
        if most:
            best = scores.masked_fill(~between, -torch.inf).topk(most, dim=-1).indices
            place = torch.arange(most, device=scores.device) < left[:, None]
            chosen = torch.zeros_like(kept).scatter_(-1, best, place.expand_as(best))
            kept |= chosen
        return kept


def _line_scores(q: Tensor, k: Tensor, grid: BlockGrid, topk: int, share: float) -> Tensor:
    """For each query block the attention on the chosen columns and diagonals that cross each key block, (B, H, nQ, nK)."""
    length, block_q, block_k = grid.kv_len, grid.block_q, grid.block_k
    budget = min(length, topk * block_k)
    columns = min(length, int(budget * share))
    last = min(block_q, length)
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q[:, :, -last:].float() @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    at = torch.arange(length - last, length, device=q.device)
    position = torch.arange(length, device=q.device)
    weights = scores.masked_fill(position > at[:, None], -torch.inf).softmax(-1)
    vertical = weights.new_zeros(*weights.shape[:2], grid.num_k_blocks)
    if columns:
        best = weights.sum(-2).topk(columns, dim=-1)
        vertical.scatter_add_(-1, best.indices // block_k, best.values)
    out = vertical[:, :, None].expand(-1, -1, grid.num_q_blocks, -1)
    if budget - columns == 0:
        return out
    key = at[:, None] - position  # the key at each distance from each of the last queries
    along = weights.gather(-1, key.clamp(min=0).expand(*weights.shape[:2], -1, -1)) * (key >= 0)
    slashes = along.sum(-2).topk(budget - columns, dim=-1)
    begins = torch.arange(grid.num_q_blocks, device=q.device)[:, None] * block_q
    low = begins - slashes.indices[:, :, None]
    high = low + block_q - 1
    return out + _crossed(
        slashes.values,
        low.clamp(0, length - 1) // block_k,
        torch.where(high >= 0, high.clamp(max=length - 1) // block_k, -1),
        grid.num_k_blocks,
        (block_q + block_k - 1) // block_k + 1,
    )


def _block_line_scores(q: Tensor, k: Tensor, rows: _Rows, topk: int, share: float) -> Tensor:
    """The same from the scores of the last mean query with the mean keys."""
    grid = rows.grid
    features = block_summaries(k, grid.block_k)
    last = (grid.num_q_blocks - 1) * grid.block_q
    scores = block_scores(q[:, :, last:], features, block_q=grid.block_q, share="none")[:, :, 0] * q.shape[-1] ** -0.5
    columns = int(topk * share)
    vertical = torch.zeros_like(scores)
    if columns:
        best = scores.topk(columns, dim=-1)
        vertical.scatter_add_(-1, best.indices, best.values)
    out = vertical[:, :, None].expand(-1, -1, grid.num_q_blocks, -1)
    if topk - columns == 0:
        return out
    slashes = scores.topk(topk - columns, dim=-1)
    distance = (grid.num_k_blocks - 1 - slashes.indices)[:, :, None]
    low, high = rows.first[:, None] - distance, rows.recent[:, None] - distance
    span = int((rows.recent - rows.first).max()) + 1
    return out + _crossed(slashes.values, low, high, grid.num_k_blocks, span)


def _crossed(values: Tensor, low: Tensor, high: Tensor, blocks: int, span: int) -> Tensor:
    """Sums (B, H, nQ, blocks) of `values` (B, H, n) over the blocks `low .. high` (B, H, nQ, n) that each crosses; none where high < 0."""
    out = values.new_zeros(*low.shape[:3], blocks + 1)
    for step in range(span):
        touched = low + step
        inside = (touched >= 0) & (touched <= high)
        out.scatter_add_(-1, torch.where(inside, touched, blocks), values[:, :, None].expand_as(touched) * inside)
    return out[..., :blocks]
