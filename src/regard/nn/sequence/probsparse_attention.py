"""ProbSparse attention of Informer: full attention for the queries that look peaked on a sample of keys, the mean for the others.

Informer (Zhou et al. 2021, arXiv 2012.07436). Code read for numbers: CAB's package efficient_attention (Shark-NLP/CAB @ 0e49696, MIT),
`modules/probsparse.py`. What differs: outside training the sampled keys are drawn from a fixed seed, so that results repeat (theirs
change from call to call); the (L_Q, L_K, D) expansion of keys is not made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._checks import require, require_int
from ..layers import rename_keys
from .pattern_attention import ProjectedAttention

__all__ = ["ProbSparseAttention"]


class ProbSparseAttention(ProjectedAttention):
    """Non-causal self-attention: the factor * ceil(ln N) queries with the largest max - sum / N over as many sampled keys attend to all
    keys; every other output is the mean of the values.

    factor: 5 in Informer. mix_heads: the released reshaping without undoing the head axis (Informer's `mix`). seed: of the keys
    sampled outside training. scale: default head_dim ** -0.5, of the attention (the measure is taken unscaled). No padding.
    """

    patterns = frozenset({"NS"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        factor: int = 5,
        scale: float | None = None,
        mix_heads: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.factor, self.scale = require_int("factor", factor, 1), scale
        self.mix_heads, self.seed = mix_heads, seed

    def forward(self, x: Tensor, context: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        if not self.mix_heads:
            return super().forward(x, context, keys)
        self.check(x, context, keys)
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.mix(q, k, v, keys).reshape(x.shape))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, sample: Tensor | None = None) -> Tensor:
        """sample: (N, count) indices of keys to measure each query by (default: drawn)."""
        require(keys is None, "keys", "given", "none: ProbSparse attention does not know of padding")
        length, past = q.shape[2], k.shape[2]
        count = min(past, self.factor * math.ceil(math.log(past))) if past > 1 else past
        top = min(length, self.factor * math.ceil(math.log(length))) if length > 1 else length
        if sample is None:
            generator = None if self.training else torch.Generator().manual_seed(self.seed)
            sample = torch.randint(past, (length, count), generator=generator).to(q.device)
        with torch.no_grad():  # only a choice is made
            measured = torch.stack([(q * k[:, :, column]).sum(-1) for column in sample.T], dim=-1)
            peaked = measured.amax(-1) - measured.sum(-1) / past
            chosen = peaked.topk(top, dim=-1, sorted=False).indices[..., None].expand(-1, -1, -1, q.shape[-1])
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        attended = (q.gather(2, chosen) @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        return v.mean(2, keepdim=True).expand(-1, -1, length, -1).scatter(2, chosen, attended.to(v.dtype))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' query_projection, ... are q_proj, k_proj, v_proj, out_proj."""
        return rename_keys(
            state, (r"^query_projection", "q_proj"), (r"^key_projection", "k_proj"), (r"^value_projection", "v_proj"),
            (r"^out_projection", "out_proj"),
        )  # fmt: skip
