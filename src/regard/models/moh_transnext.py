"""MoH-ViT: TransNeXt whose attention routes tokens to heads.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842) on TransNeXt (Shi, 2023, arXiv 2311.17132); code
read for numbers: SkyworkAI/MoH @ 2cefd57 (Apache-2.0), `MoH-ViT/transnext.py`. The authors' checkpoints load. What differs: images may be
oblong; balance losses are returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..nn.layers import drop_samples, rename_keys
from ..nn.spatial.block_parts import tokens_to_map
from ..nn.spatial.grids import Grid, grid_pair
from ..nn.spatial.mixture_of_heads_2d import MixtureOfHeadAggregatedAttention, MixtureOfHeadCosineAttention
from ..ops.head_routing import HeadRouting
from .vit_shells import drop_rates, require_image

__all__ = ["MoHTransNeXt", "moh_transnext"]

_SMALL = {"dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5)}
_BASE = {"dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}
PRESETS: dict[str, dict[str, Any]] = {
    "small_75": {**_SMALL, "shared": (3, 6, 3, 4), "active": (3, 6, 9, 16)},
    "small_80": {**_SMALL, "shared": (3, 6, 3, 8), "active": (3, 6, 9, 20)},
    "base_50": {**_BASE, "shared": (2, 2, 2, 4), "active": (4, 6, 8, 12)},
    "base_75": {**_BASE, "shared": (4, 8, 4, 5), "active": (4, 8, 12, 21)},
}


class _GatedConvMlp(nn.Module):
    """fc2(gelu(depthwise3x3(a)) * b), (a, b) = fc1(x); 2/3 of `hidden` channels inside. (B, N, dim) kept."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        inner = int(2 * hidden / 3)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        value = self.dwconv(tokens_to_map(value, grid)).flatten(2).transpose(1, 2)
        return self.drop(self.fc2(self.drop(F.gelu(value) * gate)))


class _Block(nn.Module):
    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim, 1e-6), attn, nn.LayerNorm(dim, 1e-6)
        self.mlp, self.drop_path = _GatedConvMlp(dim, int(dim * mlp_ratio), drop), drop_path

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, HeadRouting]:
        mixed, routing = self.attn(self.norm1(x), return_aux=True)
        x = x + drop_samples(mixed, self.drop_path, self.training)
        return x + drop_samples(self.mlp(self.norm2(x), grid), self.drop_path, self.training), routing


class _PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_channels, dim, kernel, stride, kernel // 2), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class MoHTransNeXt(nn.Module):
    """Images (B, in_channels, height, width) -> logits (B, num_classes). Stages at strides 4, 8, 16, ...

    Stages whose `sr_ratio` is above 1 have `regard.nn.MixtureOfHeadAggregatedAttention`, the others `MixtureOfHeadCosineAttention`.

    Args:
        image_size: int or (height, width), multiples of 2 ** (stages + 1): position tables belong to it.
        dims, num_heads, depths, sr_ratios, mlp_ratios: of each stage; defaults: TransNeXt-micro's. shared, active: heads per token in each
            stage, as in `MixtureOfHeadAttention`: `active` includes the shared ones.
        pretrain_size: image size of the pretraining, to scale relative positions by; None: `image_size`.
        pool_grid: side or (height, width) of the pooled keys in place of `sr_ratios`' own. window: of the local keys.
        num_classes: 0 leaves the classifier out: the result is the pooled features. qkv_bias. drop: of projections and MLPs.
            attn_drop: of weights. drop_path: of the last block, rising linearly from 0. variant: of the gates.

    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        image_size: int | Grid = 224,
        dims: Sequence[int] = (48, 96, 192, 384),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 2, 15, 2),
        shared: Sequence[int] = (2, 4, 2, 3),
        active: Sequence[int] = (2, 4, 6, 11),
        *,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        pretrain_size: int | Grid | None = None,
        pool_grid: int | Grid | None = None,
        window: int = 3,
        in_channels: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        variant: str = "released",
    ) -> None:
        super().__init__()
        count = len(dims)
        require(count >= 1, "dims", tuple(dims), "the width of at least one stage")
        named = {"num_heads": num_heads, "depths": depths, "shared": shared, "active": active, "sr_ratios": sr_ratios}
        for name, value in {**named, "mlp_ratios": mlp_ratios}.items():
            require(len(value) == count, name, tuple(value), f"{count} entries, one a stage as in dims")
        require_int("num_classes", num_classes)
        self.in_channels, self.image_size = in_channels, grid_pair("image_size", image_size)
        pretrained = self.image_size if pretrain_size is None else grid_pair("pretrain_size", pretrain_size)
        multiple = 2 ** (count + 1)
        fits = all(side % multiple == 0 for side in self.image_size)
        require(fits, "image_size", self.image_size, f"sides that are multiples of {multiple} with {count} stages")
        rates = drop_rates(drop_path, sum(depths))
        self.patch_embeds, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.grids: list[Grid] = []
        for i, end in enumerate(accumulate(depths)):
            stride = 2 ** (i + 2)
            grid, trained = ((size[0] // stride, size[1] // stride) for size in (self.image_size, pretrained))
            options: dict[str, Any] = {
                "num_heads": num_heads[i], "shared": shared[i], "active": active[i], "pretrain_grid": trained, "qkv_bias": qkv_bias,
                "attn_drop": attn_drop, "proj_drop": drop, "variant": variant,
            }  # fmt: skip
            layer: type[nn.Module] = MixtureOfHeadCosineAttention
            if sr_ratios[i] != 1:
                layer = MixtureOfHeadAggregatedAttention
                options |= {"sr_ratio": sr_ratios[i], "pool_grid": pool_grid, "window": window}
            blocks = [
                _Block(dims[i], layer(dims[i], grid, **options), mlp_ratios[i], drop, rate)
                for rate in rates[end - depths[i] : end]
            ]
            self.grids.append(grid)
            before, kernel, step = (dims[i - 1], 3, 2) if i else (in_channels, 7, 4)
            self.patch_embeds.append(_PatchEmbed(before, dims[i], kernel, step))
            self.stages.append(nn.ModuleList(blocks))
            self.norms.append(nn.LayerNorm(dims[i], 1e-6))
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `TransNeXt` in our names; ours pass unchanged."""

        def stage(name: str) -> Any:
            return lambda match: f"{name}.{int(match[1]) - 1}."

        state = rename_keys(
            state,
            (r"^patch_embed(\d+)\.", stage("patch_embeds")),
            (r"^block(\d+)\.", stage("stages")),
            (r"^norm(\d+)\.", stage("norms")),
            (r"\.dwconv\.dwconv\.", ".dwconv."),
        )
        ours: dict[str, Tensor] = {}
        for name, tensor in state.items():
            head, inside, tail = name.partition(".attn.")
            if inside:  # the aggregated layer's names include those of the other
                (tail,) = MixtureOfHeadAggregatedAttention.official_keys({tail: tensor})
            ours[head + inside + tail] = tensor
        return ours

    def feature_maps(self, x: Tensor) -> tuple[list[Tensor], list[HeadRouting]]:
        """The normalised map (B, dims[i], H', W') of each stage, and the routing of each block."""
        require_image(x, self.in_channels, self.image_size)
        maps: list[Tensor] = []
        routings: list[HeadRouting] = []
        for embed, stage, norm, grid in zip(self.patch_embeds, self.stages, self.norms, self.grids):
            tokens = embed(x)
            for block in stage:  # type: ignore[attr-defined]
                tokens, routing = block(tokens, grid)
                routings.append(routing)
            x = tokens_to_map(norm(tokens), grid)
            maps.append(x)
        return maps, routings

    def forward(self, x: Tensor, return_aux: bool = False) -> Any:
        """return_aux: also the list of `HeadRouting`, one a block, for `regard.ops.head_balance_loss`."""
        maps, routings = self.feature_maps(x)
        logits = self.head(maps[-1].mean((2, 3)))
        return (logits, routings) if return_aux else logits


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def moh_transnext(
    size: str = "base_75", image_size: int | Grid = 224, num_classes: int = 1000, **options: Any
) -> MoHTransNeXt:
    """MoH-ViT as published: "small_80", "small_75", "base_75", "base_50" (heads in use, in percent), with random weights."""
    preset = PRESETS[require_name("size", size, PRESETS)]
    return MoHTransNeXt(image_size, num_classes=num_classes, **{**preset, **options})
