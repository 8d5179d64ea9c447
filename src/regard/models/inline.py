"""InLine-DeiT and InLine-Swin: vision transformers with injective linear attention.

Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv 2412.06590). Code read for numbers:
LeapLabTHU/InLine @ e463a6f, `models/inline_{deit,swin}.py`, `cfgs/` (no licence: numbers only). The authors' checkpoints load. Not here: a
distillation token, and the PVT and CSwin networks, whose linear blocks are `InLineBlock` and `InLineCSWinBlock`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from .._checks import bad_value, require, require_int, require_name
from ..nn.channel.gate import require_feature_map
from ..nn.layers import rename_keys
from ..nn.sequence.pre_norm import require_rate
from ..nn.spatial.grids import Grid, grid_pair
from ..nn.spatial.inline_attention import InLineBlock

__all__ = ["InLineDeiT", "InLineSwin", "inline_deit", "inline_swin"]

DEIT = {"t": (192, 6, 224), "s": (320, 10, 288), "b": (384, 12, 448)}
"""Size -> width, heads (of 32 channels), side of the images it was published for."""
SWIN = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24), "IIIS", 0.2),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24), "IISS", 0.3),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32), "IIMS2", 0.5),
}


def _rates(drop_path: float, depth: int) -> list[float]:
    return [require_rate("drop_path", drop_path) * block / max(1, depth - 1) for block in range(depth)]


class InLineDeiT(nn.Module):
    """Images (B, in_channels, side, side) -> logits (B, num_classes), read off a class token.

    Args:
        dim, depth, num_heads: width, blocks, heads. mlp_ratio, feature_map: as in `regard.nn.InLineBlock`.
        image_size: side or (height, width) in pixels, a multiple of `patch_size`; positions are learned for it.
        num_classes: 0 leaves the classifier out: the result is (B, dim). drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        *,
        image_size: int | Grid = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        feature_map: str = "identity",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels = grid_pair("image_size", image_size), in_channels
        self.grid = _patches(self.image_size, patch_size)
        require_int("depth", depth, 1)
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        cells = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + cells, dim), std=0.02))
        self.blocks = nn.Sequential(
            *(
                InLineBlock(
                    dim,
                    num_heads,
                    self.grid,
                    1,
                    mlp_ratio=mlp_ratio,
                    feature_map=feature_map,
                    drop_path=rate,
                    norm_eps=1e-6,
                )
                for rate in _rates(drop_path, depth)
            )
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `VisionTransformer` (inline_deit.py) in our names; ours passes unchanged. Their files hold it under "model"."""
        return _network_keys(state)

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.in_channels, self.image_size)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class InLineSwin(nn.Module):
    """Images (B, in_channels, side, side) -> logits (B, num_classes): Swin with linear attention over the whole map in some stages.

    Args:
        dim, depths, num_heads: width of the first stage (doubled at each later one), blocks and heads of each stage.
        attn_type: a letter a stage: "I" linear, "S" softmax in windows of max(7, window // 8), "M" linear in the first blocks and
            softmax in the others; how many linear ones follows the letters ("IIMS2"). Default: all linear.
        image_size, patch_size: in pixels; the grid of patches must halve at each stage. window: side of the linear blocks' windows, the
            whole map where it is not smaller (56 in all published networks: always).
        num_classes: 0 leaves the classifier out: the result is the pooled features. drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_type: str | None = None,
        *,
        image_size: int | Grid = 224,
        patch_size: int = 4,
        window: int = 56,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(depths)
        require(len(num_heads) == stages, "num_heads", tuple(num_heads), f"{stages} entries, one a stage as in depths")
        linear = _linear_blocks("I" * stages if attn_type is None else attn_type, depths)
        self.image_size, self.in_channels = grid_pair("image_size", image_size), in_channels
        grid = _patches(self.image_size, patch_size)
        self.patch_embed, self.patch_norm = nn.Conv2d(in_channels, dim, patch_size, patch_size), nn.LayerNorm(dim)
        rates, ends = _rates(drop_path, sum(depths)), list(accumulate(depths))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            width = dim * 2**i
            blocks = []
            for j in range(depth):
                side = window if j < linear[i] else max(7, window // 8)
                blocks.append(
                    InLineBlock(
                        width,
                        num_heads[i],
                        grid,
                        window=side,
                        shift=side // 2 if j % 2 else 0,
                        mlp_ratio=mlp_ratio,
                        linear=j < linear[i],
                        drop_path=rates[ends[i] - depth + j],
                    )
                )
            stage = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
            if i + 1 < stages:
                halves = grid[0] % 2 == 0 and grid[1] % 2 == 0
                require(halves, "image_size", self.image_size, f"one whose patches halve at each stage, not {grid}")
                stage["downsample"] = _Merge(width, grid)
                grid = (grid[0] // 2, grid[1] // 2)
            self.stages.append(stage)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `InLineSwin` in our names; ours passes unchanged. Their files hold it under "model"."""
        return rename_keys(_network_keys(state), (r"^layers\.", "stages."), (r"^patch_embed\.norm\.", "patch_norm."))

    def forward(self, x: Tensor) -> Tensor:
        _check_image(x, self.in_channels, self.image_size)
        x = self.patch_norm(self.patch_embed(x).flatten(2).transpose(1, 2))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleDict)
            x = stage["blocks"](x)
            x = stage["downsample"](x) if "downsample" in stage else x
        return self.head(self.norm(x).mean(dim=1))


class _Merge(nn.Module):
    """Four neighbouring cells become one of twice the channels."""

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.grid[0] // 2, 2, self.grid[1] // 2, 2))  # (B, rows, r, columns, c, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))


def _linear_blocks(attn_type: str, depths: Sequence[int]) -> list[int]:
    """How many blocks of each stage, from the first, are linear."""
    stages, found = len(depths), re.fullmatch(r"([ISM]+)(\d*)", attn_type) if isinstance(attn_type, str) else None
    if found is None or len(found[1]) != stages or ("M" in found[1]) != bool(found[2]):
        raise bad_value(
            "attn_type", attn_type, f"{stages} letters of I, S, M, and a number after them if there is an M"
        )
    return [{"I": depth, "S": 0}.get(kind, min(depth, int(found[2] or 0))) for kind, depth in zip(found[1], depths)]


def _patches(image: Grid, patch_size: int) -> Grid:
    require_int("patch_size", patch_size, 1)
    fits = image[0] % patch_size == 0 and image[1] % patch_size == 0
    require(fits, "image_size", image, f"a multiple of patch_size ({patch_size})")
    return image[0] // patch_size, image[1] // patch_size


def _check_image(x: Tensor, channels: int, size: Grid) -> None:
    require_feature_map(x, channels)
    require(tuple(x.shape[2:]) == size, "x", f"shape {tuple(x.shape)}", f"(B, {channels}, {size[0]}, {size[1]})")


def _network_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename_keys(InLineBlock.official_keys(state), (r"^patch_embed\.proj\.", "patch_embed."))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def inline_deit(
    size: str = "t", num_classes: int = 1000, image_size: int | None = None, drop_path: float = 0.0
) -> InLineDeiT:
    """InLine-DeiT-T, S or B (`size` "t", "s", "b": 192, 320, 384 channels, heads of 32) with random weights.

    image_size: side in pixels; None is that of the published configuration.
    """
    dim, heads, side = DEIT[require_name("size", size, DEIT)]
    return InLineDeiT(dim, 12, heads, image_size=image_size or side, num_classes=num_classes, drop_path=drop_path)


def inline_swin(size: str = "t", num_classes: int = 1000, drop_path: float | None = None) -> InLineSwin:
    """InLine-Swin-T, S or B (`size` "t", "s", "b") for 224 x 224 images, with random weights; `drop_path=None` is the published one."""
    dim, depths, heads, kinds, rate = SWIN[require_name("size", size, SWIN)]
    rate = rate if drop_path is None else drop_path
    return InLineSwin(dim, depths, heads, kinds, num_classes=num_classes, drop_path=rate)
