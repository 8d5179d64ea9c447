"""MALA: linear attention that does not lose the magnitude of the query, on maps, and its block.

Rectifying Magnitude Neglect in Linear Attention (Fan et al., ICCV 2025, arXiv 2507.00698). Code read for numbers: qhfan/MALA @ 7114e63,
`classfication_release/model.py` (no licence: numbers only). What differs: the rotary table is made here, not passed in; the plain softmax
attention of the authors' later stages is the same class with `linear=False`; rows of the weights can be had (`weights`).
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_int
from ...ops.attention import attention
from ...ops.state.global_linear import global_linear_attention, global_linear_weights
from ..channel.gate import require_feature_map
from ..layers import drop_samples, rename_keys
from ..sequence.pre_norm import require_rate
from .block_parts import LayerNorm2d, interleaved_rotary_2d, rotate_pairs

__all__ = ["MagnitudeAwareAttention", "MagnitudeAwareBlock"]


class MagnitudeAwareAttention(nn.Module):
    """(B, dim, H, W) -> the same: attention of every cell to every cell, linear in their number, gated.

    With phi(x) = elu(x) + 1, N cells and a_ij = phi(q_i) . phi(k_j) / (N sqrt(head_dim)), the weights are beta_i a_ij - gamma_i, where
    beta_i = 1 + 1 / sum_m a_im and gamma_i = (sum_m a_im) / N: rows sum to 1, and doubling phi(q) changes them, which a ratio does not. To
    that is added a depthwise 5 x 5 convolution of the values; the sum is multiplied by a projection of x and projected.

    Args:
        dim: channels, a multiple of `num_heads`; a head's width must be a multiple of 4 for the rotary positions.
        num_heads: heads.
        linear: False is softmax attention in the same frame (the authors' last two stages), without a feature map.
        rotary: turn features by row (first half of a head's channels) and column. The sums of the rows are taken before the rotation, as
            released, so rows then sum to 1 only approximately. False: no positions but those of the convolution.

    Raises:
        ValueError, TypeError: numbers that do not fit each other; an input that is not (B, dim, H, W).
    """

    def __init__(self, dim: int, num_heads: int, linear: bool = True, rotary: bool = True) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        fits = not rotary or dim // num_heads % 4 == 0
        require(fits, "dim", dim, f"a multiple of 4 * num_heads ({4 * num_heads}) for rotary positions")
        self.linear, self.rotary = bool(linear), bool(rotary)
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        require_feature_map(x, self.dim)
        projected = self.qkvo(x)
        q, k, v = self._heads(projected)
        gate, local = projected[:, 3 * self.dim :], self.lepe(projected[:, 2 * self.dim : 3 * self.dim])
        turn = self._turn(x)
        if self.linear:
            out = global_linear_attention(q, k, v, normaliser="magnitude", feature_map="elu+1", rotate=turn)
        else:
            out = attention(q if turn is None else turn(q), k if turn is None else turn(k), v)
        out = rearrange(out, "b m (h w) d -> b (m d) h w", h=x.shape[2])
        return self.proj((out + local) * gate)

    def weights(self, x: Tensor) -> Tensor:
        """The weights (B, num_heads, H * W, H * W) of the linear form: quadratic, for looking."""
        require(
            self.linear, "linear", self.linear, "True: the weights of the softmax form are those of softmax attention"
        )
        require_feature_map(x, self.dim)
        q, k, _ = self._heads(self.qkvo(x))
        return global_linear_weights(q, k, normaliser="magnitude", feature_map="elu+1", rotate=self._turn(x))

    def _heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = rearrange(projected[:, : 3 * self.dim], "b (p m d) h w -> p b m (h w) d", p=3, m=self.num_heads)
        return split[0], split[1], split[2]

    def _turn(self, x: Tensor):
        if not self.rotary:
            return None
        grid = (x.shape[2], x.shape[3])
        table = interleaved_rotary_2d(grid, self.dim // self.num_heads, x.device)
        return lambda features: rotate_pairs(features, table)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, linear={self.linear}, rotary={self.rotary}"


class MagnitudeAwareBlock(nn.Module):
    """x += depthwise3x3(x); x += attention(norm(x)); x += feed_forward(norm(x)): (B, dim, H, W) kept.

    The feed-forward is a 1 x 1 convolution, GELU, plus a depthwise 3 x 3 convolution of that, and a 1 x 1 convolution back.

    Args:
        dim, num_heads, linear, rotary: as `MagnitudeAwareAttention`.
        mlp_ratio: hidden channels over dim, rounded down (3.5 in the paper's networks).
        layer_scale: initial value of a learned factor a channel on both branches; None: no factor.
        drop_path: stochastic depth, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        linear: bool = True,
        *,
        rotary: bool = True,
        mlp_ratio: float = 3.5,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = require_rate("drop_path", drop_path)
        require(mlp_ratio > 0, "mlp_ratio", mlp_ratio, "a number > 0")
        hidden = int(mlp_ratio * dim)
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-6), LayerNorm2d(dim, eps=1e-6)
        self.attn = MagnitudeAwareAttention(dim, num_heads, linear, rotary)
        self.ffn = _FeedForward(dim, hidden)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (
                nn.Parameter(layer_scale * self.pos.weight.new_ones(1, dim, 1, 1)) for _ in range(2)
            )

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `Block`: their norms hold a LayerNorm one level down; ours passes unchanged."""
        return rename_keys(state, (r"\b(norm[12])\.norm\.", r"\1."))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + drop_samples(_scaled(self.attn(self.norm1(x)), self.gamma_1), self.drop_path, self.training)
        return x + drop_samples(_scaled(self.ffn(self.norm2(x)), self.gamma_2), self.drop_path, self.training)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
