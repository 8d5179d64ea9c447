"""PrFlashAttention's choice of blocks as a `Selection`: by chance, the nearer the likelier. See `regard.ops.mask_bernoulli`."""

from __future__ import annotations

import torch

from ..._checks import require_int
from ..mask_bernoulli import DistanceBernoulli
from ..selection import Selection

__all__ = ["distance_bernoulli"]


def distance_bernoulli(
    q_len: int,
    kv_len: int,
    *,
    block_size: int = 128,
    gamma: float = 1.0,
    sink: int = 1,
    num_heads: int = 1,
    batch: int = 1,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Selection:
    """Each query block keeps its own block and each earlier one, D blocks before it, with probability 1 / (1 + D)^gamma.

    Args:
        q_len, kv_len: queries are the last positions of the keys. block_size: of queries and keys.
        gamma: 0 keeps everything, infinity the diagonal alone. sink: first blocks that everybody keeps.
        num_heads, batch: each has draws of its own (1: one draw for all). seed: the same gives the same draws, as
            `regard.masks.distance_bernoulli` does; None: a new one from `generator` (or torch's).

    Returns: a `Selection`, to be used with the causal mask: `attention(q, k, v, selection=..., mask=masks.causal)`. Weights are not
    rescaled for what is left out; the softmax normalizes over what is there.
    """
    for name, value, least in (
        ("q_len", q_len, 0),
        ("kv_len", kv_len, 0),
        ("num_heads", num_heads, 1),
        ("batch", batch, 1),
    ):
        require_int(name, value, least)
    if seed is None:
        seed = int(torch.randint(1 << 40, (), generator=generator))
    pattern = DistanceBernoulli(block_size, gamma, sink, seed, 1, batch > 1)
    rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
    first = torch.arange(rows, device=device) * block_size + kv_len - q_len
    last = (first + block_size - 1).clamp(max=kv_len - 1)
    # a block of queries may lie across two of positions: it then has the later one's draws, and both their own blocks
    i_first, i = (x.div(block_size, rounding_mode="floor")[:, None] for x in (first, last))
    j = torch.arange(columns, device=device)
    b, h = (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(num_heads, device=device).view(1, -1, 1, 1),
    )
    kept = (pattern.blocks(b, h, i[None, None], j) | (j >= i_first)) & (j <= i)
    kept = kept.expand(batch, num_heads, rows, columns)
    return Selection.from_block_map(kept, block_q=block_size, block_k=block_size, q_len=q_len, kv_len=kv_len)
