"""Agent-DeiT, Agent-Swin, Agent-PVT and Agent-CSwin: vision transformers with agent attention in all blocks or in the first ones.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., 2023, arXiv 2312.08874). Code read for numbers:
LeapLabTHU/Agent-Attention @ 207ce3e, `agent_transformer/models/agent_{deit,swin,pvt,cswin}.py`, `cfgs/` (no licence: numbers only). The
authors' checkpoints load. Not here: a distillation token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..nn.layers import rename_keys
from ..nn.spatial.agent_attention import rename_agent_attention
from ..nn.spatial.agent_blocks import AgentBlock, AgentCSWinBlock
from ..nn.spatial.block_parts import tokens_to_map
from ..nn.spatial.grids import Grid, grid_pair
from ..nn.spatial.inline_attention import InLineBlock
from ..nn.spatial.softmax_block import SoftmaxBlock
from .vit_shells import DeiTShell, SwinShell, drop_rates, first_blocks, init_linear, patch_grid, require_image

__all__ = ["AgentCSWin", "AgentDeiT", "AgentPVT", "AgentSwin", "agent_cswin", "agent_deit", "agent_pvt", "agent_swin"]

DEIT = {"t": (192, 3, 12, 49), "s": (384, 6, 12, 49), "b": (768, 12, 4, 81)}
"""Size -> width, heads, blocks with agents (of 12), agents."""
SWIN = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24), "AAAB", 0.2),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24), "AABB", 0.3),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32), "AAMB2", 0.5),
}
CSWIN = {
    "t": (64, (2, 4, 18, 1), (2, 4, 8, 16), 0.2),
    "s": (64, (3, 6, 29, 2), (2, 4, 8, 16), 0.4),
    "b": (96, (3, 6, 29, 2), (4, 8, 16, 32), 0.5),
}
PVT = {"t": (2, 2, 2, 2), "s": (3, 4, 6, 3), "m": (3, 4, 18, 3), "l": (3, 8, 27, 3)}
AGENTS = (9, 16, 49, 49)


class AgentDeiT(DeiTShell):
    """Images (B, in_channels, side, side) -> logits (B, num_classes), read off a class token.

    Args:
        dim, depth, num_heads: width, blocks, heads. agent_num: agents, a square number or (rows, columns).
        agent_layers: the first blocks, this many, have agents, the others plain softmax; None: all.
        image_size: side or (height, width) in pixels, a multiple of `patch_size`; positions are learned for it. mlp_ratio.
        num_classes: 0 leaves the classifier out: the result is (B, dim). drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_num: int | Grid = 49,
        agent_layers: int | None = None,
        *,
        image_size: int | Grid = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        first = depth if agent_layers is None else require_int("agent_layers", agent_layers, 0)

        def block(i: int, grid: Grid, rate: float) -> nn.Module:
            shared: dict[str, Any] = {
                "mlp_ratio": mlp_ratio,
                "qkv_bias": True,
                "drop_path": rate,
                "norm_eps": 1e-6,
                "cls_tokens": 1,
            }
            if i < first:
                return AgentBlock(dim, num_heads, grid, agent_num, **shared)
            return SoftmaxBlock(dim, num_heads, grid, **shared)

        super().__init__(
            dim, depth, block, image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
            drop_path=drop_path,
        )  # fmt: skip

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `VisionTransformer` (agent_deit.py) in our names; ours passes unchanged. Their files hold it under "model"."""
        return _network_keys(state)


class AgentSwin(SwinShell):
    """Images (B, in_channels, height, width) -> logits (B, num_classes): Swin with agent attention in large windows in some stages.

    Args:
        dim, depths, num_heads: width of the first stage (doubled at each later one), blocks and heads of each stage.
        agent_num: agents of each stage, square numbers.
        attn_type: a letter a stage: "A" agents, "B" softmax in windows of max(7, window // 8), "M" agents in the first blocks, softmax in
            the others; how many of the former follows the letters ("AAMB2"). Default: all agents.
        image_size, patch_size: in pixels; the grid of patches must halve at each stage. window: side of the agents' windows, the whole map
            where it is not smaller (56 in the published networks of 224 pixels: always). mlp_ratio.
        num_classes: 0 leaves the classifier out: the result is the pooled features. drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agent_num: Sequence[int] = AGENTS,
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
        for name, value in (("num_heads", num_heads), ("agent_num", agent_num)):
            require(len(value) == stages, name, tuple(value), f"{stages} entries, one a stage as in depths")
        agents = first_blocks(attn_type, depths, "ABM")

        def block(i: int, j: int, width: int, grid: Grid, rate: float) -> nn.Module:
            side = window if j < agents[i] else max(7, window // 8)
            options: dict[str, Any] = {
                "window": side,
                "shift": side // 2 if j % 2 else 0,
                "mlp_ratio": mlp_ratio,
                "drop_path": rate,
            }
            if j < agents[i]:
                return AgentBlock(width, num_heads[i], grid, agent_num[i], qkv_bias=True, **options)
            return InLineBlock(width, num_heads[i], grid, linear=False, **options)

        super().__init__(
            dim, depths, block, image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
            drop_path=drop_path,
        )  # fmt: skip

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `AgentSwinTransformer` in our names; ours passes unchanged. Their files hold it under "model"."""
        return rename_keys(_network_keys(state), (r"^layers\.", "stages."), (r"^patch_embed\.norm\.", "patch_norm."))


class AgentPVT(nn.Module):
    """Images (B, in_channels, height, width) -> logits (B, num_classes). Stages at strides patch_size, twice that, ...

    Args:
        dims, num_heads, depths, mlp_ratios: of each stage. agent_num: agents of each stage, square numbers.
        attn_type: a letter a stage: "A" agents, "B" softmax with keys reduced by the stage's `sr_ratios`. Default: all agents.
        agent_sr_ratios: reduction of keys in the stages with agents; 1 in all published networks.
        image_size, patch_size: in pixels. num_classes: 0 leaves the classifier out: the result is the pooled features.
        drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        depths: Sequence[int] = (2, 2, 2, 2),
        agent_num: Sequence[int] = AGENTS,
        attn_type: str | None = None,
        *,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        image_size: int | Grid = 224,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(dims)
        agent_sr_ratios = (1,) * stages if agent_sr_ratios is None else agent_sr_ratios
        named = {"num_heads": num_heads, "depths": depths, "agent_num": agent_num, "sr_ratios": sr_ratios}
        for name, value in {**named, "agent_sr_ratios": agent_sr_ratios, "mlp_ratios": mlp_ratios}.items():
            require(len(value) == stages, name, tuple(value), f"{stages} entries, one a stage as in dims")
        kinds = "A" * stages if attn_type is None else attn_type
        fits = len(kinds) == stages and set(kinds) <= set("AB")
        require(fits, "attn_type", attn_type, f"{stages} letters, A or B")
        self.image_size, self.in_channels = grid_pair("image_size", image_size), in_channels
        grid = patch_grid(self.image_size, patch_size)
        self.patch_embeds, self.patch_norms, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.pos_embeds = nn.ParameterList()
        self.grids: list[Grid] = []
        rates, ends = drop_rates(drop_path, sum(depths)), list(accumulate(depths))
        for i, kind in enumerate(kinds):
            grid = patch_grid(grid, 2) if i else grid
            before, side = (dims[i - 1], 2) if i else (in_channels, patch_size)
            self.grids.append(grid)
            self.patch_embeds.append(nn.Conv2d(before, dims[i], side, side))
            self.patch_norms.append(nn.LayerNorm(dims[i]))
            self.pos_embeds.append(nn.init.trunc_normal_(torch.empty(1, grid[0] * grid[1], dims[i]), std=0.02))
            blocks: list[nn.Module] = []
            for rate in rates[ends[i] - depths[i] : ends[i]]:
                shared: dict[str, Any] = {
                    "mlp_ratio": mlp_ratios[i],
                    "qkv_bias": True,
                    "drop_path": rate,
                    "norm_eps": 1e-6,
                }
                if kind == "A":
                    block: nn.Module = AgentBlock(
                        dims[i], num_heads[i], grid, agent_num[i], 0, agent_sr_ratios[i], **shared
                    )
                else:
                    block = SoftmaxBlock(dims[i], num_heads[i], grid, 0, sr_ratios[i], **shared)
                blocks.append(block)
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `PyramidVisionTransformer` in our names; ours passes unchanged. Their files hold it under "model"."""

        def number(name: str) -> Any:
            return lambda match: f"{name}.{int(match[1]) - 1}"

        stacked = rename_keys(
            state,
            (r"^patch_embed(\d+)\.proj", number("patch_embeds")),
            (r"^patch_embed(\d+)\.norm", number("patch_norms")),
            (r"^pos_embed(\d+)", number("pos_embeds")),
            (r"^block(\d+)", number("stages")),
        )
        return _network_keys(stacked)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The map (B, dims[i], H', W') of each stage, without a norm."""
        require_image(x, self.in_channels, self.image_size)
        maps: list[Tensor] = []
        for embed, norm, places, stage, grid in zip(
            self.patch_embeds, self.patch_norms, self.pos_embeds, self.stages, self.grids
        ):
            tokens = norm(embed(x).flatten(2).transpose(1, 2)) + places
            x = tokens_to_map(stage(tokens), grid)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.feature_maps(x)[-1].mean((2, 3)))


class AgentCSWin(nn.Module):
    """Images (B, in_channels, height, width) -> logits (B, num_classes). Stages at strides 4, 8, 16, 32.

    Args:
        dim: channels of the first stage, doubled at each later one. depths, num_heads: of each stage. agent_num: agents of each stage.
        attn_type: a letter a stage, as in `AgentSwin`: "A" agents, "B" CSwin's softmax, "M" agents in the first blocks. Default: all A.
        split_sizes: width of the stripes of blocks with softmax; agent_split_sizes: of blocks with agents (default: those of the published
            networks for 224 pixels, the whole map).
        image_size: side in pixels, or (height, width), multiples of 2 ** (stages + 1). mlp_ratio.
        num_classes: 0 leaves the classifier out: the result is the pooled features. drop_path: of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_num: Sequence[int] = AGENTS,
        attn_type: str | None = None,
        *,
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        agent_split_sizes: Sequence[int] = (56, 28, 14, 7),
        image_size: int | Grid = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(depths)
        named = {"num_heads": num_heads, "agent_num": agent_num, "split_sizes": split_sizes}
        for name, value in {**named, "agent_split_sizes": agent_split_sizes}.items():
            require(len(value) == stages, name, tuple(value), f"{stages} entries, one a stage as in depths")
        agents = first_blocks(attn_type, depths, "ABM")
        self.image_size, self.in_channels = grid_pair("image_size", image_size), in_channels
        multiple = 2 ** (stages + 1)
        fits = all(side % multiple == 0 for side in self.image_size)
        require(fits, "image_size", self.image_size, f"multiples of {multiple} with {stages} stages")
        self.convs, self.conv_norms, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.grids: list[Grid] = []
        rates, ends = drop_rates(drop_path, sum(depths)), list(accumulate(depths))
        for i, depth in enumerate(depths):
            width, stride = dim * 2**i, 2 ** (i + 2)
            grid = (self.image_size[0] // stride, self.image_size[1] // stride)
            conv = nn.Conv2d(width // 2, width, 3, 2, 1) if i else nn.Conv2d(in_channels, width, 7, 4, 2)
            self.convs.append(conv)
            self.conv_norms.append(nn.LayerNorm(width))
            self.grids.append(grid)
            blocks = [
                AgentCSWinBlock(
                    width, num_heads[i], grid, agent_split_sizes[i] if j < agents[i] else split_sizes[i],
                    agent_num[i] if j < agents[i] else None, last_stage=i + 1 == stages, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=rate,
                )
                for j, rate in enumerate(rates[ends[i] - depth : ends[i]])
            ]  # fmt: skip
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `CSWinTransformer` in our names; ours passes unchanged. Their files hold it under "model"."""
        renamed = rename_keys(
            state,
            (r"^stage1_conv_embed\.0", "convs.0"),
            (r"^stage1_conv_embed\.2", "conv_norms.0"),
            (r"^merge(\d+)\.conv", r"convs.\1"),
            (r"^merge(\d+)\.norm", r"conv_norms.\1"),
            (r"^stage(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}."),
        )
        ours: dict[str, Tensor] = {}
        for name, tensor in renamed.items():
            found = re.match(r".*\.attns\.\d\.", name)
            branch = found[0] if found else ""
            own = rename_agent_attention({name.removeprefix(branch): tensor}) if branch else {name: tensor}
            ours |= {branch + key: value for key, value in own.items()}
        return ours

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The map (B, dim * 2**i, H', W') of each stage, without a norm."""
        require_image(x, self.in_channels, self.image_size)
        maps: list[Tensor] = []
        for conv, norm, stage, grid in zip(self.convs, self.conv_norms, self.stages, self.grids):
            x = tokens_to_map(stage(norm(conv(x).flatten(2).transpose(1, 2))), grid)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.feature_maps(x)[-1].flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens).mean(dim=1))


def _network_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each attention's names in ours: with agents, of DeiT or PVT, or of Swin's windows, which keep their joint projection."""
    windowed = {name.partition(".attn.")[0] for name in state if name.endswith(".attn.relative_position_bias_table")}
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, inside, tail = name.partition(".attn.")
        if name.endswith((".attn_mask", ".relative_position_index")):
            continue  # buffers that follow from the sizes
        if inside and block not in windowed:
            ours |= {block + inside + own: value for own, value in rename_agent_attention({tail: tensor}).items()}
        else:
            ours[
                "patch_embed" + name.removeprefix("patch_embed.proj") if name.startswith("patch_embed.proj") else name
            ] = tensor
    return ours


def agent_deit(
    size: str = "t", num_classes: int = 1000, image_size: int | Grid = 224, drop_path: float = 0.0
) -> AgentDeiT:
    """Agent-DeiT-T, S or B (`size` "t", "s", "b") with random weights; B has agents in its first 4 blocks alone, 81 of them."""
    dim, heads, layers, agents = DEIT[require_name("size", size, DEIT)]
    return AgentDeiT(
        dim, 12, heads, agents, layers, image_size=image_size, num_classes=num_classes, drop_path=drop_path
    )


def agent_swin(size: str = "t", num_classes: int = 1000, drop_path: float | None = None) -> AgentSwin:
    """Agent-Swin-T, S or B (`size` "t", "s", "b") for 224 x 224 images, with random weights; `drop_path=None` is the published one."""
    dim, depths, heads, kinds, rate = SWIN[require_name("size", size, SWIN)]
    rate = rate if drop_path is None else drop_path
    return AgentSwin(dim, depths, heads, AGENTS, kinds, num_classes=num_classes, drop_path=rate)


def agent_pvt(
    size: str = "t", num_classes: int = 1000, image_size: int | Grid = 224, drop_path: float = 0.1
) -> AgentPVT:
    """Agent-PVT-T, S, M or L (`size` "t", "s", "m", "l") with random weights."""
    depths = PVT[require_name("size", size, PVT)]
    return AgentPVT(depths=depths, image_size=image_size, num_classes=num_classes, drop_path=drop_path)


def agent_cswin(size: str = "t", num_classes: int = 1000, drop_path: float | None = None) -> AgentCSWin:
    """Agent-CSwin-T, S or B (`size` "t", "s", "b") for 224 x 224 images, with random weights; `drop_path=None` is the published one."""
    dim, depths, heads, rate = CSWIN[require_name("size", size, CSWIN)]
    rate = rate if drop_path is None else drop_path
    return AgentCSWin(dim, depths, heads, AGENTS, "AABB", num_classes=num_classes, drop_path=rate)
