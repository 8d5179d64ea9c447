"""S2-Attention, Lin et al., "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads"
(2024, arXiv 2407.17678). Code read for numbers: linxihui/dkernel @ 0d4e90e (MIT).

The pattern is `regard.masks.head_sharded`. The paper trains models with it (attach it and train: gradients flow through the block
backends); attached to a model that was trained densely it is a fixed sparse approximation. A block that has left a head's band and is
none of its columns is never read again, which `free_cache` makes use of.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..._checks import bad_type, require_int
from ...ops import masks
from ...ops.masks import Mask
from ..call import AttentionCall, Method, UnsupportedModelError
from ..plans import Full, Rule, Sharded
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, text_config, windowed
from .planned import is_planned


@dataclass
class S2Attention(Method):
    """Every head keeps a local band and its own share of the older blocks; together the heads cover the whole context.

    Block (i, j) of kv head h is kept iff i - j < local_blocks or (j + h * step) % stride == 0 (causal within the diagonal
    block), step = max(1, stride // query heads). Query heads of a group share their kv head's pattern. Positions are counted
    from the first real token, so decoding sees what prefill sees and left padding changes nothing. `local_blocks` reaching over
    the context, or stride 1, is dense. Layers whose own sliding window is shorter than the context are left as they are.

    Args:
        block_size: tokens a block. local_blocks: blocks of the band, own block included. stride: blocks between kept columns.
            Defaults: those of Phi-3-small.
        dense_heads: the LAST this many kv heads are dense.
        homogeneous: every head keeps the same columns (the paper's ablation: the heads then cover no more than one does).
        sink: tokens at the start that all heads see. Not in the paper, whose models are trained with the pattern: a model that
            was trained densely rests its attention on the first tokens, and most heads would lose sight of them.
        dense_layers: the first this many layers stay dense, or a sequence of layer numbers (negative from the end). Hybrid
            models keep every second one: `dense_layers=range(1, num_layers, 2)`.
        free_cache: keep in the cache of each head only what it can still read: its band, its columns, sinks. Decoding then computes over
            that alone, with the same result. False: the cache holds everything, and the method is a mask that goes with any cache.

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
    free_cache: bool = False

    def seams(self) -> tuple[str, ...]:  # type: ignore[override]
        """The pattern is a mask; with `free_cache` it brings a cache of its own too."""
        return ("mask", "cache", "attend") if self.free_cache else ("mask",)

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
        if not isinstance(self.free_cache, bool):
            raise bad_type("free_cache", self.free_cache, "True or False")

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        if self.free_cache:
            self.cache(model)  # says why, where it cannot
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

    def rules_of(self, num_heads: int, num_kv_heads: int) -> tuple[Rule, ...]:
        """The pattern of a layer as rules of a plan, one a query head."""
        step = 0 if self.homogeneous else max(1, self.stride // num_heads)
        sharded = [
            Full()
            if head >= num_kv_heads - self.dense_heads
            else Sharded(self.block_size, self.local_blocks, self.stride, head * step, self.sink)
            for head in range(num_kv_heads)
        ]
        return tuple(rule for rule in sharded for _ in range(num_heads // num_kv_heads))

    def cache(self, model: nn.Module) -> Any:
        from transformers.cache_utils import DynamicLayer

        from ..caches.decoder import ragged_layers
        from ..caches.planned import PlannedLayer

        number = text_config(model).num_hidden_layers

        def make(layer: int) -> Any:
            if stays_dense(self.dense_layers, layer, number):
                return DynamicLayer()
            return PlannedLayer(lambda seen, heads, kv: self.rules_of(heads, kv))

        return ragged_layers(model, make, type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        return call.cache.attend(call) if call.cache is not None and is_planned(call.cache) else None

    def mask(self, call: AttentionCall) -> Mask | None:
        if call.cache is not None and call.position > 0 and is_planned(call.cache):
            return None  # the cache itself knows
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
