"""Where a sequence is cut into chunks: from attention (labels), from any score of the gaps between tokens, or evenly.

DHSA, Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (2025, arXiv 2510.24606).
Code read for numbers: xiongsiheng/DHSA @ cc8e9c7, `legacy/utils/helper.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_int, require_tensor

_EPSILON = 1e-6


def even_boundaries(length: int, chunk_size: int, *, device: torch.device | str | None = None) -> Tensor:
    """Cuts every `chunk_size` tokens, int64 (C + 1,), 0 first and `length` last; the last chunk may be shorter."""
    require_int("length", length, 0)
    require_int("chunk_size", chunk_size, 1)
    cuts = [*range(0, length, chunk_size), length]
    return torch.tensor(cuts if length else [0, 0], device=device)


def attention_mass_ratio(weights: Tensor, window: int = 4, *, sliding: int | None = None) -> Tensor:
    """How differently later tokens attend to the two sides of each gap.

    For the gap after token i: past = the attention that rows from i + window on pay to tokens i - window + 1 .. i, future = what they
    pay to tokens i + 1 .. i + window; the ratio is (larger + 1e-6) / (smaller + 1e-6), at least 1.

    Args:
        weights: causal attention weights after the softmax, (B, N, N), or (B, H, N, N), which are averaged over the heads.
        window: tokens on each side of the gap.
        sliding: count only the next `sliding` rows (layers with a sliding window: 4096 in the authors' code). None: all of them.
    Returns:
        float64 (B, N); 0 in the margins, the first 2 * window - 1 and the last 2 * window gaps.
    """
    require_tensor("weights", weights, floating=True)
    require(weights.dim() in (3, 4), "weights", f"shape {tuple(weights.shape)}", "(B, N, N) or (B, H, N, N)")
    require_int("window", window, 1)
    if weights.dim() == 4:
        weights = weights.mean(dim=1)
    batch, rows, length = weights.shape
    require(
        rows == length,
        "weights",
        f"{rows} rows, {length} columns",
        "a square matrix: the whole sequence attending to itself",
    )
    ratio = weights.new_zeros((batch, length), dtype=torch.float64)
    gap = torch.arange(2 * window - 1, max(2 * window - 1, length - 2 * window), device=weights.device)
    if gap.numel() == 0:
        return ratio
    below = torch.nn.functional.pad(weights.double().cumsum(1), (0, 0, 1, 0))  # sums over rows before r
    first = gap + window
    last = (
        torch.full_like(first, length)
        if sliding is None
        else (gap + window + require_int("sliding", sliding, 1)).clamp(max=length)
    )

    def mass(shifts: range) -> Tensor:
        return torch.stack([below[:, last, gap + s] - below[:, first, gap + s] for s in shifts]).sum(0)

    past, future = mass(range(1 - window, 1)), mass(range(1, window + 1))
    ratio[:, gap] = (torch.maximum(past, future) + _EPSILON) / (torch.minimum(past, future) + _EPSILON)
    return ratio


def pick_boundaries(
    scores: Tensor, num_chunks: int, *, theta: float | None = None, nms: int = 8, instruction: int = 0
) -> Tensor:
    """Cut after the gaps with the highest scores, keeping them apart (one-dimensional non-maximum suppression).

    Gaps are taken by falling score; one at most `nms` tokens from a gap already taken is skipped; the walk ends with `num_chunks`
    gaps. With `instruction` > 0 the gap after token N - instruction is taken first of all and none behind it.

    Args:
        scores: (B, N), one a gap; entry i is the gap after token i.
        num_chunks: gaps to take, the one before the instruction included.
        theta: only gaps with a score above it. None: all.
        nms: tokens. 0: no suppression.
        instruction: tokens at the end that stay in one chunk.
    Returns:
        int64 (B, C + 1) cuts, ascending, 0 first and N last; a cut is the position after its gap. Rows with fewer cuts repeat N.
    """
    require_tensor("scores", scores, dims=2)
    require_int("num_chunks", num_chunks, 0)
    require_int("nms", nms, 0)
    require_int("instruction", instruction, 0)
    length = scores.shape[1]
    order = scores.detach().argsort(dim=1, descending=True, stable=True).cpu()
    above = torch.ones_like(order) if theta is None else (scores.detach() > theta).cpu()
    rows = [
        _pick(row[keep.gather(0, row).bool()].tolist(), length, num_chunks, nms, instruction)
        for row, keep in zip(order, above)
    ]
    width = max((len(row) for row in rows), default=2)
    return torch.tensor([row + [length] * (width - len(row)) for row in rows], device=scores.device).reshape(-1, width)


def _pick(gaps: list[int], length: int, num_chunks: int, nms: int, instruction: int) -> list[int]:
    """Cuts of one sequence from its gaps in the order of their scores."""
    taken: list[int] = []
    near = bytearray(length)  # gaps too near to one that is taken
    end = length

    def take(gap: int) -> None:
        taken.append(gap)
        low, high = max(0, gap - nms), min(length, gap + nms + 1)
        near[low:high] = b"\x01" * (high - low)

    if 0 < instruction <= length:
        end = length - instruction
        take(end)
    for gap in gaps:
        if gap > end:
            continue
        if not (near[gap] and nms):
            take(gap)
        if len(taken) >= num_chunks:
            break
    cuts = sorted(gap + 1 for gap in taken)
    if not cuts or cuts[-1] != length:
        cuts.append(length)
    return [0, *cuts]
