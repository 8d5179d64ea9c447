"""Efficient Local Attention (ELA), Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks"
(2024, arXiv 2403.01123). Code read for numbers: Xuwei86/ELA_Code @ cd4594d.

What differs from the code: where the authors' class cannot be built because its group counts do not divide the
channels, ours takes the nearest smaller counts that do (see `EfficientLocalAttention`).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_name
from ..layers import GroupNorm
from .gate import FeatureGate, require_feature_map, strip_means

# letter -> (kernel size, channels per conv group or None for depthwise, GroupNorm groups)
_VARIANTS: dict[str, tuple[int, int | None, int]] = {
    "T": (5, None, 32),
    "B": (7, None, 16),
    "S": (5, 8, 16),
    "L": (7, 8, 16),
}


def _divisor_at_most(n: int, bound: int) -> int:
    """The largest divisor of n that is at most `bound` (at least 1)."""
    return next(d for d in range(max(1, min(n, bound)), 0, -1) if n % d == 0)


class EfficientLocalAttention(FeatureGate):
    """Gate a feature map by where it is strong along each axis: `y = x * a_h * a_w`.

    The map is averaged over its width and over its height; both strips go through ONE shared 1-D convolution, ONE
    shared GroupNorm and a sigmoid, giving a_h (B, C, H, 1) and a_w (B, C, 1, W). No channel reduction, no residual,
    the same in training and evaluation. Cost: `channels² / groups * kernel_size + 2 * channels` parameters.

    Args:
        channels: number of channels C.
        variant: the paper's settings. "T": kernel 5, depthwise, GroupNorm(32); "B": kernel 7, depthwise,
            GroupNorm(16); "S": kernel 5, 8 channels a group, GroupNorm(16); "L" (default): kernel 7, 8 channels a
            group, GroupNorm(16). None: the three numbers below must all be given.
        kernel_size: odd length of the 1-D convolution; overrides the variant's.
        groups: groups of the convolution; overrides the variant's. Must divide `channels`.
        gn_groups: groups of the GroupNorm, 0 for no normalisation; overrides the variant's. Must divide `channels`.

    A variant's group counts that do not divide `channels` (where the authors' class raises) are lowered to the
    largest divisor of `channels` below them; a count given as an argument is never changed.

    The authors use the class names ELA72 and ELA73 for different arithmetic in each folder:

    ==========================  =====================================  ==========================================
    folder                      ELA72                                  ELA73
    ==========================  =====================================  ==========================================
    MbV2, YOLOX                 `variant="L"`                          `variant="T", groups=1`
    semantic (segmentation)     `variant="S"`                          `variant="B"`
    YOLOF                       `variant="T"`                          `variant="L", gn_groups=32`
    ==========================  =====================================  ==========================================

    (and ELA2: `variant=None, kernel_size=3, groups=1, gn_groups=0`; ELA6: `"T", gn_groups=0`; ELA10:
    `"S", gn_groups=0`). Parameter names are theirs: `conv.weight`, `gn.weight`, `gn.bias`.

    Raises:
        ValueError: an unknown variant, an even kernel, a count that does not divide `channels`, a missing number when
            `variant=None`; in `forward`, an input that is not (B, channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        variant: str | None = "L",
        kernel_size: int | None = None,
        groups: int | None = None,
        gn_groups: int | None = None,
    ) -> None:
        super().__init__()
        require_int("channels", channels, 1)
        if variant is None:
            for argument, value in (("kernel_size", kernel_size), ("groups", groups), ("gn_groups", gn_groups)):
                if value is None:
                    raise bad_value(argument, value, "a number, because variant=None sets none")
        else:
            kernel, per_group, norm_groups = _VARIANTS[require_name("variant", variant, _VARIANTS)]
            kernel_size = kernel if kernel_size is None else kernel_size
            if groups is None:
                groups = channels if per_group is None else _divisor_at_most(channels, channels // per_group)
            gn_groups = _divisor_at_most(channels, norm_groups) if gn_groups is None else gn_groups
        kernel_size = require_int("kernel_size", kernel_size, 1)
        require(kernel_size % 2 == 1, "kernel_size", kernel_size, "an odd int >= 1")
        groups = require_int("groups", groups, 1)
        require(channels % groups == 0, "groups", groups, f"a divisor of channels={channels}")
        gn_groups = require_int("gn_groups", gn_groups, 0)
        require(gn_groups == 0 or channels % gn_groups == 0, "gn_groups", gn_groups, f"0 or a divisor of {channels}")

        self.channels = channels
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.gn = GroupNorm(gn_groups, channels) if gn_groups else None

    def _weigh(self, strip: Tensor) -> Tensor:
        """(B, C, L) -> attention in (0, 1) of the same shape."""
        strip = self.conv(strip)
        return (strip if self.gn is None else self.gn(strip)).sigmoid()

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> (a_h (B, C, H, 1), a_w (B, C, 1, W)), each in (0, 1)."""
        require_feature_map(x, self.channels)
        rows, columns = strip_means(x)
        return self._weigh(rows).unsqueeze(3), self._weigh(columns).unsqueeze(2)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
