"""Where a text falls into chunks, read off the attention of a model that reads it: the labels that DHSA's boundary predictor is
trained on. Xiong et al. (2025, arXiv 2510.24606). Code read for numbers: xiongsiheng/DHSA @ cc8e9c7 (`label_boundaries`).
"""

from __future__ import annotations

from torch import Tensor

from ..ops.select.boundaries import attention_mass_ratio, pick_boundaries


def attention_boundaries(
    weights: Tensor,
    num_chunks: int,
    *,
    window: int = 4,
    theta: float | None = 1.1,
    nms: int = 8,
    instruction: int = 0,
    sliding: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut a sequence where later tokens attend to one side of a gap much more than to the other.

    Args:
        weights: causal attention weights of one layer after the softmax, (B, H, N, N) or averaged over heads (B, N, N).
        num_chunks: gaps to cut at, at most (as released: N // query block * 8).
        window: tokens compared on each side of a gap. theta: ratios above it qualify; None: all. nms: cuts lie further than this
            apart. instruction: tokens at the end that stay in one chunk.
        sliding: compare the attention of the next `sliding` rows only (as released: 4096 in layers with a sliding window).

    Returns:
        cuts int64 (B, C + 1), 0 first and N last (rows with fewer cuts repeat N), and the ratios, float64 (B, N), 0 in the margins.
        `regard.losses.soft_label_transform` makes labels of the ratios.
    """
    ratio = attention_mass_ratio(weights, window, sliding=sliding)
    return pick_boundaries(ratio, num_chunks, theta=theta, nms=nms, instruction=instruction), ratio
