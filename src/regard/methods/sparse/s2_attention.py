"""S2-Attention, Lin et al., "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads"
(2024, arXiv 2407.17678). Code read for numbers: linxihui/dkernel @ 0d4e90e (MIT).

The pattern is `regard.masks.head_sharded`. The paper trains models with it; attached to a model that was trained densely it is
a fixed sparse approximation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from ..._checks import require_int
from ...ops import masks
from ...ops.masks import Mask
from ..call import AttentionCall, Method, UnsupportedModelError
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, text_config, windowed


@dataclass
class S2Attention(Method):
    """Every head keeps a local band and its own share of the older blocks; together the heads cover the whole context.

    Block (i, j) of kv head h is kept iff i - j < local_blocks or (j + h * step) % stride == 0 (causal within the diagonal
    block), step = max(1, stride // query heads). Query heads of a group share their kv head's pattern. Positions are counted
    from the first real token, so decoding sees what prefill sees and left padding changes nothing. `local_blocks` reaching over
    the context, or stride 1, is dense. The cache still holds everything. Layers whose own sliding window is shorter than the
    context are left as they are.

    Args:
        block_size: tokens a block. local_blocks: blocks of the band, own block included. stride: blocks between kept columns.
            Defaults: those of Phi-3-small.
        dense_heads: the LAST this many kv heads are dense.
        homogeneous: every head keeps the same columns (the paper's ablation: the heads then cover no more than one does).
        sink: tokens at the start that all heads see. Not in the paper, whose models are trained with the pattern: a model that
            was trained densely rests its attention on the first tokens, and most heads would lose sight of them.
        dense_layers: the first this many layers stay dense, or a sequence of layer numbers (negative from the end). Hybrid
            models keep every second one: `dense_layers=range(1, num_layers, 2)`.

    Warns (from `attach`) when there are fewer kv heads than `stride`: then not every block is covered.

    Raises (from `attach`):
        UnsupportedModelError: the model has no causal self-attention, or fewer kv heads than `dense_heads`.
    """

    block_size: int = 64
    local_blocks: int = 16
    stride: int = 8
    dense_heads: int = 0
    homogeneous: bool = False
    sink: int = 0
    dense_layers: DenseLayers = ()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block_size", self.block_size, 1),
            ("local_blocks", self.local_blocks, 1),
            ("stride", self.stride, 1),
            ("dense_heads", self.dense_heads, 0),
            ("sink", self.sink, 0),
        ):
            require_int(name, value, least)
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        config = text_config(model)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if heads is None:
            return
        if self.dense_heads > heads:
            raise UnsupportedModelError(
                f"model: {type(model).__name__} has {heads} kv heads, and S2Attention is to leave {self.dense_heads} of them dense"
            )
        if self.dense_heads == 0 and (heads < self.stride or self.homogeneous) and self.stride > 1:
            covered = 1 if self.homogeneous else heads
            warnings.warn(
                f"S2Attention: {covered} different patterns with stride {self.stride} leave older blocks that no head sees; "
                "use a stride of at most the number of kv heads, or dense heads or layers",
                stacklevel=3,
            )

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and not left_alone

    def mask(self, call: AttentionCall) -> Mask:
        pattern = masks.head_sharded(
            call.num_kv_heads,
            self.block_size,
            self.local_blocks,
            self.stride,
            dense_heads=self.dense_heads,
            homogeneous=self.homogeneous,
            group=call.num_heads // call.num_kv_heads,
        )
        if self.sink:
            pattern = pattern | (masks.sink(self.sink) & masks.causal)
        if call.mask is None or not bool(call.start.any()):
            return pattern
        return masks.shifted(pattern, call.start)
