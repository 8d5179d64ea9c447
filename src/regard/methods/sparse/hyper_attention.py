"""HyperAttention on a pretrained model, Han et al. (2023, ICLR 2024, arXiv 2310.05869). Code read for numbers: insuhan/hyper-attn
@ 68b91e9 (Apache-2.0), `patch_attention_layers`.

The computation is `regard.ops.hyper_attention`. As the authors do, it is put into chosen layers only; each layer patched costs
some perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import bad_type, require, require_int, require_name
from ...ops.hyper import hyper_attention
from ..call import AttentionCall, Method
from ..layer_spec import LayerSpec, check_layers
from .choosing import plainly_causal, stretches_of
from .layers import windowed


@dataclass
class HyperAttention(Method):
    """Long prompts in near-linear time: blocks of an LSH order are attended exactly, the rest is estimated from sampled keys.

    No training. Calls with fewer than `min_len` queries (with a causal mask: no more than `min_len`), decoding steps among them, are
    exact. The cache holds everything. Layers with a mask of another kind (a sliding window shorter than the context, packed documents,
    padding in a bidirectional model) are left as they are; left padding of a causal model is cut off before. What is drawn depends on
    `seed` and the layer alone, so equal inputs give equal outputs.

    Args:
        layers: which layers: None (all), numbers (negative from the end), "first:n", "last:n", "odd" or "even".
        block_size, samples, projections, min_len, variant, collision_mask: as in `regard.ops.hyper_attention`. `min_len` is also where
            the causal recursion ends: at the default 4096 a shorter prompt is exact.
        seed: of the random planes and samples.
    """

    layers: LayerSpec = None
    block_size: int = 256
    samples: int = 256
    projections: int = 7
    min_len: int = 4096
    variant: str = "paper"
    collision_mask: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_layers(self.layers)
        for name, value, least in (
            ("block_size", self.block_size, 0),
            ("samples", self.samples, 0),
            ("projections", self.projections, 0),
            ("min_len", self.min_len, 1),
            ("seed", self.seed, 0),
        ):
            require_int(name, value, least)
        require(self.block_size + self.samples > 0, "samples", 0, "at least 1 when block_size is 0")
        require(self.projections <= 62, "projections", self.projections, "at most 62")
        require_name("variant", self.variant, ("paper", "released"))
        if self.collision_mask not in (None, True, False):
            raise bad_type("collision_mask", self.collision_mask, "True, False or None")

    def applies(self, call: AttentionCall) -> bool:
        return super().applies(call) and not windowed(call)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if call.q_len < self.min_len:
            return None
        if call.mask is None:
            return self._approximate(call, call.q, call.k, call.v, call.causal)
        stretches = list(stretches_of(call, type(self).__name__))
        if not plainly_causal(call.mask, stretches):
            return None
        out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]))
        for stretch in stretches:
            rows = slice(None) if stretch.rows is None else stretch.rows
            values = call.v[rows, :, stretch.start : stretch.start + stretch.k.shape[2]]
            out[rows, :, stretch.cut :] = self._approximate(call, stretch.q, stretch.k, values, True)
        return out

    def _approximate(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + call.layer)
        return hyper_attention(
            q,
            k,
            v,
            causal=causal,
            block_size=self.block_size,
            samples=self.samples,
            projections=self.projections,
            min_len=self.min_len,
            scale=call.scale,
            soft_cap=call.soft_cap,
            dropout=call.dropout,
            variant=self.variant,
            collision_mask=self.collision_mask,
            generator=generator,
            share_draws=True,
            backend=call.backend,
        )
