"""L2ViT: window attention and linear global attention in turns.

The Linear Attention Resurrection in Vision Transformer (Zheng, 2025, arXiv 2501.16182). Code read for numbers: ChuanyangZheng/L2ViT @
fad0341 (MIT), `classification/models/l2vit.py`. The authors' checkpoints load; of their file's ablations, the deeper stem and overlapping
downsampling are here, a plain patch embedding, an extra last projection and other norms are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..nn.channel.gate import require_feature_map
from ..nn.layers import rename_keys
from ..nn.sequence.pre_norm import require_rate
from ..nn.spatial.block_parts import tokens_to_map
from ..nn.spatial.grids import Grid
from ..nn.spatial.l2vit_blocks import LinearGlobalBlock, LocalWindowBlock

__all__ = ["L2ViT", "l2vit"]

_SMALL = ((96, 192, 384, 768), (3, 6, 12, 24))
_BASE = ((128, 256, 512, 1024), (4, 8, 16, 32))
PRESETS = {
    "tiny": (*_SMALL, (2, 2, 6, 2), 7),
    "small": (*_SMALL, (2, 2, 18, 2), 7),
    "base": (*_BASE, (2, 2, 18, 2), 7),
    "base_384": (*_BASE, (2, 2, 18, 2), 12),
}


class L2ViT(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes). Stages at strides 4, 8, 16, ...

    In each stage blocks 0, 2, ... are `regard.nn.LocalWindowBlock`, blocks 1, 3, ... `regard.nn.LinearGlobalBlock`.

    Args:
        dims, num_heads, depths: channels, heads and blocks of each stage. The defaults are those of the tiny network.
        window: side of the local windows. mlp_ratio: of the blocks' MLPs. floor: of the linear attention's denominator.
        deep_stem: four convolutions instead of two before the first stage. overlap: 3 x 3 instead of 2 x 2 convolutions between stages.
        cpe_act: GELU in the position encodings. concentrate: whether the global blocks have the local concentration module.
        num_classes: 0 leaves the classifier out: the result is the pooled features. drop_path: of the last block, rising linearly from 0.

    Any image size works: it is padded at the right and bottom to a multiple of 4, and maps to even sides before they are halved. Outputs
    depend on
    the resolution by more than detail: sums of weights grow with the number of tokens and `floor` does not.
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (2, 2, 6, 2),
        window: int = 7,
        *,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        floor: float | None = 100.0,
        deep_stem: bool = False,
        overlap: bool = False,
        cpe_act: bool = False,
        concentrate: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require(len(dims) >= 1, "dims", tuple(dims), "the width of at least one stage")
        for name, value in (("num_heads", num_heads), ("depths", depths)):
            require(len(value) == len(dims), name, tuple(value), f"{len(dims)} entries, one a stage as in dims")
        require_int("num_classes", num_classes)
        self.in_channels = in_channels
        self.stem = _stem(in_channels, dims[0], deep_stem)
        self.stem_norm = nn.LayerNorm(dims[0])
        self.downsamples = nn.ModuleList(_Downsample(dim, after, overlap) for dim, after in pairwise(dims))
        last = max(1, sum(depths) - 1)
        rates = [require_rate("drop_path", drop_path) * block / last for block in range(sum(depths))]
        self.stages = nn.ModuleList()
        for i, end in enumerate(accumulate(depths)):
            stage = nn.ModuleList()
            for j, rate in enumerate(rates[end - depths[i] : end]):
                shared: dict[str, Any] = {"mlp_ratio": mlp_ratio, "cpe_act": cpe_act, "drop_path": rate}
                if j % 2 == 0:
                    stage.append(LocalWindowBlock(dims[i], num_heads[i], window, **shared))
                else:
                    stage.append(
                        LinearGlobalBlock(dims[i], num_heads[i], floor=floor, concentrate=concentrate, **shared)
                    )
            self.stages.append(stage)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `L2ViT` in our names; ours passes unchanged."""
        return rename_keys(
            LinearGlobalBlock.official_keys(state),
            (r"^downsample_layers\.0\.proj\.proj\.", "stem."),
            (r"^downsample_layers\.0\.norm\.", "stem_norm."),
            (r"^downsample_layers\.(\d+)\.", lambda match: f"downsamples.{int(match[1]) - 1}."),
        )

    def feature_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map (B, dims[i], H', W') of each stage, without a norm."""
        require_feature_map(x, self.in_channels)
        x = self.stem(_pad_to(x, 4))
        grid: Grid = (x.shape[2], x.shape[3])
        tokens, maps = self.stem_norm(x.flatten(2).transpose(1, 2)), []
        for i, stage in enumerate(self.stages):
            if i:
                tokens, grid = self.downsamples[i - 1](tokens, grid)
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                tokens = block(tokens, grid)
            maps.append(tokens_to_map(tokens, grid))
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.feature_maps(x)[-1].flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens).mean(dim=1))


class _Downsample(nn.Module):
    def __init__(self, dim: int, out_dim: int, overlap: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Conv2d(dim, out_dim, 3, 2, 1) if overlap else nn.Conv2d(dim, out_dim, 2, 2)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        image = self.proj(_pad_to(tokens_to_map(self.norm(x), grid), 2))
        return image.flatten(2).transpose(1, 2), (image.shape[2], image.shape[3])


def _stem(in_channels: int, dim: int, deep: bool) -> nn.Sequential:
    half = dim // 2
    if not deep:
        first, second = nn.Conv2d(in_channels, half, 3, 2, 1), nn.Conv2d(half, dim, 3, 2, 1)
        return nn.Sequential(first, nn.BatchNorm2d(half), nn.ReLU(), second, nn.BatchNorm2d(dim))
    layers: list[nn.Module] = []
    for width, kernel, stride in ((in_channels, 7, 2), (half, 3, 1), (half, 3, 1)):
        layers += [nn.Conv2d(width, half, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(half), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(half, dim, 2, 2))


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def l2vit(size: str = "tiny", num_classes: int = 1000, drop_path: float = 0.0) -> L2ViT:
    """L2ViT of `size` "tiny" (28.6 M parameters), "small", "base" or "base_384" (windows of 12), with random weights."""
    dims, heads, depths, window = PRESETS[require_name("size", size, PRESETS)]
    return L2ViT(dims, heads, depths, window, num_classes=num_classes, drop_path=drop_path)
