"""Where the parts of a language model are: its blocks with their attention and feed-forward modules, and the projections of each head.

For tools that read or change single parts (patching, logit attribution, training slices of chosen heads). Nothing here knows a family by
name; what cannot be found is refused in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from ..methods.call import UnsupportedModelError
from .session import Session
from .sites import find_sites

__all__ = ["Block", "HeadSlices", "blocks", "final_norm", "head_slices", "output_projection"]

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "feedforward", "block_sparse_moe", "moe")
_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "output_proj")
_SPLIT = {name: (f"{name}_proj", f"w{name}", name, f"{name}_lin") for name in "qkv"}
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "wqkv")


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the main tower: its number among the attention layers, itself, its attention, its feed-forward part (None: not
    found)."""

    layer: int
    module: nn.Module
    attention: nn.Module
    feed_forward: nn.Module | None


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of the tower that generates text, in order. Raises `UnsupportedModelError` where there is no stack of blocks."""
    session = Session(model, [])
    sites = find_sites(session)
    path_of = {module: path for path, module in model.named_modules()}
    found = []
    for module, site in sites.items():
        if site.tower != session.main_tower or site.cross:
            continue
        parts = path_of[module].split(".")
        depth = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
        if depth is None:
            raise UnsupportedModelError(f"model: {path_of[module]} of {type(model).__name__} is in no stack of blocks")
        block = model.get_submodule(".".join(parts[: depth + 1]))
        forward = next(
            (part for name in _FEED_FORWARD if isinstance(part := getattr(block, name, None), nn.Module)), None
        )
        found.append(Block(site.layer, block, module, forward))
    found.sort(key=lambda block: block.layer)
    return found


def final_norm(model: nn.Module) -> nn.Module:
    """The norm before the output head. Raises `UnsupportedModelError` where none is found."""
    from ..methods.decoders.early_exit import _final_norm

    return _final_norm(model)


def output_projection(attention: nn.Module) -> nn.Module:
    """The module that maps the joined head outputs (..., H * Dv) back to the residual stream."""
    for name in _OUT:
        part = getattr(attention, name, None)
        if isinstance(part, nn.Module):
            return part
    raise UnsupportedModelError(f"model: found no output projection in {type(attention).__name__}")


@dataclass(frozen=True, eq=False)
class HeadSlices:
    """Which entries of one weight (and bias) belong to each query head.

    Attributes:
        role: "q", "k", "v" or "o". name: of the projection within the attention module. weight: the parameter. bias: or None.
        axis: of the weight along which heads lie. index: (heads, entries) int64 into that axis, one row a QUERY head. (In grouped
            attention the heads of a group have the same rows in k and v.) bias_index: the same into the bias; None: the bias is shared.
    """

    role: str
    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    axis: int
    index: Tensor
    bias_index: Tensor | None


def head_slices(attention: nn.Module, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, HeadSlices]:
    """The slices of the q, k, v and o projections of an attention module, by role.

    Knows separate projections (Llama, Qwen, OPT, ...), q, k, v one after another in one (GPT-2, Phi-3), and interleaved head by head
    (GPT-NeoX); `nn.Linear` and transformers' `Conv1D`.

    Raises `UnsupportedModelError` for others.
    """
    group = num_heads // num_kv_heads
    own = torch.arange(num_heads * head_dim).view(num_heads, head_dim)
    shared = torch.arange(num_kv_heads * head_dim).view(num_kv_heads, head_dim).repeat_interleave(group, 0)
    found: dict[str, HeadSlices] = {}
    fused = next((name for name in _FUSED if isinstance(getattr(attention, name, None), nn.Module)), None)
    if fused is not None:
        sizes = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        start = 0
        for role, size in sizes.items():
            if fused == "query_key_value":  # head by head: (H, 3, D)
                require(group == 1, "model", f"{group} query heads a key head in one interleaved projection", "one")
                index = torch.arange(3 * num_heads * head_dim).view(num_heads, 3, head_dim)[:, "qkv".index(role)]
            else:
                index = (own if role == "q" else shared) + start
            start += size
            found[role] = _slices(role, fused, getattr(attention, fused), index, sum(sizes.values()), outputs=True)
    else:
        for role, names in _SPLIT.items():
            name = next((name for name in names if isinstance(getattr(attention, name, None), nn.Module)), None)
            if name is None:
                raise UnsupportedModelError(f"model: found no {role} projection in {type(attention).__name__}")
            heads = num_heads if role == "q" else num_kv_heads
            index = own if role == "q" else shared
            found[role] = _slices(role, name, getattr(attention, name), index, heads * head_dim, outputs=True)
    out = output_projection(attention)
    name = next(name for name, part in attention.named_children() if part is out)
    found["o"] = _slices("o", name, out, own, num_heads * head_dim, outputs=False)
    return found


def _slices(role: str, name: str, module: Any, index: Tensor, size: int, outputs: bool) -> HeadSlices:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise UnsupportedModelError(f"model: {name} is a {type(module).__name__} without a plain weight matrix")
    turned = type(module).__name__ == "Conv1D"  # (in, out), the other way round than nn.Linear
    axis = int(outputs == turned)
    if weight.shape[axis] != size:
        raise UnsupportedModelError(f"model: {name} has {weight.shape[axis]} rows for heads, need {size}")
    bias = getattr(module, "bias", None)
    index = index.to(weight.device)
    return HeadSlices(role, name, weight, bias, axis, index, index if outputs else None)
