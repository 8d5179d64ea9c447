"""InLine-DeiT and InLine-Swin: vision transformers with injective linear attention.

Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., NeurIPS 2024, arXiv 2412.06590). Code read for numbers:
LeapLabTHU/InLine @ e463a6f, `models/inline_{deit,swin}.py`, `cfgs/` (no licence: numbers only). The authors' checkpoints load. Not here: a
distillation token, and the PVT and CSwin networks, whose linear blocks are `InLineBlock` and `InLineCSWinBlock`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .._checks import require, require_name
from ..nn.layers import rename_keys
from ..nn.spatial.grids import Grid
from ..nn.spatial.inline_attention import InLineBlock
from .vit_shells import DeiTShell, SwinShell, first_blocks

__all__ = ["InLineDeiT", "InLineSwin", "inline_deit", "inline_swin"]

DEIT = {"t": (192, 6, 224), "s": (320, 10, 288), "b": (384, 12, 448)}
"""Size -> width, heads (of 32 channels), side of the images it was published for."""
SWIN = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24), "IIIS", 0.2),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24), "IISS", 0.3),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32), "IIMS2", 0.5),
}


class InLineDeiT(DeiTShell):
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
        def block(_: int, grid: Grid, rate: float) -> nn.Module:
            return InLineBlock(
                dim, num_heads, grid, 1, mlp_ratio=mlp_ratio, feature_map=feature_map, drop_path=rate, norm_eps=1e-6
            )

        super().__init__(
            dim, depth, block, image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
            drop_path=drop_path,
        )  # fmt: skip

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `VisionTransformer` (inline_deit.py) in our names; ours passes unchanged. Their files hold it under "model"."""
        return _network_keys(state)


class InLineSwin(SwinShell):
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
        stages = len(depths)
        require(len(num_heads) == stages, "num_heads", tuple(num_heads), f"{stages} entries, one a stage as in depths")
        linear = first_blocks(attn_type, depths, "ISM")

        def block(i: int, j: int, width: int, grid: Grid, rate: float) -> nn.Module:
            side = window if j < linear[i] else max(7, window // 8)
            return InLineBlock(
                width, num_heads[i], grid, window=side, shift=side // 2 if j % 2 else 0, mlp_ratio=mlp_ratio, linear=j < linear[i],
                drop_path=rate,
            )  # fmt: skip

        super().__init__(
            dim, depths, block, image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
            drop_path=drop_path,
        )  # fmt: skip

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `InLineSwin` in our names; ours passes unchanged. Their files hold it under "model"."""
        return rename_keys(_network_keys(state), (r"^layers\.", "stages."), (r"^patch_embed\.norm\.", "patch_norm."))


def _network_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename_keys(InLineBlock.official_keys(state), (r"^patch_embed\.proj\.", "patch_embed."))


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
