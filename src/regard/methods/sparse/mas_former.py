"""MASFormer, Zhang et al., "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer"
(EMNLP Findings 2023, arXiv 2310.12442). Their code could not be had here; what follows is the paper's text.

A few layers see everything, all others their own block and the ones just before it. Everything else is the base model's, so a
pretrained checkpoint loads unchanged and is trained on. Where the text is open: whether a block sees its neighbour (here it does:
`left_blocks=1`) and which layers are the full ones (here the first ones unless you say so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..._checks import bad_type, bad_value, require, require_int
from ..plans import BlockLocal, Full, HeadPlan, Rule
from .layers import stays_dense, text_config
from .planned import PlannedMethod


@dataclass
class MASFormer(PlannedMethod):
    """Mixed attention spans: `full_layers` see everything, the other layers their own block and `left_blocks` before it.

    Attach it and train (gradients flow, no N x N matrix is made), or attach it to generate: sparse layers then keep at most
    `(left_blocks + 1) * block` entries. A block of at least the context, or all layers full, is the base model.

    Args:
        full_layers: the first this many layers (an int), a share of the layers spread evenly (a float in [0, 1]), or layer numbers
            (negative from the end). The paper keeps 4 to 12 of 24.
        block: tokens a block. left_blocks: blocks before its own that a query sees; 0: none.

    Raises (from `attach`): `ValueError` for full layers that the model does not have; `UnsupportedModelError` for models without
    causal self-attention or a decoder cache.
    """

    full_layers: int | float | Sequence[int] = 4
    block: int = 1024
    left_blocks: int = 1

    def __post_init__(self) -> None:
        full = self.full_layers
        if isinstance(full, float):
            require(0.0 <= full <= 1.0, "full_layers", full, "a share of the layers in [0, 1]")
        elif isinstance(full, int) and not isinstance(full, bool):
            require_int("full_layers", full, 0)
        elif not isinstance(full, Sequence) or not all(isinstance(layer, int) for layer in full):
            raise bad_type("full_layers", full, "an int (that many first layers), a share, or layer numbers")
        self._sparse = BlockLocal(self.block, self.left_blocks)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        number = text_config(model).num_hidden_layers
        missing = [layer for layer in self._full(number) if not -number <= layer < number]
        if missing:
            raise bad_value("full_layers", self.full_layers, f"layers of the model, which has {number}")

    def _full(self, num_layers: int) -> Sequence[int]:
        if isinstance(self.full_layers, float):
            count = round(self.full_layers * num_layers)
            return [round((i + 0.5) * num_layers / count - 0.5) for i in range(count)]
        return range(self.full_layers) if isinstance(self.full_layers, int) else self.full_layers

    def rules_of(self, layer: int, num_layers: int, num_heads: int, num_kv_heads: int) -> Sequence[Rule]:
        rule: Rule = Full() if stays_dense(self._full(num_layers), layer, num_layers) else self._sparse
        return (rule,) * num_heads

    def plan(self, num_layers: int) -> HeadPlan:
        """As a plan, for a model of so many layers: `.density(n)` is its share of the attention's FLOPs, `.kv_share(n)` of the cache."""
        return HeadPlan(tuple((self.rules_of(layer, num_layers, 1, 1)[0],) for layer in range(num_layers)))

    def cost(self, length: int, num_layers: int) -> float:
        """The paper's cost of the attention as a share of all-full layers, every query counted with whole blocks and all n keys:
        ((L - l) * n * b * c + l * n^2) / (L * n^2) with c = `left_blocks` + 1 blocks; at most 1."""
        require_int("length", length, 1)
        require_int("num_layers", num_layers, 1)
        full = sum(stays_dense(self._full(num_layers), layer, num_layers) for layer in range(num_layers))
        seen = min(length, self.block * (self.left_blocks + 1))
        return ((num_layers - full) * seen + full * length) / (num_layers * length)
