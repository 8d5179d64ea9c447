"""SEA's estimator: from a linear attention's output to a small attention map, K bins wide whatever the length.

Paper and code as in `sparse_linear_attention.py` (`modules.py`, `attention.py`: attention_predictor_*).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_int
from ...ops.state.favor import orthogonal_projection, relu_features, softmax_features
from ...ops.state.linear import linear_attention


class CausalConv2d(nn.Conv2d):
    """Convolution over (rows, columns) whose rows see only themselves and rows before: (B, C, N, W) -> (B, C', N, W + 2 p - (w - 1) d)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=0, dilation=dilation)
        self.sides, self.above = padding, (kernel_size - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.sides, self.sides, self.above, 0)))


class AttentionEstimator(nn.Module):
    """Estimated attention of every head and query over `width` bins, and the encoding that it came from.

    Args:
        num_heads, head_dim: of the layer. width: bins. causal: rows see only rows before; needs positions up to `max_len`.
        redraw_every: forwards in train mode after which the random features are drawn anew (0: never).
    """

    def __init__(
        self, num_heads: int, head_dim: int, width: int, causal: bool, max_len: int, redraw_every: int = 1000
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width, self.causal = num_heads, head_dim, width, causal
        shrink, self.splits = (4, 2) if causal else (2, 4)
        require(width % shrink == 0, "width", width, f"a multiple of {shrink}")
        self.redraw_every, self.uses = require_int("redraw_every", redraw_every, 0), 0
        self.projection: Tensor
        features = max(1, int(head_dim * math.log(head_dim)))
        self.register_buffer("projection", orthogonal_projection(features, head_dim))
        self.encoder = nn.Sequential(nn.Linear(3 * head_dim, 2 * head_dim), nn.LayerNorm(2 * head_dim), nn.GELU())
        self.row_decoder = nn.Linear(2 * head_dim, width // shrink * self.splits)
        inner = self.splits * num_heads
        self.conv1: nn.Conv2d
        self.conv2: nn.Conv2d
        self.conv3: nn.Conv2d
        if causal:
            self.positions = nn.Parameter(torch.randn(max_len, head_dim))
            self.norm_in, self.norm_out = nn.LayerNorm(width // shrink), nn.LayerNorm(width)
            self.conv1 = CausalConv2d(inner, inner, 3, padding=2, dilation=2)
            self.conv2 = CausalConv2d(inner, inner, 3, padding=2, dilation=2)
            self.conv3 = CausalConv2d(inner, num_heads, 1, padding=1)
        else:
            self.conv1 = nn.Conv2d(inner, 4 * num_heads, 3, padding=1, stride=(2, 1))
            self.conv2 = nn.Conv2d(4 * num_heads, 4 * num_heads, 3, padding=1)
            self.conv3 = nn.Conv2d(4 * num_heads, num_heads, 3, padding=1)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw the random features anew."""
        fresh = orthogonal_projection(*self.projection.shape, generator=generator)  # type: ignore[arg-type]
        self.projection.copy_(fresh)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None = None, exclude: bool = False
    ) -> tuple[Tensor, Tensor]:
        """q, k, v (B, H, N, head_dim) -> scores (B, H, N, width), encoding (B, H, N, 2 head_dim).

        keys: bool (B, N), tokens that exist (not causal only); v is zero elsewhere. exclude: leave the others out of the linear
        attention's normaliser too, where the authors count them.
        """
        if self.training and self.redraw_every:
            self.uses += 1
            if self.uses > self.redraw_every:
                self.redraw()
                self.uses = 0
        context = self._linear(q, k, torch.cat((self._positions(v, keys), v), dim=-1), keys if exclude else None)
        encoding = self.encoder(torch.cat((context.to(v.dtype), v), dim=-1))
        rows = self.row_decoder(encoding)
        batch, heads, length = rows.shape[:3]
        image = rows.unflatten(-1, (self.splits, -1)).transpose(2, 3).reshape(batch, heads * self.splits, length, -1)
        return self._image(image), encoding

    def _positions(self, v: Tensor, keys: Tensor | None) -> Tensor:
        """What the linear attention carries beside the values, so that the estimator can tell where it looked: (B, H, N, head_dim)."""
        batch, heads, length, dim = v.shape
        if self.causal:
            need = f"at most max_len = {len(self.positions)} tokens"
            require(length <= len(self.positions), "v", f"{length} tokens", need)
            return self.positions[:length].expand(batch, heads, -1, -1)
        exists = torch.ones(1, length, dtype=torch.bool, device=v.device) if keys is None else keys
        number = exists.to(v.dtype).cumsum(-1)
        row = (number - 1).clamp(min=0) / (exists.sum(-1, keepdim=True) - 1 + 1e-8) * (dim - 1)
        near = (1 - (row.clamp(0, dim - 1)[..., None] - torch.arange(dim, device=v.device)).abs()).clamp(min=0)
        return (near * exists[..., None]).to(v.dtype)[:, None].expand(batch, heads, -1, -1)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        ones = torch.ones_like(v[..., :1])
        if self.causal:
            fq, fk = (relu_features(x, self.projection) for x in (q, k))
            out = linear_attention(fq, fk, torch.cat((v, ones), dim=-1), causal=True)
            assert isinstance(out, Tensor)
            return out[..., :-1] / (out[..., -1:] + 1e-6 * fq.sum(-1, keepdim=True))
        fq, fk = softmax_features(q, self.projection, query=True), softmax_features(k, self.projection, query=False)
        if keys is not None:
            ones = ones * keys[:, None, :, None]
        out = fq @ (fk.transpose(-1, -2) @ torch.cat((v, ones), dim=-1))
        return out[..., :-1] / out[..., -1:]

    def _image(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        if self.causal:
            x = self.conv2(self.conv1(self.norm_in(x)).relu()).relu()
            x = self.conv3(F.interpolate(x, scale_factor=(1, 4), mode="nearest"))
            # two columns too many: the average over neighbours brings them in
            return self.norm_out(F.interpolate(x, (length, self.width), mode="area"))
        x = self.conv2(self.conv1(x).relu()).relu()
        x = self.conv3(F.interpolate(x, scale_factor=(2, 1), mode="nearest"))
        if x.shape[-2:] == (length, self.width):
            return x
        return F.interpolate(x, (length, self.width), mode="bilinear" if self.width >= x.shape[-1] else "area")
