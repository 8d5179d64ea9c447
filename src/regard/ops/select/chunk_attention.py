"""DHSA's attention: sparse rows over the keys of `chunk_topk`, dense rows for the instruction at the end.

Paper and code as in `chunk_topk.py` (`dhsa_sdpa`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require_int
from ..masks import Bounds, Mask, causal, sliding_window
from ..selection import Selection
from .choice import Choice
from .chunk_topk import chunk_topk_keys, key_counts
from .membership import InSelection


def chunk_choice(
    q: Tensor,
    k: Tensor,
    boundaries: Tensor,
    budget: int | float = 1024,
    block_q: int = 128,
    local: int = 128,
    sink: int = 128,
    *,
    instruction: int = 64,
    pooling: str = "sqrt",
    window: int | None = None,
    q_offset: int | None = None,
    variant: str = "released",
) -> Choice:
    """What DHSA attends to, for causal attention: `chunk_topk` for the rows before the last `instruction`, all keys for these.

    Arguments as in `chunk_topk`. Where the released code counts a key several times, the choice says so by a score mod that adds
    the logarithm of the count, which is the same softmax.
    """
    require_int("instruction", instruction, 0)
    rows, length = q.shape[2], k.shape[2]
    offset = length - rows if q_offset is None else require_int("q_offset", q_offset, 0)
    sparse = max(0, rows - instruction)
    keys = chunk_topk_keys(
        q[:, :, :sparse],
        k,
        boundaries,
        budget,
        block_q,
        local,
        sink,
        pooling=pooling,
        window=window,
        q_offset=offset,
        variant=variant,
    )
    geometry = {"block_q": block_q, "block_k": 1, "kv_len": length}
    counts = None
    if variant == "released":
        counts = key_counts(keys, block_q=block_q, q_len=sparse, kv_len=length, q_offset=offset)
    score_mod = None if counts is None else _Repeated(counts.log(), block_q, sparse, offset)
    if sparse == rows:
        return Choice(Selection(keys[:, None], q_len=rows, **geometry), None, score_mod)

    whole = sparse // block_q  # query blocks without instruction rows
    indices = torch.full((keys.shape[0], -(-rows // block_q), length), -1, dtype=torch.long, device=keys.device)
    indices[:, :whole, : keys.shape[2]] = keys[:, :whole]
    indices[:, whole:] = torch.arange(length, device=keys.device)
    mask: Mask | None = None
    if sparse % block_q:  # one block has rows of both kinds; the mask tells them apart
        mixed = Selection(keys[:, None, whole:], q_len=sparse - whole * block_q, **geometry)
        start = offset + whole * block_q
        mask = _RowsOutside(start, offset + sparse) | InSelection(mixed, num_heads=1, num_kv_heads=1, q_offset=start)
    return Choice(Selection(indices[:, None], q_len=rows, **geometry), mask, score_mod)


class _RowsOutside(Mask):
    """Everything, for queries before position `start` or from `stop` on."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((q_idx < self.start) | (q_idx >= self.stop)) & (kv_idx == kv_idx)

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        always = kv_lo == kv_lo
        some = ((q_lo < self.start) | (q_hi >= self.stop)) & always
        every = ((q_hi < self.start) | (q_lo >= self.stop)) & always
        return some, every

    def __repr__(self) -> str:
        return f"rows_outside({self.start}, {self.stop})"


class _Repeated:
    """Score mod: + log(how often the key stands in the query block's list)."""

    def __init__(self, log_counts: Tensor, block_q: int, rows: int, q_offset: int) -> None:
        self.log_counts, self.block_q, self.rows, self.q_offset = log_counts, block_q, rows, q_offset

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row = q_idx - self.q_offset
        i = (row // self.block_q).clamp(0, self.log_counts.shape[1] - 1)
        added = self.log_counts.to(device=score.device, dtype=score.dtype)[b, i, kv_idx]
        return score + torch.where((row >= 0) & (row < self.rows), added, 0.0)


def chunk_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    budget: int | float = 1024,
    block_q: int = 128,
    local: int = 128,
    sink: int = 128,
    *,
    instruction: int = 64,
    pooling: str = "sqrt",
    window: int | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    variant: str = "released",
    backend: str = "auto",
) -> Tensor:
    """DHSA: causal attention over `budget` keys a query block, chosen by chunk; the last `instruction` rows see everything.

    With the budget at the whole context and `sink` <= block_q it is dense causal attention.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv).
        boundaries, budget, block_q, local, sink, pooling, variant: see `chunk_topk`.
        instruction: rows at the end that are dense.
        window: sliding window of the layer, for all rows: keys with `query - key <= window` as released (one more than a window
            of that size has elsewhere), `< window` in variant "paper".
        q_offset: position of query row 0, default M - N. scale: default D ** -0.5 (the authors' function: 1).
        backend: as in `regard.ops.attention`.
    Returns:
        (B, H, N, Dv).
    """
    options = dict(instruction=instruction, pooling=pooling, window=window, q_offset=q_offset, variant=variant)
    choice = chunk_choice(q, k, boundaries, budget, block_q, local, sink, **options)  # type: ignore[arg-type]
    allowed = causal
    if window is not None:
        allowed = allowed & sliding_window(window + (variant == "released"))
    return choice.attention(q, k, v, mask=allowed, q_offset=q_offset, scale=scale, backend=backend)
