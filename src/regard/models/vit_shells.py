"""Two skeletons of vision transformers that several papers fill with blocks of their own: DeiT's flat one and Swin's pyramid.

Touvron et al., "Training data-efficient image transformers" (2020, arXiv 2012.12877); Liu et al., "Swin Transformer" (2021, arXiv
2103.14030).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from .._checks import bad_value, require, require_int
from ..nn.channel.gate import require_feature_map
from ..nn.sequence.pre_norm import require_rate
from ..nn.spatial.grids import Grid, grid_pair

__all__ = ["DeiTShell", "SwinShell", "drop_rates", "first_blocks", "init_linear", "patch_grid", "require_image"]


class DeiTShell(nn.Module):
    """Images (B, in_channels, height, width) -> logits (B, num_classes), read off a class token.

    Args:
        dim, depth: width, blocks. block: (number of the block, grid of the patches, drop_path) -> a module on (B, 1 + cells, dim).
        image_size: side or (height, width) in pixels, a multiple of `patch_size`; positions are learned for it.
        num_classes: 0 leaves the classifier out: the result is (B, dim). drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        block: Callable[[int, Grid, float], nn.Module],
        *,
        image_size: int | Grid,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels = grid_pair("image_size", image_size), in_channels
        self.grid = patch_grid(self.image_size, patch_size)
        require_int("depth", depth, 1)
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        cells = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + cells, dim), std=0.02))
        self.blocks = nn.Sequential(*(block(i, self.grid, rate) for i, rate in enumerate(drop_rates(drop_path, depth))))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        require_image(x, self.in_channels, self.image_size)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class SwinShell(nn.Module):
    """Images (B, in_channels, height, width) -> logits (B, num_classes): stages at strides patch_size, twice that, ...

    Args:
        dim, depths: width of the first stage (doubled at each later one), blocks of each stage.
        block: (stage, number within it, width, grid, drop_path) -> a module on (B, cells, width).
        image_size, patch_size: in pixels; the grid of patches must halve at each stage.
        num_classes: 0 leaves the classifier out: the result is the pooled features. drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        block: Callable[[int, int, int, Grid, float], nn.Module],
        *,
        image_size: int | Grid,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels = grid_pair("image_size", image_size), in_channels
        grid = patch_grid(self.image_size, patch_size)
        self.patch_embed, self.patch_norm = nn.Conv2d(in_channels, dim, patch_size, patch_size), nn.LayerNorm(dim)
        rates, ends = drop_rates(drop_path, sum(depths)), list(accumulate(depths))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            width = dim * 2**i
            blocks = [block(i, j, width, grid, rates[ends[i] - depth + j]) for j in range(depth)]
            stage = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
            if i + 1 < len(depths):
                halves = grid[0] % 2 == 0 and grid[1] % 2 == 0
                require(halves, "image_size", self.image_size, f"one whose patches halve at each stage, not {grid}")
                stage["downsample"] = _Merge(width, grid)
                grid = (grid[0] // 2, grid[1] // 2)
            self.stages.append(stage)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        require_image(x, self.in_channels, self.image_size)
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


def first_blocks(attn_type: str | None, depths: Sequence[int], letters: str) -> list[int]:
    """How many blocks of each stage, from the first, are of the new kind: `attn_type` has a letter a stage, the first of `letters` ("ISM")
    for all of them, the second for none, "M" for the number behind the letters ("IIMS2"); None: all in every stage."""
    if attn_type is None:
        return list(depths)
    stages = len(depths)
    found = re.fullmatch(rf"([{letters}]+)(\d*)", attn_type) if isinstance(attn_type, str) else None
    if found is None or len(found[1]) != stages or ("M" in found[1]) != bool(found[2]):
        need = f"{stages} letters of {', '.join(letters)}, and a number after them if there is an M"
        raise bad_value("attn_type", attn_type, need)
    return [
        depth if kind == letters[0] else min(depth, int(found[2])) if kind == "M" else 0
        for kind, depth in zip(found[1], depths)
    ]


def drop_rates(drop_path: float, depth: int) -> list[float]:
    """Stochastic depth of each block, rising linearly from 0 to `drop_path`."""
    return [require_rate("drop_path", drop_path) * block / max(1, depth - 1) for block in range(depth)]


def patch_grid(image: Grid, patch_size: int) -> Grid:
    """(rows, columns) of the patches of an image."""
    require_int("patch_size", patch_size, 1)
    fits = image[0] % patch_size == 0 and image[1] % patch_size == 0
    require(fits, "image_size", image, f"a multiple of patch_size ({patch_size})")
    return image[0] // patch_size, image[1] // patch_size


def require_image(x: Tensor, channels: int, size: Grid) -> None:
    """x must be (B, channels, *size)."""
    require_feature_map(x, channels)
    require(tuple(x.shape[2:]) == size, "x", f"shape {tuple(x.shape)}", f"(B, {channels}, {size[0]}, {size[1]})")


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
