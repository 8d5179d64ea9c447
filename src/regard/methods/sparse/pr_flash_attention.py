"""PrFlashAttention, and ALiBi with harmonic steps on top of rotary positions.

"The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI", 2024, arXiv 2410.18441: a position
paper without code or formulas for the details. What is ours: the probability 1 / (1 + distance)^gamma, the first block kept as an option,
no rescaling of what is left, draws that depend on layer, head and blocks alone; slopes and the harmonic sum of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ..._checks import require, require_int
from ...ops import masks, scores
from ...ops.masks import Mask
from ...ops.scores import ScoreMod
from ..call import AttentionCall, Method
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, windowed


@dataclass
class PrFlashAttention(Method):
    """Every block of queries sees its own block and earlier ones by chance, a block D before it with probability 1 / (1 + D)^gamma.

    Heads of a group share their kv head's draws, layers have their own. In evaluation the draws are fixed by `seed`: decoding sees what
    prefill sees, and left padding changes nothing. While the model trains every forward draws anew. Layers whose own sliding window is
    shorter than the context are left as they are. The cache keeps everything.

    Args:
        gamma: >= 0; 0 changes nothing, larger ones keep less. The last of n rows of blocks keeps the sum of the probabilities, about
            ln n + 0.58 blocks for gamma = 1; `regard.ops.mask_bernoulli.gamma_for` finds gamma for a number of blocks.
        block_size: tokens a block. sink: first blocks that every query keeps (0: none, as in the paper).
        seed: of the fixed draws. dense_layers: the first this many layers stay dense, or a sequence of layer numbers.

    Raises (from `attach`): UnsupportedModelError: the model has no causal self-attention.
    """

    gamma: float = 1.0
    block_size: int = 128
    sink: int = 1
    seed: int = 0
    dense_layers: DenseLayers = ()

    def __post_init__(self) -> None:
        fits = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool) and self.gamma >= 0
        require(fits, "gamma", self.gamma, "a number >= 0")
        require_int("block_size", self.block_size, 1)
        require_int("sink", self.sink, 0)
        require_int("seed", self.seed, 0)
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and not left_alone

    def mask(self, call: AttentionCall) -> Mask | None:
        if self.gamma == 0:
            return None
        seed = (self.seed << 20) + call.layer
        if call.module.training:
            seed = int(torch.randint(1 << 40, ()))
        pattern = _pattern(self.block_size, self.gamma, self.sink, seed, call.num_heads // call.num_kv_heads)
        if call.mask is None or not bool(call.start.any()):
            return pattern
        return masks.shifted(pattern, call.start)


@lru_cache(maxsize=256)
def _pattern(block_size: int, gamma: float, sink: int, seed: int, group: int) -> Mask:
    """One object for equal patterns, so that backends find the plans they kept for it."""
    return masks.distance_bernoulli(block_size, gamma=gamma, sink=sink, seed=seed, group=group)


@dataclass
class HarmonicALiBi(Method):
    """Subtracts slope_h * (1 + 1/2 + ... + 1/distance) from every score, beside the model's own (rotary) positions.

    Distances count less the farther they are, so unlike ALiBi's the bias does not shut out the past; it damps positions that the model
    has not been trained on.

    Args:
        strength: factor on ALiBi's slopes 2^(-8 h / H); 0 changes nothing.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        fits = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool) and self.strength >= 0
        require(fits, "strength", self.strength, "a number >= 0")

    def score(self, call: AttentionCall) -> ScoreMod | None:
        if self.strength == 0:
            return None
        return scores.harmonic_alibi(self.strength * scores.alibi_slopes(call.num_heads, device=call.q.device))
