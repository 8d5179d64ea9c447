"""The fixed block pattern of block-sparse FlashAttention: a flat butterfly.

FlashAttention (Dao et al., 2022, arXiv 2205.14135) runs its block-sparse experiments on the butterfly pattern of Pixelated Butterfly (Dao
et al., 2021, arXiv 2112.00029): the blocks that any factor of a butterfly product can fill, plus rows and columns seen by all.
"""

from __future__ import annotations

import torch

from ..._checks import require, require_int
from ..selection import Selection

__all__ = ["butterfly"]


def butterfly(
    q_len: int,
    kv_len: int,
    *,
    block_q: int = 64,
    block_k: int = 64,
    levels: int | None = None,
    global_blocks: int = 0,
    device: torch.device | str | None = None,
) -> Selection:
    """Query block i looks at key block j where i = j or their numbers differ in one binary digit.

    Args:
        q_len, kv_len, block_q, block_k: geometry. Where there are fewer blocks on one side, its blocks are stretched over the other's.
        levels: lowest binary digits that may differ. None: all, so that a row has 1 + log2(blocks) blocks.
        global_blocks: first blocks that see all and that all see.

    Returns: a `Selection` for all batch rows and heads; causality is the mask's business.
    """
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("global_blocks", global_blocks)):
        require_int(name, value, 0)
    rows, columns = (-(-length // require_int(name, block, 1)) for name, length, block in (
        ("block_q", q_len, block_q), ("block_k", kv_len, block_k)
    ))  # fmt: skip
    longest = max(rows, columns, 1)
    most = (longest - 1).bit_length()
    levels = most if levels is None else require_int("levels", levels, 0)
    require(levels <= most, "levels", levels, f"at most {most}, the binary digits of {longest} blocks")
    number = torch.arange(longest, device=device)
    differ = number[:, None] ^ number[None]
    kept = (differ & (differ - 1) == 0) & (differ < 1 << levels)  # none or one digit, among the lowest
    i, j = (torch.arange(count, device=device) * longest // max(count, 1) for count in (rows, columns))
    stretched = torch.zeros((rows, columns), dtype=torch.bool, device=device)
    # each block stands for all those it is stretched over
    row_of, column_of = (
        torch.searchsorted(starts, number, right=True) - 1 if len(starts) else number[:0] for starts in (i, j)
    )
    if rows and columns:
        at = kept.nonzero()
        stretched[row_of[at[:, 0]], column_of[at[:, 1]]] = True
    stretched[:global_blocks] = True
    stretched[:, :global_blocks] = True
    return Selection.from_block_map(stretched[None, None], block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len)
