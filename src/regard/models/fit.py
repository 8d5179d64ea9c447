"""FIT, an encoder for very long inputs: local attention in groups of tokens, global attention among a few latents of each group.

FIT: Far-reaching Interleaved Transformers (Chen and Li 2023, arXiv 2305.12689); code read for numbers: google-research/pix2seq @
eabd4e9 (Apache-2.0), `architectures/transformers.py` (`FIT`). The causal language model is `FITAR`, the diffusion network
`FITDenoiser`. Nothing differs in arithmetic; with a group of one token the authors' sine codes divide by zero, here they are
those of position 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from .fit_stages import FITStages, add_positions, fit_keys, group_counts, position_table

__all__ = ["FIT"]

_EPS = 1e-6


class FIT(nn.Module):
    """Tokens x (B, groups, tokens, in_dim) -> (tokens (B, groups, tokens, dim), latents (B, groups, latents, latent_dim)), normalised.

    Each stage: local layers inside every group; the group's latents read it (cross attention); global layers among all latents;
    every group reads its latents back. Cost t·n² + (t·m)² in place of (t·n)². Take tokens as features when the last stage has no
    global layers, latents when it has.

    Args:
        layers: stages, e.g. "(2)4(2)": local layers in brackets, global layers after; see `regard.models.parse_layers`.
        groups: t. tokens: n, tokens a group. latents: m, latents a group.
        in_dim: channels of the input tokens. dim, latent_dim: widths of tokens and latents (latent_dim default dim).
        num_heads, latent_heads: heads of local and of global layers (latent_heads default num_heads).
        side_dim: channels of side tokens `y`, put in front of every group without a position; None: there are none.
        ratio: hidden width of MLPs. causal: latents see only their own and earlier groups (video, sequences of frames).
        position: of tokens in their group, shared by all groups: "learned", "sin_cos" or "sin_cos_2d" (a square group, in rows).
        latent_position: what latents start as: "learned" or "sin_cos" (a grid of groups and latents).
        dropout, attention_dropout, drop_path: MLP units, attention weights, residual branches; in training.

    Errors: ValueError or TypeError naming the argument. Source: see the module; `official_keys` takes the authors' Keras variables.
    """

    positions: Tensor
    latent_positions: Tensor

    def __init__(
        self,
        layers: str,
        groups: int,
        tokens: int,
        latents: int,
        in_dim: int,
        dim: int,
        latent_dim: int | None = None,
        num_heads: int = 8,
        latent_heads: int | None = None,
        side_dim: int | None = None,
        ratio: float = 4,
        causal: bool = False,
        position: str = "learned",
        latent_position: str = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        group_counts(groups, tokens, latents)
        require_int("in_dim", in_dim, 1)
        latent_dim, latent_heads = latent_dim or dim, latent_heads or num_heads
        self.groups, self.tokens, self.latents, self.in_dim, self.causal = groups, tokens, latents, in_dim, causal
        self.side_dim = side_dim
        self.stem, self.stem_norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim, _EPS)
        if side_dim is not None:
            self.side_stem = nn.Linear(require_int("side_dim", side_dim, 1), dim)
            self.side_norm = nn.LayerNorm(dim, _EPS)
        if position == "sin_cos_2d":
            side = math.isqrt(tokens)
            require(side * side == tokens, "position", position, f"a square number of tokens a group, not {tokens}")
            add_positions(self, "positions", position_table("sin_cos", side, side, dim))
        else:
            add_positions(self, "positions", position_table(position, tokens, 1, dim))
        add_positions(self, "latent_positions", position_table(latent_position, groups, latents, latent_dim))
        rates: dict[str, Any] = {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path}
        self.body = FITStages(layers, dim, latent_dim, num_heads, latent_heads, ratio, **rates)
        self.norm, self.latent_norm = nn.LayerNorm(dim, _EPS), nn.LayerNorm(latent_dim, _EPS)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, groups, tokens, in_dim); y (B, groups, any, side_dim) stands first in each group of the tokens that come out."""
        check_groups(x, self.groups, self.tokens, self.in_dim)
        hidden = self.stem_norm(self.stem(x)) + self.positions
        if y is not None:
            require(self.side_dim is not None, "y", "side tokens", "a network built with side_dim")
            require_tensor("y", y, dims=4, floating=True)
            need = f"({x.shape[0]}, {self.groups}, any, {self.side_dim})"
            fits = y.shape[:2] == x.shape[:2] and y.shape[-1] == self.side_dim
            require(fits, "y", f"shape {tuple(y.shape)}", need)
            hidden = torch.cat([self.side_norm(self.side_stem(y)), hidden], dim=2)
        latents = self.latent_positions.unflatten(0, (self.groups, self.latents)).expand(len(x), -1, -1, -1)
        hidden, latents = self.body(hidden, latents, causal_groups=self.causal)
        return self.norm(hidden), self.latent_norm(latents)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' Keras variables ("fit/x_network/transformer_encoder/mha/query/kernel", ...) in our names and layout."""
        return fit_keys(
            state,
            (r"^stem/", "stem."),
            (r"^stem_ln", "stem_norm"),
            (r"^stem_y/", "side_stem."),
            (r"^stem_y_ln", "side_norm"),
            (r"^x_output_ln", "norm"),
            (r"^l_output_ln", "latent_norm"),
        )


def check_groups(x: Tensor, groups: int, tokens: int, dim: int) -> None:
    require_tensor("x", x, dims=4, floating=True)
    require(x.shape[1:] == (groups, tokens, dim), "x", f"shape {tuple(x.shape)}", f"(B, {groups}, {tokens}, {dim})")
