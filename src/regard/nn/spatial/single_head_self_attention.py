"""Single-head self-attention on part of the channels (SHSA), Yun and Ro, "SHViT: Single-Head Vision Transformer with
Memory Efficient Macro Design" (CVPR 2024, arXiv 2401.16456). Code read for numbers: ysj9909/SHViT @ 6a729cc (MIT).

The network built of it is `regard.models.SHViT`. Nothing differs from the authors' module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import require, require_int
from ...ops.attention import attention
from ...ops.reference import accumulation_dtype
from ..channel.gate import require_feature_map
from ..layers import ConvBN, GroupNorm, levit_keys, rename_keys


class SingleHeadSelfAttention(nn.Module):
    """One attention head over all positions of a map, on the first `pdim` channels; the others pass beside it.

    x (B, dim, H, W) is split into x1 (`pdim` channels) and x2 (the rest). x1 is normalised over channels and
    positions together, attends with queries and keys of `qk_dim` channels and values of `pdim` (softmax of
    `q k / sqrt(qk_dim)` over the H*W positions), and the result joins x2 again: `proj(relu([attended, x2]))`. x2 is
    neither normalised nor mixed over positions. All projections are 1x1 `ConvBN`; the norm of `proj` starts at weight
    0, so that a fresh layer returns zeros and is meant to stand in a residual.

    Args:
        dim: channels of the map.
        qk_dim: channels of queries and keys, default 16.
        pdim: channels that attend. Default `dim * 3 // 14` (the paper's dim / 4.67: exactly the released networks'
            numbers in the stages that attend), at least 1. `pdim=dim` is plain single-head attention.

    The authors' names (`pre_norm`, `qkv.c`, `proj.1.bn`, ...) load through `official_keys`.

    Raises:
        ValueError: `pdim` outside 1..dim; in `forward`, an input that is not (B, dim, H, W).
    """

    def __init__(self, dim: int, qk_dim: int = 16, pdim: int | None = None) -> None:
        super().__init__()
        require_int("dim", dim, 1)
        require_int("qk_dim", qk_dim, 1)
        if pdim is None:
            pdim = max(1, dim * 3 // 14)
        require(require_int("pdim", pdim, 1) <= dim, "pdim", pdim, f"an int in 1..dim={dim}")
        self.dim, self.qk_dim, self.pdim = dim, qk_dim, pdim
        self.scale = qk_dim**-0.5
        self.norm = GroupNorm(1, pdim)
        self.qkv = ConvBN(pdim, 2 * qk_dim + pdim)
        self.proj = ConvBN(dim, dim, bn_weight_init=0.0)

    def _qkv(self, x: Tensor) -> list[Tensor]:
        """The attending channels as q, k (B, 1, H*W, qk_dim) and v (B, 1, H*W, pdim)."""
        # split before transposing: the gradient that reaches the batch norm is then laid out (B, C, H, W). PyTorch's CPU
        # batch norm (seen in 2.15) computes wrong gradients at batch size 1 from one laid out (B, H, W, C).
        parts = self.qkv(self.norm(x)).flatten(2).split([self.qk_dim, self.qk_dim, self.pdim], dim=1)
        return [part.transpose(1, 2).unsqueeze(1) for part in parts]

    def attention_weights(self, x: Tensor) -> Tensor:
        """What the head looks at: x (B, dim, H, W) -> (B, H*W queries, H*W keys), rows summing to 1."""
        require_feature_map(x, self.dim)
        q, k, _ = self._qkv(x[:, : self.pdim])
        scores = (q @ k.transpose(-2, -1)).squeeze(1) * self.scale
        return scores.to(accumulation_dtype(scores.dtype)).softmax(dim=-1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        require_feature_map(x, self.dim)
        attending, passing = x.split([self.pdim, self.dim - self.pdim], dim=1)
        q, k, v = self._qkv(attending)
        y = attention(q, k, v, scale=self.scale)
        y = y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.proj(torch.cat([y, passing], dim=1).relu())

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' (and timm's) state dict of an SHSA module to ours."""
        return rename_keys(levit_keys(state), (r"(^|\.)pre_norm\.", r"\1norm."), (r"(^|\.)proj\.1\.", r"\1proj."))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, qk_dim={self.qk_dim}, pdim={self.pdim}"
