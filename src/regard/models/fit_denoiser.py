"""FITDenoiser, the network of FIT's diffusion models: image tokens, time and condition in, denoised tokens out.

FIT: Far-reaching Interleaved Transformers (Chen and Li 2023, arXiv 2305.12689); code read for numbers: google-research/pix2seq @
eabd4e9 (Apache-2.0), `architectures/transformers.py` (`FITDenoiser`, `ScalarEmbedding`). Nothing differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..nn.sequence.pre_norm import FeedForward
from .fit import check_groups
from .fit_stages import FITStages, add_positions, fit_keys, group_counts, position_table, sin_cos

__all__ = ["FITDenoiser"]

_EPS = 1e-6
_TIME_SCALE = 1000.0


class TimeEmbedding(nn.Module):
    """A scalar and optional features (B, 1 + features) -> (B, 4 * dim): normalised sine codes, two linear layers."""

    def __init__(self, dim: int, features: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim + features, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # a half type cannot tell times of 0 ... 1000 apart
        code = sin_cos(x[:, 0].to(wide) * _TIME_SCALE, self.dim)
        code = ((code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)).to(x.dtype)
        return self.fc2(torch.cat([F.silu(self.fc1(code)), x[:, 1:]], dim=-1))


class FITDenoiser(nn.Module):
    """(x (B, groups, tokens, in_dim), time (B,), condition) -> (out (B, groups, tokens, out_dim), latents).

    Like `regard.models.FIT`; after each read, latents also attend to the time and condition tokens. Latents come back as they are
    (not normalised), to be handed to the next denoising step: `forward(..., latents=...)` (self-conditioning).

    Args: as `FIT`, and
        out_dim: channels of the result (default in_dim). condition_dim: channels of the condition (a class as one-hot, features).
        time_features: numbers beside the time itself, appended to its code: time is then (B, 1 + time_features).
        project_condition: False takes conditions that are latent_dim wide already, as they are.
        self_condition: latents of the step before, through an MLP and a norm that starts at zero, are added to the first ones.
        local_attention: False leaves local layers with their MLP alone. cross_mlp: an MLP after each read and write.
        norm_context: normalise what is attended to. latent_dim is a multiple of 4.
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
        condition_dim: int,
        latent_dim: int | None = None,
        num_heads: int = 8,
        latent_heads: int | None = None,
        out_dim: int | None = None,
        ratio: float = 4,
        causal: bool = False,
        position: str = "learned",
        latent_position: str = "learned",
        time_features: int = 0,
        project_condition: bool = True,
        self_condition: bool = False,
        local_attention: bool = True,
        cross_mlp: bool = False,
        norm_context: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        group_counts(groups, tokens, latents)
        latent_dim, latent_heads = latent_dim or dim, latent_heads or num_heads
        require(latent_dim % 4 == 0, "latent_dim", latent_dim, "a multiple of 4")
        self.groups, self.tokens, self.latents, self.in_dim, self.causal = groups, tokens, latents, in_dim, causal
        self.condition_dim, self.time_features = require_int("condition_dim", condition_dim, 1), time_features
        self.latent_shape = (groups, latents, latent_dim)
        self.stem, self.stem_norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim, _EPS)
        self.time = TimeEmbedding(latent_dim // 4, require_int("time_features", time_features))
        need = f"latent_dim ({latent_dim}) with project_condition=False"
        require(project_condition or condition_dim == latent_dim, "condition_dim", condition_dim, need)
        self.condition = nn.Linear(condition_dim, latent_dim) if project_condition else nn.Identity()
        add_positions(self, "positions", position_table(position, tokens, 1, dim))
        add_positions(self, "latent_positions", position_table(latent_position, groups, latents, latent_dim))
        self.self_condition = self_condition
        if self_condition:
            self.previous = FeedForward(latent_dim, ratio)
            self.previous_norm = nn.LayerNorm(latent_dim, _EPS)
            nn.init.zeros_(self.previous_norm.weight)
        rates: dict[str, Any] = {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path}
        self.body = FITStages(
            layers,
            dim,
            latent_dim,
            num_heads,
            latent_heads,
            ratio,
            True,
            local_attention,
            norm_context,
            cross_mlp,
            **rates,
        )
        self.norm = nn.LayerNorm(dim, _EPS)
        self.head = nn.Linear(dim, out_dim or in_dim)

    def forward(
        self, x: Tensor, time: Tensor, condition: Tensor, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """time (B,) or (B, 1 + time_features); condition (B, condition_dim) or (B, s, condition_dim); latents (B, groups, latents,
        latent_dim), of the step before (default zeros; read only with self_condition)."""
        check_groups(x, self.groups, self.tokens, self.in_dim)
        require_tensor("time", time, floating=True)
        time = time[:, None] if time.dim() == 1 else time
        need = f"({len(x)}, {1 + self.time_features})"
        require(time.shape == (len(x), 1 + self.time_features), "time", f"shape {tuple(time.shape)}", need)
        require_tensor("condition", condition, floating=True)
        condition = condition[:, None] if condition.dim() == 2 else condition
        need = f"({len(x)}, {self.condition_dim}) or ({len(x)}, s, {self.condition_dim})"
        fits = condition.dim() == 3 and len(condition) == len(x) and condition.shape[-1] == self.condition_dim
        require(fits, "condition", f"shape {tuple(condition.shape)}", need)
        if latents is not None:
            need = f"({len(x)}, {', '.join(map(str, self.latent_shape))})"
            require(latents.shape == (len(x), *self.latent_shape), "latents", f"shape {tuple(latents.shape)}", need)

        hidden = self.stem_norm(self.stem(x)) + self.positions
        first = self.latent_positions.unflatten(0, (self.groups, self.latents)).expand(len(x), -1, -1, -1)
        if self.self_condition:
            previous = torch.zeros_like(first) if latents is None else latents
            first = first + self.previous_norm(self.previous(previous))
        told = torch.cat([self.time(time)[:, None], self.condition(condition)], dim=1)
        hidden, last = self.body(hidden, first, causal_groups=self.causal, condition=told)
        return self.head(self.norm(hidden)), last

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' Keras variables ("fit_denoiser/stem/kernel", ...) in our names and layout."""
        return fit_keys(
            state,
            (r"^stem/", "stem."),
            (r"^stem_ln", "stem_norm"),
            (r"^time_emb/dense0/", "time.fc1."),
            (r"^time_emb/fc1\.", "time.fc2."),
            (r"^cond_proj/", "condition."),
            (r"^latent_prev_proj/ffn/ln", "previous.norm"),
            (r"^latent_prev_proj/ffn/", "previous."),
            (r"^latent_prev_ln", "previous_norm"),
            (r"^x_output_ln", "norm"),
            (r"^x_output_linear/", "head."),
        )
