"""A small flat vision transformer into which any mixer that sees everything plugs by name, on tokens or on maps.

Patches, learned positions, pre-norm blocks `x + mixer(norm(x))`, `x + mlp(norm(x))`, the mean of all patches, a linear head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..nn.mixers import MIXERS, build_mixer, run_mixer
from ..nn.sequence.pre_norm import require_rate
from ..nn.spatial.block_parts import Mlp
from .small_lm import options_of

__all__ = ["SmallViT"]


class VisionBlock(nn.Module):
    """One layer of `SmallViT`: tokens (B, height * width, dim) kept; a mixer of maps gets them as a map."""

    def __init__(
        self, dim: int, mixer: nn.Module, layout: str, grid: tuple[int, int], hidden: int, drop: float
    ) -> None:
        super().__init__()
        self.layout, self.grid = layout, grid
        self.norm, self.mixer = nn.LayerNorm(dim), mixer
        self.mlp_norm, self.mlp, self.drop = nn.LayerNorm(dim), Mlp(dim, hidden, drop), nn.Dropout(drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        inner = self.norm(x)
        if self.layout == "map":
            mixed, aux = run_mixer(self.mixer, inner.transpose(1, 2).unflatten(2, self.grid))
            mixed = mixed.flatten(2).transpose(1, 2)
        else:
            mixed, aux = run_mixer(self.mixer, inner)
        x = x + self.drop(mixed)
        return x + self.mlp(self.mlp_norm(x)), aux


class SmallViT(nn.Module):
    """images (B, in_channels, height, width) -> logits (B, num_classes).

    Args:
        image_size: (height, width), or an int for a square. patch_size: side of the patches, which must divide it.
        num_classes, in_channels, dim, num_layers, num_heads.
        mixer: name of one that can see everything (`regard.nn.mixer_names(False, layout=None)`), or several for a hybrid.
        mixer_options: as in `SmallLM`. mlp_ratio: hidden width of the MLPs over dim. dropout: of the branches, in training.

    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        mixer: str | Sequence[str] = "softmax",
        *,
        mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("patch_size", patch_size), ("num_classes", num_classes), ("in_channels", in_channels), ("dim", dim),
            ("num_layers", num_layers), ("num_heads", num_heads),
        ):  # fmt: skip
            require_int(name, value, 1)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        fits = len(size) == 2 and all(side >= patch_size and side % patch_size == 0 for side in size)
        require(fits, "image_size", image_size, f"sides that are multiples of patch_size ({patch_size})")
        require(mlp_ratio > 0, "mlp_ratio", mlp_ratio, "a number > 0")
        require_rate("dropout", dropout)
        names = [mixer] if isinstance(mixer, str) else list(mixer)
        require(bool(names), "mixer", mixer, "at least one name")
        options = options_of(names, mixer_options)
        self.image_size, self.in_channels, self.grid = size, in_channels, (size[0] // patch_size, size[1] // patch_size)
        self.embedding = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], dim))
        blocks = []
        for index in range(num_layers):
            name, own = names[index % len(names)], options[index % len(names)]
            layer = build_mixer(
                name, dim, num_heads, False, layer_idx=index, num_layers=num_layers, max_len=self.positions.shape[1],
                grid=self.grid, **own,
            )  # fmt: skip
            blocks.append(VisionBlock(dim, layer, MIXERS[name].layout, self.grid, round(mlp_ratio * dim), dropout))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, images: Tensor, return_aux: bool = False) -> Any:
        """return_aux: also give the sum of the mixers' own losses (a scalar, 0 where none has one), as a pair."""
        require_tensor("images", images, dims=4, floating=True)
        need = (self.in_channels, *self.image_size)
        require(
            tuple(images.shape[1:]) == need,
            "images",
            f"shape {tuple(images.shape)}",
            f"(B, {', '.join(map(str, need))})",
        )
        x = self.embedding(images).flatten(2).transpose(1, 2) + self.positions
        aux = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, own = block(x)
            aux = aux if own is None else aux + own.float()
        logits = self.head(self.norm(x).mean(1))
        return (logits, aux) if return_aux else logits

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, grid={self.grid}"
