"""What the three FIT networks share: the layer string, position tables, the stages, and the authors' variable names.

FIT: Far-reaching Interleaved Transformers (Chen and Li 2023, arXiv 2305.12689); code read for numbers: google-research/pix2seq @
eabd4e9 (Apache-2.0), `architectures/transformers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..nn.layers import rename_keys
from ..nn.sequence.group_read_write import GroupReadWrite
from ..nn.sequence.pre_norm import CrossAttend, PreNormLayer
from ..ops import masks
from ..ops.masks import Mask

__all__ = ["FITStages", "fit_keys", "parse_layers", "position_table", "sin_cos"]

_SPAN = 1000.0  # positions of sine codes run from 0 to here, however many there are


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """FIT's layer string as (local, global) layers a stage: "(4)6(4)" -> [(4, 6), (4, 0)].

    A number in brackets counts local layers, the one after it the global layers of the same stage; only the last stage may have
    none (then its 0 may be left out). Raises a ValueError for anything else.
    """
    need = 'stages like "(4)6(4)": local layers in brackets, then global layers (at least 1 except in the last stage)'
    require(isinstance(layers, str), "layers", layers, need)
    whole = layers + "0" if layers.endswith(")") else layers
    require(re.fullmatch(r"(\(\d+\)\d+)+", whole) is not None, "layers", layers, need)
    stages = [(int(local), int(wide)) for local, wide in re.findall(r"\((\d+)\)(\d+)", whole)]
    require(all(wide > 0 for _, wide in stages[:-1]), "layers", layers, need)
    return stages


def sin_cos(coords: Tensor, dim: int) -> Tensor:
    """Sine and cosine codes (..., dim) of real coordinates (...): the sines of all frequencies, then the cosines."""
    i = torch.arange(dim, device=coords.device)
    # In float32 and in the authors' order: angles reach 1000, where one rounding more shows in the fifth decimal of a sine.
    rates = 1 / torch.pow(10000.0, (2 * (i // 2)).to(torch.float32) / dim)
    angles = coords[..., None] * rates.to(coords.dtype)
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)


def position_table(kind: str, rows: int, columns: int, dim: int) -> tuple[Tensor, bool]:
    """Positions (rows * columns, dim) of a grid, and whether they are learned.

    "learned": normal numbers with deviation 0.02, cut at two deviations. "sin_cos": `sin_cos` of positions spread evenly over
    [0, 1000]; where both sides are longer than 1, half the channels tell the row, half the column.
    """
    if require_name("position", kind, ("learned", "sin_cos")) == "learned":
        return nn.init.trunc_normal_(torch.empty(rows * columns, dim), std=0.02, a=-0.04, b=0.04), True

    def spread(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float32) / max(count - 1, 1) * _SPAN

    if rows == 1 or columns == 1:
        return sin_cos(spread(rows * columns), dim), False
    require(dim % 2 == 0, "dim", dim, "an even number of channels for sine codes of a grid")
    row, column = sin_cos(spread(rows), dim // 2), sin_cos(spread(columns), dim // 2)
    table = torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=-1)
    return table.reshape(rows * columns, dim), False


def add_positions(module: nn.Module, name: str, table: tuple[Tensor, bool]) -> None:
    """Put a table of `position_table` on a module: a parameter when learned, else a buffer outside the state dict."""
    values, learned = table
    if learned:
        module.register_parameter(name, nn.Parameter(values))
    else:
        module.register_buffer(name, values, persistent=False)


class _Stage(nn.Module):
    """Local layers, read, (condition,) global layers, write; parts that a stage does not have are None."""

    def __init__(
        self,
        counts: tuple[int, int],
        last: bool,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        conditions: bool,
        local_attention: bool,
        norm_context: bool,
        cross_mlp: bool,
        ratio: float,
        rates: dict[str, Any],
    ) -> None:
        super().__init__()
        local, wide = counts
        self.local = nn.ModuleList(
            PreNormLayer(dim, num_heads, ratio, attend=local_attention, **rates) for _ in range(local)
        )
        self.exchange: GroupReadWrite | None = None
        self.condition: CrossAttend | None = None
        if wide:
            mlp = ratio if cross_mlp else None
            self.exchange = GroupReadWrite(dim, latent_dim, num_heads, latent_heads, not last, norm_context, mlp)
            if conditions:
                self.condition = CrossAttend(latent_dim, latent_dim, latent_heads, norm_context=norm_context)
        self.wide = nn.ModuleList(PreNormLayer(latent_dim, latent_heads, ratio, **rates) for _ in range(wide))


class FITStages(nn.Module):
    """The interleaved body: tokens (B, t, n, dim) and latents (B, t, m, latent_dim) in and out.

    Args:
        layers: see `parse_layers`. dim, num_heads: of the tokens. latent_dim, latent_heads: of the latents. ratio: of all MLPs.
        conditions: every stage with global layers attends to condition tokens after reading.
        local_attention: False leaves local layers with their MLP alone. norm_context, cross_mlp: see `GroupReadWrite`.
        dropout, attention_dropout, drop_path: of local and global layers, in training.
    """

    def __init__(
        self,
        layers: str,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        ratio: float = 4,
        conditions: bool = False,
        local_attention: bool = True,
        norm_context: bool = True,
        cross_mlp: bool = False,
        **rates: Any,
    ) -> None:
        super().__init__()
        self.counts = parse_layers(layers)
        shared = (dim, latent_dim, num_heads, latent_heads, conditions, local_attention, norm_context, cross_mlp)
        self.stages = nn.ModuleList(
            _Stage(counts, i == len(self.counts) - 1, *shared, ratio, rates) for i, counts in enumerate(self.counts)
        )

    def forward(
        self,
        x: Tensor,
        latents: Tensor,
        *,
        causal_tokens: bool = False,
        causal_groups: bool = False,
        condition: Tensor | None = None,
        written: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """causal_tokens: local attention looks back only, and a group is written to from the latents of the group BEFORE it.
        causal_groups: latents see those of their own and of earlier groups. condition: (B, s, latent_dim). written: a list that
        collects the latents (B, t, m, latent_dim) each stage had when it wrote."""
        t, m = latents.shape[1:3]
        local: Mask | None = masks.causal if causal_tokens else None
        wide: Mask | None = (masks.block(m) | masks.causal) if causal_groups else None
        stages = self._each()
        for stage in stages:
            x = self._local(stage, x, local)
            if stage.exchange is None:
                continue
            latents = stage.exchange.read(latents, x)
            flat = rearrange(latents, "b t m d -> b (t m) d")
            if stage.condition is not None:
                flat = stage.condition(flat, condition)
            for layer in stage.wide:
                flat = layer(flat, wide)
            latents = rearrange(flat, "b (t m) d -> b t m d", t=t)
            if stage is not stages[-1]:
                if written is not None:
                    written.append(latents)
                x = stage.exchange.write(x, _shifted(latents) if causal_tokens else latents)
        return x, latents

    def _each(self) -> list[_Stage]:
        return cast("list[_Stage]", list(self.stages))

    def within_group(self, x: Tensor, before: list[Tensor]) -> Tensor:
        """Tokens (B, 1, k, dim) of one group alone, k of its n tokens; before: what the group before it wrote, a stage each,
        (B, 1, m, latent_dim) (zeros for the first group). The causal form only."""
        for i, stage in enumerate(self._each()):
            x = self._local(stage, x, masks.causal)
            if stage.exchange is not None and i < len(before):
                x = stage.exchange.write(x, before[i])
        return x

    @staticmethod
    def _local(stage: _Stage, x: Tensor, mask: Mask | None) -> Tensor:
        groups = x.shape[1]
        flat = x.flatten(0, 1)
        for layer in stage.local:
            flat = layer(flat, mask)
        return flat.unflatten(0, (-1, groups))


def _shifted(latents: Tensor) -> Tensor:
    """Every group gets the latents of the group before it, the first one zeros."""
    return torch.cat([torch.zeros_like(latents[:, :1]), latents[:, :-1]], dim=1)


def _number(match: re.Match[str], group: int) -> int:
    return int(match[group]) if match[group] else 0


def _numbered(form: str) -> Callable[[re.Match[str]], str]:
    return lambda match: form.format(*(_number(match, i + 1) for i in range(match.re.groups)))


_LAYER = r"/transformer_(?:encoder|decoder_layer)(?:_(\d+))?/"
_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r":0$", ""),
    (r"^.*/(latent_pos_emb|x_pos_emb)/kernel/vis_pos_embedding$", r"/\1"),
    (r"^.*/(token_embedding|inp_token_embedding|outp_token_embedding|outp_bias)$", r"/\1"),
    (r"^[^/]*/", "/"),  # the network's own name
    (r"^/latent_pos_emb", "latent_positions"),
    (r"^/x_pos_emb", "positions"),
    (r"^/x_network(?:_(\d+))?" + _LAYER, _numbered("body.stages.{}.local.{}.")),
    (r"^/l_network(?:_(\d+))?" + _LAYER, _numbered("body.stages.{}.wide.{}.")),
    (r"^/l2x_cross_attn(?:_(\d+))?/", _numbered("body.stages.{}.exchange._read.")),
    (r"^/x2l_cross_attn(?:_(\d+))?/", _numbered("body.stages.{}.exchange._write.")),
    (r"^/l2c_cross_attn(?:_(\d+))?/", _numbered("body.stages.{}.condition.")),
    (r"^/", ""),
    (r"mlp/ffn/", "mlp."),
    (r"(self_mha|cross_mha|mha)/ln/", "norm."),
    (r"cross_mha/enc_ln/", "context_norm."),
    (r"(self_mha|cross_mha|mha)/query/", "attention.q_proj."),
    (r"(self_mha|cross_mha|mha)/key/", "attention.k_proj."),
    (r"(self_mha|cross_mha|mha)/value/", "attention.v_proj."),
    (r"(self_mha|cross_mha|mha)/attention_output/", "attention.out_proj."),
    (r"dense1/", "fc1."),
    (r"dense2/", "fc2."),
    (r"mlp\.ln/", "mlp.norm."),
    (r"/gamma$", ".weight"),
    (r"/beta$", ".bias"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)


def fit_keys(state: dict[str, Tensor], *extra: tuple[str, str | Callable[[re.Match[str]], str]]) -> dict[str, Tensor]:
    """The authors' Keras variables in our names and layout; a state dict of ours passes unchanged.

    Keras keeps dense kernels as [in, out], those of attention as [in, heads, head_dim] and [heads, head_dim, out]. Names begin with
    the layer's own name ("fit/", "fit_denoiser_3/", ...), which is ignored; a trailing ":0" too. `extra` rules run after the
    common ones.
    """
    if not any("/" in name for name in state):
        return dict(state)
    state = {name: _layout(name.removesuffix(":0"), tensor) for name, tensor in state.items()}
    return rename_keys(
        state, *_NAMES, *extra, (r"/kernel$", ".weight"), (r"/bias$", ".bias"), (r"\.kernel$", ".weight")
    )


def _layout(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("/kernel"):
        if "/attention_output/" in name:
            tensor = tensor.flatten(0, 1)
        return tensor.flatten(1).t().contiguous()
    if re.search(r"/(query|key|value)/bias$", name):
        return tensor.flatten()
    return tensor


def group_counts(num_groups: int, tokens: int, latents: int) -> None:
    require_int("groups", num_groups, 1)
    require_int("tokens", tokens, 1)
    require_int("latents", latents, 1)
