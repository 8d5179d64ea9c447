"""MAViT: the pyramid network of MALA, magnitude-aware linear attention early and softmax attention late.

Rectifying Magnitude Neglect in Linear Attention (Fan et al., ICCV 2025, arXiv 2507.00698). Code read for numbers: qhfan/MALA @ 7114e63,
`classfication_release/model.py` (no licence: numbers only). The presets there use linear attention in the first two of four stages
only; `linear_stages=4` gives the fully linear network. The authors' checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..nn.channel.gate import require_feature_map
from ..nn.layers import rename_keys
from ..nn.sequence.pre_norm import require_rate
from ..nn.spatial.magnitude_attention import MagnitudeAwareBlock

__all__ = ["MAViT", "mavit"]

# name: (dims, depths, heads, width of the last projection, layer scales, stochastic depth in training)
PRESETS = {
    "t": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 2048, (1.0, 1.0, 1.0, 1.0), 0.1),
    "s": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 2048, (1.0, 1.0, 1.0, 1.0), 0.15),
    "b": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 2048, (1.0, 1.0, 1e-6, 1e-6), 0.4),
    "l": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 2560, (1e-6, 1e-6, 1e-6, 1e-6), 0.55),
}


class MAViT(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes). Stages at strides 4, 8, 16, ...

    Args:
        dims, depths, num_heads: channels, blocks and heads of each stage. The defaults are those of the tiny network.
        linear_stages: how many stages, from the first, use magnitude-aware linear attention; the others use softmax (released: 2 of 4).
        mlp_ratio: of the blocks' feed-forward, one or one a stage. layer_scales: initial layer scale of each stage, None for none.
        projection: channels before the classifier. num_classes: 0 leaves the classifier out: the result is (B, projection).
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.

    Any image size works (positions are rotary and convolutional). Use `mavit("t")` for the published sizes.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        linear_stages: int = 2,
        *,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float | Sequence[float] = 3.5,
        layer_scales: Sequence[float | None] | None = None,
        projection: int = 1024,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        layer_scales = [None] * len(dims) if layer_scales is None else layer_scales
        require(len(dims) >= 1, "dims", tuple(dims), "the width of at least one stage")
        ratios = (float(mlp_ratio),) * len(dims) if isinstance(mlp_ratio, (int, float)) else tuple(mlp_ratio)
        lists = {"depths": depths, "num_heads": num_heads, "layer_scales": layer_scales, "mlp_ratio": ratios}
        for name, value in lists.items():
            require(len(value) == len(dims), name, tuple(value), f"{len(dims)} entries, one a stage as in dims")
        require_int("linear_stages", linear_stages)
        require(
            linear_stages <= len(dims), "linear_stages", linear_stages, f"at most the number of stages ({len(dims)})"
        )
        require_int("num_classes", num_classes)
        last = max(1, sum(depths) - 1)
        rates = [require_rate("drop_path", drop_path) * block / last for block in range(sum(depths))]
        self.in_channels = in_channels
        half = dims[0] // 2
        layers: list[nn.Module] = []
        for width, out, stride in ((in_channels, half, 2), (half, half, 1), (half, half, 1), (half, dims[0], 2)):
            layers += [nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.GELU()]
        self.stem = nn.Sequential(*layers[:-1])
        ends = list(accumulate(depths))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [
                MagnitudeAwareBlock(
                    dim,
                    num_heads[i],
                    i < linear_stages,
                    mlp_ratio=ratios[i],
                    layer_scale=layer_scales[i],
                    drop_path=rate,
                )
                for rate in rates[ends[i] - depths[i] : ends[i]]
            ]
            stage = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
            if i + 1 < len(dims):
                stage["downsample"] = _Downsample(dim, dims[i + 1])
            self.stages.append(stage)
        self.proj, self.norm = nn.Conv2d(dims[-1], projection, 1), nn.BatchNorm2d(projection)
        self.head = nn.Conv2d(projection, num_classes, 1) if num_classes else nn.Identity()
        self.apply(_init)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `MALA` in our names; their rotary angles, which are constants, are left out. Ours passes unchanged.

        The authors' checkpoint files hold it under "model".
        """
        state = {key: value for key, value in state.items() if not key.endswith("RoPE.angle")}
        return rename_keys(
            MagnitudeAwareBlock.official_keys(state), (r"^patch_embed\.proj\.", "stem."), (r"^layers\.", "stages.")
        )

    def feature_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map of each stage, before it is halved: strides 4, 8, 16, ... (sizes rounded up)."""
        require_feature_map(x, self.in_channels)
        x, maps = self.stem(x), []
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleDict)
            maps.append(stage["blocks"](x))
            x = stage["downsample"](maps[-1]) if "downsample" in stage else maps[-1]
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.proj(self.feature_maps(x)[-1])))
        return self.head(x.mean(dim=(2, 3), keepdim=True)).flatten(1)


class _Downsample(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Conv2d(dim, out_dim, 3, 2, 1), nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mavit(size: str = "t", num_classes: int = 1000, linear_stages: int = 2, drop_path: float | None = None) -> MAViT:
    """MAViT-T, S, B or L (`size` "t", "s", "b", "l"; T has 16.5 M parameters) with random weights; `drop_path=None` is the paper's."""
    dims, depths, heads, projection, scales, rate = PRESETS[require_name("size", size, PRESETS)]
    return MAViT(
        dims,
        depths,
        heads,
        linear_stages,
        num_classes=num_classes,
        projection=projection,
        layer_scales=scales,
        drop_path=rate if drop_path is None else drop_path,
    )
