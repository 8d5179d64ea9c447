"""LaMamba-Diff: a U-shaped denoiser of latents whose blocks pair Mamba over the map with attention in windows, linear in the pixels.

Fu et al. 2024, arXiv 2408.02615. Code read for numbers: yunxiangfu2001/LaMamba-Diff @ 27b3c1d (MIT), `model/lamamba.py`, in the form of its
configuration (merging `v1`, skips added, a decoder of one block a stage more). What differs: height and width may differ; joining skips
by concatenation, which scrambles the layout there, is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .._checks import require, require_fraction, require_int, require_tensor
from ..nn.spatial.grids import Grid, grid_pair
from ..nn.spatial.lamamba_block import LaMambaBlock, modulate
from .dit_parts import init_xavier, sincos_2d, time_waves

__all__ = ["LaMambaDiff", "lamamba_diff_xl"]

STAGES = 4


class LaMambaDiff(nn.Module):
    """x (B, in_channels, height, width), times (B,), classes (B,) -> (B, 2 * in_channels, height, width): noise, then variance.

    Args:
        size: tokens: height and width of x over patch_size, multiples of 4. in_channels. patch_size: side of a patch.
        dim: channels of the first stage; the further ones have 2, 4 and 4 times as many. depths: blocks of the encoder's stages.
        mid_depth: blocks between encoder and decoder. extra: blocks that a stage of the decoder has more.
        num_heads: of every stage, or one a stage. window: of the attention.
        num_classes: 0: no classes. class_dropout: how often training forgets the class (number `num_classes` is "no class").
        d_state, ratio, conv_bias, scans, mlp_ratio, parts: as `LaMambaBlock`.

    A new network modulates nothing: each block gives back its input. Parameter names are the authors'.
    """

    def __init__(
        self,
        size: int | Grid = 32,
        in_channels: int = 4,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        mid_depth: int = 2,
        num_heads: int | Sequence[int] = 8,
        *,
        patch_size: int = 1,
        window: int = 8,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        extra: int = 1,
        d_state: int = 1,
        ratio: float = 2.0,
        conv_bias: bool = False,
        scans: str = "continuous",
        mlp_ratio: float = 4.0,
        parts: tuple[str, ...] = ("scan", "attention", "mlp"),
    ) -> None:
        super().__init__()
        self.grid, self.in_channels = grid_pair("size", size), require_int("in_channels", in_channels, 1)
        require(all(side % 4 == 0 for side in self.grid), "size", size, "multiples of 4")
        require(len(depths) == STAGES, "depths", depths, f"{STAGES} numbers")
        heads = [num_heads] * STAGES if isinstance(num_heads, int) else list(num_heads)
        require(len(heads) == STAGES, "num_heads", num_heads, f"an int or {STAGES} of them")
        self.patch_size, self.num_classes = (
            require_int("patch_size", patch_size, 1),
            require_int("num_classes", num_classes, 0),
        )
        self.class_dropout = require_fraction("class_dropout", class_dropout) if num_classes else 1.0
        dims = [dim, 2 * dim, 4 * dim, 4 * dim]
        grids = [(self.grid[0] // cut, self.grid[1] // cut) for cut in (1, 2, 4, 4)]
        condition = dims[-1]

        def blocks(stage: int, depth: int, project: bool) -> nn.ModuleList:
            return nn.ModuleList(
                LaMambaBlock(
                    dims[stage], grids[stage], heads[stage], condition_dim=condition, project=project, window=window,
                    shift=window // 2 * (i % 2), d_state=d_state, ratio=ratio, conv_bias=conv_bias, scans=scans,
                    mlp_ratio=mlp_ratio, parts=parts,
                )
                for i in range(depth)
            )  # fmt: skip

        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_channels, dim, patch_size, patch_size), "norm": nn.LayerNorm(dim)}
        )
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid).unflatten(0, self.grid)[None])
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))}
        )
        table = nn.Embedding(num_classes + (self.class_dropout > 0), condition)
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.layers, self.layers_up = nn.ModuleList(), nn.ModuleList()
        for stage, depth in enumerate(depths):
            made = {"blocks": blocks(stage, depth, False)}
            self.layers.append(nn.ModuleDict(made | ({"downsample": _Merge(dims[stage])} if stage < 2 else {})))
        self.mid_layer = nn.ModuleDict({"blocks": blocks(3, mid_depth, False)})
        for stage in range(STAGES - 1, -1, -1):
            made = {"blocks": blocks(stage, depths[stage] + extra, True)}
            self.layers_up.append(
                nn.ModuleDict(made | ({"upsample": _Expand(dims[stage + 1], 2)} if stage < 2 else {}))
            )
        self.final_up = _Expand(dim, patch_size, keep=True)
        self.final_condition_projection = nn.Linear(condition, dim)
        self.final_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.final_linear = nn.Linear(dim, 2 * in_channels)
        self._init()

    def _init(self) -> None:
        init_xavier(self, self.patch_embed["proj"])  # type: ignore[arg-type]
        for weight in (self.y_embedder["embedding_table"].weight, *(self.t_embedder["mlp"][i].weight for i in (0, 2))):  # type: ignore[index]
            nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]
        changed = [m.adaLN_modulation for m in self.modules() if isinstance(m, LaMambaBlock)]
        for last in (*(part[-1] for part in changed), self.final_adaLN_modulation[-1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def condition(self, times: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, 4 * dim) from times (B,) and classes (B,); classes None: "no class"."""
        require_tensor("times", times, dims=1)
        mlp, table = self.t_embedder["mlp"], self.y_embedder["embedding_table"]
        made = mlp(time_waves(times).to(self.pos_embed.dtype))
        if classes is None:
            require(self.class_dropout > 0, "classes", None, 'classes: this network knows no "no class"')
            classes = torch.full_like(times, self.num_classes, dtype=torch.int64)
        require(
            classes.shape == times.shape,
            "classes",
            f"shape {tuple(classes.shape)}",
            f"{tuple(times.shape)}, that of times",
        )
        if self.training and self.num_classes and self.class_dropout > 0:
            gone = torch.rand(len(classes), device=classes.device) < self.class_dropout
            classes = torch.where(gone, self.num_classes, classes)
        return made + table(classes)

    def forward(self, x: Tensor, times: Tensor, classes: Tensor | None = None) -> Tensor:
        require_tensor("x", x, dims=4, floating=True)
        need = (self.in_channels, self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        require(tuple(x.shape[1:]) == need, "x", f"shape {tuple(x.shape)}", f"(B, {', '.join(map(str, need))})")
        c = self.condition(times, classes)
        h = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1)) + self.pos_embed
        skips = []
        for stage in self.layers:
            h = _through(stage["blocks"], h, c)  # type: ignore[index]
            skips.append(h)
            h = stage["downsample"](h) if "downsample" in stage else h  # type: ignore[index, operator]
        h = h + _through(self.mid_layer["blocks"], h, c)  # type: ignore[arg-type]
        for stage, skip in zip(self.layers_up, reversed(skips)):
            h = stage["upsample"](h) if "upsample" in stage else h  # type: ignore[index, operator]
            h = _through(stage["blocks"], h + skip, c)  # type: ignore[index]
        shift, scale = self.final_adaLN_modulation(self.final_condition_projection(c))[:, None, None].chunk(2, dim=-1)
        h = F.layer_norm(self.final_up(h), (self.final_linear.in_features,), eps=1e-6)
        return self.final_linear(modulate(h, shift, scale)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def guided(self, x: Tensor, times: Tensor, classes: Tensor, strength: float) -> Tensor:
        """As `forward`, the noise moved from that without a class towards that with it, `strength` times as far (1: the class alone)."""
        none = torch.full_like(classes, self.num_classes)
        made = self(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat((classes, none)))
        with_class, without = made[:, : self.in_channels].chunk(2)
        noise = without + strength * (with_class - without)
        return torch.cat((noise, made[: len(x), self.in_channels :]), dim=1)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' network; the masks and indices that it keeps are left out."""
        return LaMambaBlock.official_keys(state)


def lamamba_diff_xl(size: int | Grid = 32, **options: object) -> LaMambaDiff:
    """The authors' LaMamba-Diff-XL: 320 channels, 16 heads, windows of 8, one number a state."""
    return LaMambaDiff(size, dim=320, num_heads=16, **options)  # type: ignore[arg-type]


def _through(blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, c)
    return x


class _Merge(nn.Module):
    """Two by two cells become one: (B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)))


class _Expand(nn.Module):
    """One cell becomes `side` by `side`: (B, H, W, C) -> (B, side H, side W, C / side), or with `keep` of C channels."""

    def __init__(self, dim: int, side: int, keep: bool = False) -> None:
        super().__init__()
        self.side = side
        self.expand = nn.Linear(dim, dim * side * (side if keep else 1), bias=False)
        self.norm = nn.LayerNorm(dim if keep else dim // side)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(rearrange(self.expand(x), "b h w (p q c) -> b (h p) (w q) c", p=self.side, q=self.side))
