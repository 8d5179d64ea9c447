"""AgentSD: agent attention in a pretrained diffusion model, without training.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., 2023, arXiv 2312.08874), section on Stable Diffusion; code
read for numbers: LeapLabTHU/Agent-Attention @ 207ce3e, `agentsd/` (no licence: numbers only). That code serves the original latent
diffusion classes; its diffusers form is broken (two results where one is unpacked). Here diffusers' `BasicTransformerBlock`s are served,
with the same arithmetic: similarity is measured on the block's input, the merged tokens are those behind its first norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_fraction, require_int
from ..methods.call import UnsupportedModelError
from ..ops.agent import agent_attention
from ..ops.attention import attention
from ..ops.token_merging import TokenMerge, token_merge

__all__ = ["AGENT_SD_SCHEDULE", "AgentDiffusion", "merged_attention"]

AGENT_SD_SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"ratio": 0.4, "agent_ratio": 0.95, "stride": (4, 4)},
    20: {"ratio": 0.4, "agent_ratio": 0.5, "stride": (2, 2)},
}
"""The authors' settings for Stable Diffusion: agents in the first 20 steps, then merging alone (those agents would be too many)."""


def merged_attention(
    x: Tensor,
    merge: TokenMerge | None,
    layer: Any,
    scale2_power: float = 0.3,
    shortcut: float = 0.075,
    precise: bool = False,
) -> Tensor:
    """A self-attention of diffusion models on merged tokens, by agents where `merge` has some: (B, N, C) -> (B, N, C).

    Args:
        x: what the layer would be called with. merge: of the block; None: plain attention.
        layer: has `to_q`, `to_k`, `to_v`, `to_out` and `heads` (latent diffusion's and diffusers' attention; of a `to_out` that is a
            list the modules follow each other).
        scale2_power: queries meet agents with head_dim ** (-0.5 * scale2_power). shortcut: factor on the values added to the output.
        precise: scores and weights in float32 (Stable Diffusion 2.1 in half precision).
    """
    tokens = x if merge is None else merge.merge(x)
    agents = None if merge is None else merge.agents(x)

    def heads(part: Tensor) -> Tensor:
        return part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    q, k, v = (heads(project(tokens)) for project in (layer.to_q, layer.to_k, layer.to_v))
    a = None if agents is None else heads(layer.to_q(agents))
    dtype = q.dtype
    if precise:
        q, k, v, a = q.float(), k.float(), v.float(), None if a is None else a.float()
    if a is None:
        out = attention(q, k, v)
    else:
        out = agent_attention(q, k, v, a, scale2=q.shape[-1] ** (-0.5 * scale2_power), shortcut=shortcut)
    out = out.to(dtype).transpose(1, 2).flatten(2)
    for module in layer.to_out if isinstance(layer.to_out, (nn.ModuleList, nn.Sequential)) else [layer.to_out]:
        out = module(out)
    return out if merge is None else merge.unmerge(out)


class AgentDiffusion:
    """Agent attention and token merging in the self-attentions of a diffusers U-Net, for as long as it is attached.

        with regard.integrations.agent_diffusion.AgentDiffusion(pipe, schedule=AGENT_SD_SCHEDULE):
            pipe(prompt, num_inference_steps=50)

    Args:
        model: a U-Net, or a pipeline that has one as `unet`.
        ratio: share of the tokens that are merged away; agent_ratio: share merged away for agents. stride: cells with one target each.
        max_downsample: blocks whose map is at most this much smaller than the latents' are served.
        scale2_power, shortcut, precise: as in `merged_attention`.
        random: random targets (only where the batch is even: prompted and unprompted images must be merged alike). seed: of them.
        schedule: step -> settings (ratio, agent_ratio, stride) from that step on; steps are counted in forwards of the U-Net since
            attaching or `reset()`.

    Leaves no trace after `detach()` or the `with` block. Only plain self-attentions are served: those without masks, added keys or norms
    of queries and keys; others stay as they are.

    Raises:
        UnsupportedModelError: no block to serve. ValueError, TypeError: settings.
    """

    def __init__(
        self,
        model: Any,
        ratio: float = 0.5,
        agent_ratio: float | None = 0.8,
        stride: tuple[int, int] = (2, 2),
        *,
        max_downsample: int = 1,
        scale2_power: float = 0.3,
        shortcut: float = 0.075,
        precise: bool = False,
        random: bool = True,
        seed: int = 0,
        schedule: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self.unet = getattr(model, "unet", model)
        if not isinstance(self.unet, nn.Module):
            raise bad_type("model", model, "a U-Net, or a pipeline that has one as `unet`")
        self.settings: dict[str, Any] = {"ratio": ratio, "agent_ratio": agent_ratio, "stride": stride}
        self.schedule = {require_int("schedule", step): dict(own) for step, own in (schedule or {}).items()}
        for own in (self.settings, *self.schedule.values()):
            for name, value in own.items():
                require(name in ("ratio", "agent_ratio", "stride"), "schedule", name, "ratio, agent_ratio or stride")
                if name != "stride" and value is not None:
                    require_fraction(name, value)
        self.max_downsample = require_int("max_downsample", max_downsample, 1)
        self.scale2_power, self.shortcut, self.precise = scale2_power, shortcut, precise
        self.random, self.seed = bool(random), require_int("seed", seed)
        self._undo: list[Any] = []
        self._processors: list[tuple[Any, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Count steps from 0 again, with the same random targets."""
        self.step = -1
        self._generator = torch.Generator().manual_seed(self.seed)

    def attach(self) -> AgentDiffusion:
        """Join the U-Net; returns itself."""
        if self._undo:
            raise bad_value("model", type(self.unet).__name__, "a model that this is not attached to yet")
        blocks = [
            block for block in self.unet.modules() if type(block).__name__ == "BasicTransformerBlock" and _plain(block)
        ]
        if not blocks:
            raise UnsupportedModelError(
                f"model: {type(self.unet).__name__} has no BasicTransformerBlock with a plain self-attention"
            )
        self.reset()
        self._undo.append(self.unet.register_forward_pre_hook(self._begin, with_kwargs=True))
        for block in blocks:
            processor = _Processor(self)
            self._undo.append(block.register_forward_pre_hook(processor.look, with_kwargs=True))
            self._processors.append((block.attn1, block.attn1.processor))
            block.attn1.set_processor(processor)
        return self

    def detach(self) -> None:
        """Leave the U-Net as it was."""
        for handle in self._undo:
            handle.remove()
        for layer, processor in self._processors:
            layer.set_processor(processor)
        self._undo, self._processors = [], []

    def __enter__(self) -> AgentDiffusion:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def merge_of(self, x: Tensor) -> TokenMerge | None:
        """The merge for a block with input x (B, N, C); None where its map is too small."""
        height, width = self._size
        down = math.ceil(math.sqrt(height * width // max(1, x.shape[1])))
        if down > self.max_downsample:
            return None
        grid = (math.ceil(height / down), math.ceil(width / down))
        if grid[0] * grid[1] != x.shape[1]:
            return None
        now = dict(self.settings)
        for step, own in sorted(self.schedule.items()):
            now |= own if self.step >= step else {}
        random = self.random and x.shape[0] % 2 == 0
        return token_merge(x, grid, random=random, generator=self._generator, **now)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self._size, self.step = (sample.shape[2], sample.shape[3]), self.step + 1


class _Processor:
    """In the place of a layer's attention processor: sees the block's input, then runs the merged attention."""

    def __init__(self, owner: AgentDiffusion) -> None:
        self.owner = owner
        self.merge: TokenMerge | None = None

    def look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.merge = self.owner.merge_of(args[0] if args else kwargs["hidden_states"])

    def __call__(self, layer: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        owner = self.owner
        return merged_attention(hidden_states, self.merge, layer, owner.scale2_power, owner.shortcut, owner.precise)


def _plain(block: Any) -> bool:
    """Whether a block's first attention is a self-attention of `to_q`, `to_k`, `to_v` and `to_out` and nothing else."""
    layer = block.attn1
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj")
    simple = not any(getattr(layer, name, None) is not None for name in extras)
    whole = not getattr(layer, "residual_connection", False) and getattr(layer, "rescale_output_factor", 1.0) == 1.0
    return simple and whole and not getattr(block, "only_cross_attention", False)
