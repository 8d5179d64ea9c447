"""The later, block-sparse version of DHSA at the root of its repository (after Xiong et al., 2025, arXiv 2510.24606). Code read for numbers
(no licence): xiongsiheng/DHSA @ cc8e9c7, `Block-Sparse-Attention/DHSA_patch.py`. The choice is `regard.ops.select.a_shape_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..._checks import require_fraction, require_int, require_name, resolve_budget
from ...ops.select.a_shape import PATTERNS, a_shape_blocks
from ...ops.select.choice import Choice
from ..call import AttentionCall
from .choosing import ChoosingMethod, Stretch
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, windowed


@dataclass
class BlockDHSA(ChoosingMethod):
    """Sparse prefill in blocks: every head reads, for each block of queries, the first block, the diagonal and the best blocks between.

    Decoding is dense, and so is a prompt that continues an earlier one; the cache holds everything. Layers whose own sliding window is
    shorter than the context are left as they are.

    Args:
        budget: keys a query block reads, int tokens or float in (0, 1], a fraction of the context, in whole key blocks (at least one).
        block_q, block_k: queries and keys a block.
        pattern: how the blocks between are found, see `regard.ops.select.a_shape_blocks`: "a-shape" (by block means), "vertical-slash",
            "vertical-slash-blocks", or "topk": the release's default, which also chooses among blocks of the future, so that early rows
            may see nothing; it is not the default here.
        band: every query sees its own block of keys and those of its query block before it, as part of the budget or beyond it; False: only
            the most recent block is sure to be read (as released for "a-shape"), which early rows of a query block cannot see yet.
        vertical_share: of the budget, in columns rather than diagonals. dense_layers: the first this many layers stay dense, or numbers.

    Raises (from `attach`):
        UnsupportedModelError: the model has no causal self-attention.
    """

    budget: int | float = 0.125
    block_q: int = 128
    block_k: int = 32
    pattern: str = "a-shape"
    band: bool = True
    vertical_share: float = 0.5
    dense_layers: DenseLayers = 0

    def __post_init__(self) -> None:
        resolve_budget("budget", self.budget, 1)
        require_int("block_q", self.block_q, 1)
        require_int("block_k", self.block_k, 1)
        require_name("pattern", self.pattern, PATTERNS)
        require_fraction("vertical_share", self.vertical_share)
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and not left_alone

    def choose(self, stretch: Stretch) -> Choice | None:
        rows, length = stretch.q.shape[2], stretch.k.shape[2]
        if stretch.call.phase == "decode" or rows != length:
            return None
        blocks = -(-length // self.block_k)
        budget = self.budget
        topk = max(1, budget // self.block_k if isinstance(budget, int) else int(budget * blocks))
        if topk >= blocks:
            return None
        sizes = {"block_q": self.block_q, "block_k": self.block_k}
        return Choice(
            a_shape_blocks(
                stretch.q,
                stretch.k,
                topk,
                **sizes,
                pattern=self.pattern,
                vertical_share=self.vertical_share,
                band=self.band,
            )
        )
