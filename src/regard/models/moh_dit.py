"""MoH-DiT: the diffusion transformer whose attention routes tokens to heads.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842) on DiT (Peebles and Xie, 2022, arXiv
2212.09748); code read for numbers: SkyworkAI/MoH @ 2cefd57 (Apache-2.0), `MoH-DiT/models.py`. The authors' checkpoints load. What differs:
balance losses are returned; images may be oblong; `skip_inactive` leaves out the heads that a token does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_name, require_tensor
from ..nn.layers import rename_keys
from ..nn.sequence.mixture_of_heads import MixtureOfHeadAttention
from ..nn.sequence.pre_norm import require_rate
from ..nn.spatial.grids import Grid, grid_pair
from ..ops.head_routing import HeadRouting
from .dit_parts import init_xavier, sincos_2d, time_waves
from .vit_shells import require_image

__all__ = ["MoHDiT", "moh_dit"]


def _preset(
    dim: int, heads: Sequence[int], shared: Sequence[int], active: Sequence[int], head_dim: int
) -> dict[str, Any]:
    return {"dim": dim, "num_heads": heads, "shared": shared, "active": active, "head_dim": head_dim}


_THIRDS_L, _THIRDS_XL = (8,) * 8 + (16,) * 8 + (24,) * 8, (8,) * 9 + (16,) * 10 + (24,) * 9
PRESETS: dict[str, dict[str, Any]] = {
    "S/2-75": _preset(384, (6,) * 12, (2, 2, *(3,) * 8, 6, 6), (3, 3, *(4,) * 4, *(5,) * 4, 6, 6), 64),
    "S/2-90": _preset(384, (6,) * 12, (*(3,) * 8, *(6,) * 4), (*(5,) * 8, *(6,) * 4), 64),
    "B/2-75": _preset(768, (12,) * 12, (4, 4, *(6,) * 8, 12, 12), (6, 6, *(9,) * 8, 12, 12), 64),
    "B/2-90": _preset(768, (12,) * 12, (*(6,) * 5, *(7,) * 5, 12, 12), (*(10,) * 5, *(11,) * 5, 12, 12), 64),
    "L/2-75": _preset(1024, _THIRDS_L, (*(8,) * 16, *(12,) * 8), (*(8,) * 8, *(12,) * 8, *(16,) * 8), 64),
    "L/2-90": _preset(1024, _THIRDS_L, (*(8,) * 8, *(16,) * 16), (*(8,) * 8, *(16,) * 8, *(19,) * 8), 64),
    "XL/2-75": _preset(
        1152, _THIRDS_XL, (*(8,) * 9, *(10,) * 10, *(14,) * 9), (*(8,) * 9, *(12,) * 10, *(16,) * 9), 72
    ),
    "XL/2-90": _preset(1152, _THIRDS_XL, (*(8,) * 9, *(16,) * 19), (*(8,) * 9, *(16,) * 10, *(19,) * 9), 72),
}


class _TimeEmbedding(nn.Module):
    """Diffusion steps (B,) -> (B, dim): cosines and sines of 256 rates, then an MLP."""

    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        waves = time_waves(time, self.width)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class _Modulation(nn.Module):
    """silu, then a linear map from the condition (B, dim) to `parts` factors and shifts (B, 1, dim). Starts at zero."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).unsqueeze(1).chunk(self.parts, dim=-1)


class _Block(nn.Module):
    def __init__(self, dim: int, attn: MixtureOfHeadAttention, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attn, self.modulation = attn, _Modulation(dim, 6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, HeadRouting]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        mixed, routing = self.attn(self.norm(x) * (1 + scale) + shift, return_aux=True)
        x = x + gate * mixed
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift), routing


class MoHDiT(nn.Module):
    """Noisy latents (B, in_channels, height, width), steps (B,), class labels (B,) -> (B, out_channels, height, width).

    Args:
        image_size: int or (height, width) of the latents, multiples of `patch_size`.
        dim; num_heads, shared, active: one number, or one a block; `active` includes the shared heads (`MixtureOfHeadAttention`).
        num_layers: blocks; default: as many as the sequences have. head_dim: default `dim // num_heads`.
        num_classes: labels 0 ... num_classes - 1; num_classes itself stands for "no class", and in training takes the place of a label
            with the chance `class_dropout`; with 0 there is no such label. learn_sigma: twice the channels out.
        mlp_ratio. skip_inactive, variant: of the attention.

    Starts as a network that gives zeros (adaLN-Zero). Errors: ValueError or TypeError naming the argument.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int | Grid = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        dim: int = 384,
        num_heads: int | Sequence[int] = 6,
        shared: int | Sequence[int] = 3,
        active: int | Sequence[int] = 5,
        num_layers: int | None = None,
        *,
        head_dim: int | None = None,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        learn_sigma: bool = True,
        mlp_ratio: float = 4.0,
        skip_inactive: bool = False,
        variant: str = "released",
    ) -> None:
        super().__init__()
        for name, number in (("patch_size", patch_size), ("in_channels", in_channels), ("num_classes", num_classes)):
            require_int(name, number, 1)
        self.image_size, self.patch_size = grid_pair("image_size", image_size), patch_size
        fits = all(side % patch_size == 0 for side in self.image_size)
        require(fits, "image_size", self.image_size, f"multiples of patch_size ({patch_size})")
        self.grid: Grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        given = {"num_heads": num_heads, "shared": shared, "active": active}
        lengths = {len(value) for value in given.values() if not isinstance(value, int)}
        layers = require_int("num_layers", num_layers, 1) if num_layers is not None else max(lengths, default=12)
        for name, value in given.items():
            fits = isinstance(value, int) or len(value) == layers
            require(fits, name, value, f"one number, or {layers}, one a block")
        per_block = [[value] * layers if isinstance(value, int) else list(value) for value in given.values()]
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.class_dropout = num_classes, require_rate("class_dropout", class_dropout)
        self.patch = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.time = _TimeEmbedding(dim)
        self.label = nn.Embedding(num_classes + (class_dropout > 0), dim)
        self.register_buffer("positions", sincos_2d(dim, self.grid)[None])
        self.blocks = nn.ModuleList()
        for heads, always, used in zip(*per_block):
            attn = MixtureOfHeadAttention(
                dim, heads, always, used, head_dim=head_dim, qkv_bias=True, skip_inactive=skip_inactive, variant=variant
            )
            self.blocks.append(_Block(dim, attn, int(mlp_ratio * dim)))
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.modulation = _Modulation(dim, 2)
        self.head = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self._init()

    def _init(self) -> None:
        init_xavier(self, self.patch)
        nn.init.normal_(self.label.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(self.time.mlp[index].weight, std=0.02)  # type: ignore[arg-type]
        linears = [module.linear for module in self.modules() if isinstance(module, _Modulation)]
        for linear in (*linears, self.head):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `DiT` (built with `moh=True`) in our names; ours pass unchanged."""
        named = rename_keys(
            state,
            (r"^pos_embed$", "positions"),
            (r"^x_embedder\.proj\.", "patch."),
            (r"^t_embedder\.", "time."),
            (r"^y_embedder\.embedding_table\.", "label."),
            (r"^final_layer\.linear\.", "head."),
            (r"^final_layer\.", ""),
            (r"adaLN_modulation\.1\.", "modulation.linear."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.2."),
        )
        ours: dict[str, Tensor] = {}
        for name, tensor in named.items():
            head, inside, tail = name.partition(".attn.")
            if inside:
                (tail,) = MixtureOfHeadAttention.official_keys({tail: tensor})
            ours[head + inside + tail] = tensor
        return ours

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, return_aux: bool = False) -> Any:
        """return_aux: also the list of `HeadRouting`, one a block, for `regard.ops.head_balance_loss`."""
        require_image(x, self.in_channels, self.image_size)
        for name, value in (("time", time), ("labels", labels)):
            require_tensor(name, value, dims=1)
            require(len(value) == len(x), name, f"{len(value)} entries", f"{len(x)}, one a sample")
        if self.training and self.class_dropout > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.class_dropout
            labels = labels.masked_fill(dropped, self.num_classes)
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(time) + self.label(labels)
        routings = []
        for block in self.blocks:
            tokens, routing = block(tokens, condition)
            routings.append(routing)
        shift, scale = self.modulation(condition)
        out = self.head(self.norm(tokens) * (1 + scale) + shift)
        out = out.unflatten(-1, (self.patch_size, self.patch_size, self.out_channels)).unflatten(1, self.grid)
        out = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return (out, routings) if return_aux else out

    def guided(self, x: Tensor, time: Tensor, labels: Tensor, scale: float, guided_channels: int = 3) -> Tensor:
        """Classifier-free guidance: "no class" plus `scale` times the way from there to the class, on the first `guided_channels` of the
        output (the released sampler guides three of the four, so that figures compare; the rest is the class's own)."""
        require(
            self.class_dropout > 0, "class_dropout", self.class_dropout, "more than 0: there is no label for no class"
        )
        require_int("guided_channels", guided_channels, 1)
        none = torch.full_like(labels, self.num_classes)
        with_class, without = self(torch.cat((x, x)), torch.cat((time, time)), torch.cat((labels, none))).chunk(2)
        first, base = with_class[:, :guided_channels], without[:, :guided_channels]
        return torch.cat((base + scale * (first - base), with_class[:, guided_channels:]), dim=1)


def moh_dit(size: str = "S/2-90", image_size: int | Grid = 32, **options: Any) -> MoHDiT:
    """MoH-DiT as published: "S/2", "B/2", "L/2" or "XL/2", with "-75" or "-90" percent of the heads, with random weights."""
    preset = PRESETS[require_name("size", size, PRESETS)]
    return MoHDiT(image_size, **{**preset, **options})
