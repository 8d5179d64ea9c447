"""SHViT, Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design" (CVPR 2024, arXiv
2401.16456). Code read for numbers: ysj9909/SHViT @ 6a729cc (MIT), model/shvit.py and model/build.py; also timm's shvit.

The authors' checkpoints and timm's load through `SHViT.official_keys`. Nothing differs in arithmetic; beyond them,
`feature_maps` gives the stages' maps (their detection backbone) and any number of stages can be built.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .._checks import require, require_name
from ..nn.channel.gate import require_feature_map
from ..nn.layers import BNLinear, ConvBN, ConvFeedForward, Residual, SqueezeExcite, fuse_conv_bn, rename_keys
from ..nn.spatial.single_head_self_attention import SingleHeadSelfAttention


def _depthwise(dim: int, bn_weight_init: float = 1.0) -> Residual:
    return Residual(ConvBN(dim, dim, 3, 1, 1, groups=dim, bn_weight_init=bn_weight_init))


class SHViTBlock(nn.Module):
    """`x += depthwise3x3(x)`; `x += SHSA(x)` (kind "s" only); `x += feed_forward(x)`. (B, dim, H, W) kept.

    Args:
        dim: channels; the feed-forward is twice as wide.
        qk_dim, pdim: see `regard.nn.SingleHeadSelfAttention`; not used by kind "i".
        kind: "s" attends, "i" does not (early stages).
    """

    def __init__(self, dim: int, qk_dim: int = 16, pdim: int | None = None, kind: str = "s") -> None:
        super().__init__()
        require_name("kind", kind, ("s", "i"))
        self.conv = _depthwise(dim, bn_weight_init=0.0)
        self.mixer = Residual(SingleHeadSelfAttention(dim, qk_dim, pdim)) if kind == "s" else nn.Identity()
        self.ffn = Residual(ConvFeedForward(dim, 2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the state dict of the authors' BasicBlock to ours."""
        return SingleHeadSelfAttention.official_keys(state)


class SHViTMerging(nn.Module):
    """Halve the map: 1x1 to 4·dim, ReLU, depthwise 3x3 with stride 2, ReLU, squeeze-excite, 1x1 to `out_dim`.

    (B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvBN(dim, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, 2, 1, groups=hidden)
        self.se = SqueezeExcite(hidden, 0.25)
        self.conv3 = ConvBN(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.conv2(self.conv1(x).relu()).relu()))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the state dict of the authors' PatchMerging to ours."""
        return SingleHeadSelfAttention.official_keys(state)


class SHViT(nn.Module):
    """Image classifier (B, in_channels, H, W) -> (B, num_classes): a stem of stride 16, then stages of `SHViTBlock`s.

    Stages run at strides 16, 32, 64, ... Use `shvit_s1` ... `shvit_s4` for the published sizes.

    Args:
        dims: channels of each stage; the first must be divisible by 8 (the stem grows dims[0]/8, /4, /2, dims[0]).
        partial_dims: channels that attend in each stage, see `SingleHeadSelfAttention`.
        depths: number of blocks of each stage.
        kinds: "s" or "i" of each stage, see `SHViTBlock`.
        qk_dim: channels of queries and keys: one number, or one of each stage.
        in_channels: of the image.
        num_classes: 0 leaves the classifier out: the result is the pooled features (B, dims[-1]).
        distillation: a second classifier; in training the result is the pair (logits, distillation logits), in
            evaluation their mean.

    Any image size works. The authors' networks are for 224² (S4: 256²) images, normalised with ImageNet's mean and
    standard deviation. Branches start at zero: norm weights of 0 hide errors, so randomise them in tests.

    Raises:
        ValueError: lists of different lengths, widths out of range; in `forward`, an input that is not (B, C, H, W).
    """

    def __init__(
        self,
        dims: Sequence[int] = (128, 256, 384),
        partial_dims: Sequence[int] = (32, 64, 96),
        depths: Sequence[int] = (1, 2, 3),
        kinds: Sequence[str] = ("s", "s", "s"),
        qk_dim: int | Sequence[int] = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        require(len(dims) >= 1, "dims", tuple(dims), "the width of at least one stage")
        qk_dims = (qk_dim,) * len(dims) if isinstance(qk_dim, int) else tuple(qk_dim)
        per_stage = {"partial_dims": partial_dims, "depths": depths, "kinds": kinds, "qk_dim": qk_dims}
        for argument, value in per_stage.items():
            require(len(value) == len(dims), argument, tuple(value), f"{len(dims)} entries, one a stage as in dims")
        require(dims[0] >= 8 and dims[0] % 8 == 0, "dims", tuple(dims), "a first width divisible by 8")
        require(num_classes >= 0, "num_classes", num_classes, "an int >= 0")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.distillation = distillation

        widths = [in_channels, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
        stem: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            stem += [ConvBN(width, next_width, 3, 2, 1), nn.ReLU()]
        self.stem = nn.Sequential(*stem[:-1])

        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            if i > 0:
                parts["downsample"] = nn.Sequential(
                    _depthwise(dims[i - 1]),
                    Residual(ConvFeedForward(dims[i - 1], 2 * dims[i - 1])),
                    SHViTMerging(dims[i - 1], dim),
                    _depthwise(dim),
                    Residual(ConvFeedForward(dim, 2 * dim)),
                )
            blocks = [SHViTBlock(dim, qk_dims[i], partial_dims[i], kinds[i]) for _ in range(depths[i])]
            parts["blocks"] = nn.Sequential(*blocks)
            self.stages.append(nn.Sequential(parts))

        self.head = BNLinear(dims[-1], num_classes) if num_classes else nn.Identity()
        if distillation:
            self.head_dist = BNLinear(dims[-1], num_classes) if num_classes else nn.Identity()

    def feature_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, in_channels, H, W) -> the map of each stage, strides 16, 32, 64, ... (sizes rounded up)."""
        require_feature_map(x, self.in_channels)
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Image (B, in_channels, H, W) -> logits (B, num_classes); a pair when training with distillation."""
        pooled = self.feature_maps(x)[-1].mean(dim=(2, 3))
        if not self.distillation:
            return self.head(pooled)
        logits, distilled = self.head(pooled), self.head_dist(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def fuse(self) -> SHViT:
        """Fold all batch norms and depthwise skips into single layers, in place; returns self, in eval mode.

        Outputs stay those of eval mode up to rounding. For inference: the folded network must not be trained on.
        """
        fuse_conv_bn(self)
        return self

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a state dict of the authors' SHViT (fused ones too) or of timm's to ours; ours passes unchanged.

        The authors' checkpoint files hold it under "model".
        """
        return rename_keys(SHViTBlock.official_keys(state), *_NETWORK_RULES)


# The authors number a later stage's modules through: three make the transition from the stage before, blocks follow.
_TRANSITION = {"0.0": 0, "0.1": 1, "1": 2, "2.0": 3, "2.1": 4}


def _later_stage(match: re.Match[str]) -> str:
    stage, index = int(match[1]) - 1, match[2]
    if index in _TRANSITION:
        return f"stages.{stage}.downsample.{_TRANSITION[index]}."
    return f"stages.{stage}.blocks.{int(index) - 3}."


_NETWORK_RULES = (
    (r"^patch_embed\.", "stem."),
    (r"^blocks1\.", "stages.0.blocks."),
    (r"^blocks([2-9])\.([02]\.[01]|\d+)\.", _later_stage),
)


def shvit_s1(num_classes: int = 1000, distillation: bool = False) -> SHViT:
    """SHViT-S1: widths 128, 224, 320; 6.3 M parameters, for 224² images. Random weights."""
    return SHViT((128, 224, 320), (32, 48, 68), (2, 4, 5), _KINDS, num_classes=num_classes, distillation=distillation)


def shvit_s2(num_classes: int = 1000, distillation: bool = False) -> SHViT:
    """SHViT-S2: widths 128, 308, 448; 11.5 M parameters, for 224² images. Random weights."""
    return SHViT((128, 308, 448), (32, 66, 96), (2, 4, 5), _KINDS, num_classes=num_classes, distillation=distillation)


def shvit_s3(num_classes: int = 1000, distillation: bool = False) -> SHViT:
    """SHViT-S3: widths 192, 352, 448; 14.2 M parameters, for 224² images. Random weights."""
    return SHViT((192, 352, 448), (48, 75, 96), (3, 5, 5), _KINDS, num_classes=num_classes, distillation=distillation)


def shvit_s4(num_classes: int = 1000, distillation: bool = False) -> SHViT:
    """SHViT-S4: widths 224, 336, 448; 16.6 M parameters, for 256² images. Random weights."""
    return SHViT((224, 336, 448), (48, 72, 96), (4, 7, 6), _KINDS, num_classes=num_classes, distillation=distillation)


_KINDS = ("i", "s", "s")
