"""FITAR, FIT as a causal language model over any tokens (bytes, pixels).

FIT: Far-reaching Interleaved Transformers (Chen and Li 2023, arXiv 2305.12689); code read for numbers: google-research/pix2seq @
eabd4e9 (Apache-2.0), `architectures/transformers.py` (`FITAR`), `models/image_ar_model.py`. Nothing differs in arithmetic. Beyond
it: inputs shorter than the whole sequence, the loss, and generation (the authors have none).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from .fit_stages import FITStages, add_positions, fit_keys, group_counts, position_table
from .sampling import Sampling

__all__ = ["FITAR"]

_EPS = 1e-6


class FITAR(nn.Module):
    """Token ids (B, groups, tokens) or (B, N) -> logits of the same shape with vocab_size channels behind; looks back only.

    Local layers are causal inside a group; latents see their own and earlier groups; a group is written to from the latents of the
    group BEFORE it, so token k sees its own group up to k and, through latents, all earlier groups. Logits at a place may depend on
    the token AT that place: `loss` and `generate` shift by one, with `start` in front.

    Args: as `regard.models.FIT`, and
        vocab_size: tokens are ints below it. tied: one table for input and output. output_bias: on the logits.
        start: the token that stands in front of every sequence.
    """

    positions: Tensor
    latent_positions: Tensor

    def __init__(
        self,
        vocab_size: int,
        layers: str,
        groups: int,
        tokens: int,
        latents: int,
        dim: int,
        latent_dim: int | None = None,
        num_heads: int = 8,
        latent_heads: int | None = None,
        ratio: float = 4,
        tied: bool = True,
        output_bias: bool = True,
        start: int = 0,
        position: str = "learned",
        latent_position: str = "learned",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        group_counts(groups, tokens, latents)
        latent_dim, latent_heads = latent_dim or dim, latent_heads or num_heads
        self.vocab_size = require_int("vocab_size", vocab_size, 1)
        require(0 <= require_int("start", start) < vocab_size, "start", start, f"a token below {vocab_size}")
        self.groups, self.tokens, self.latents, self.start = groups, tokens, latents, start
        self.embedding = nn.Embedding(vocab_size, dim)
        self.output_embedding = None if tied else nn.Embedding(vocab_size, dim)
        self.output_bias = nn.Parameter(_cut_normal(torch.empty(vocab_size))) if output_bias else None
        for table in filter(None, (self.embedding, self.output_embedding)):
            _cut_normal(table.weight)
        add_positions(self, "positions", position_table(position, tokens, 1, dim))
        add_positions(self, "latent_positions", position_table(latent_position, groups, latents, latent_dim))
        rates: dict[str, Any] = {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path}
        self.body = FITStages(layers, dim, latent_dim, num_heads, latent_heads, ratio, **rates)
        self.norm = nn.LayerNorm(dim, _EPS)

    @property
    def max_length(self) -> int:
        """Tokens that fit: groups * tokens."""
        return self.groups * self.tokens

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, t, tokens) with t <= groups, or flat (B, N) of any length N <= max_length."""
        return self._logits(ids, None)

    def _logits(self, ids: Tensor, written: list[Tensor] | None) -> Tensor:
        require_tensor("ids", ids)
        require(not ids.is_floating_point() and ids.dim() in (2, 3), "ids", f"shape {tuple(ids.shape)}", "(B, N) ints")
        grouped = ids
        if ids.dim() == 2:
            require(ids.shape[1] <= self.max_length, "ids", f"{ids.shape[1]} tokens", f"at most {self.max_length}")
            # what fills up the last group stands behind all real tokens, so nothing sees it
            grouped = F.pad(ids, (0, -ids.shape[1] % self.tokens)).unflatten(1, (-1, self.tokens))
        need = f"(B, t, {self.tokens}) with t <= {self.groups}"
        fits = grouped.shape[2] == self.tokens and grouped.shape[1] <= self.groups
        require(fits, "ids", f"shape {tuple(ids.shape)}", need)
        hidden = self.embedding(grouped) + self.positions
        latents = self.latent_positions.unflatten(0, (self.groups, self.latents))[: grouped.shape[1]]
        hidden, _ = self.body(
            hidden, latents.expand(len(ids), -1, -1, -1), causal_tokens=True, causal_groups=True, written=written
        )
        logits = self._read_out(hidden)
        return logits if ids.dim() == 3 else logits.flatten(1, 2)[:, : ids.shape[1]]

    def _read_out(self, hidden: Tensor) -> Tensor:
        return F.linear(self.norm(hidden), (self.output_embedding or self.embedding).weight, self.output_bias)

    def loss(self, ids: Tensor, ignore: int = -100) -> Tensor:
        """Mean cross entropy, in nats, of each of ids (B, N) given the ones before it (the first one given `start`).

        Places where ids is `ignore` are left out of the mean (and are fed as `start`).
        """
        require_tensor("ids", ids, dims=2)
        inputs = F.pad(ids.masked_fill(ids == ignore, self.start)[:, :-1], (1, 0), value=self.start)
        return F.cross_entropy(self(inputs).flatten(0, 1), ids.flatten(), ignore_index=ignore)

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """ids (B, N), N >= 0 -> (B, N + max_new_tokens), as `loss` sees them (`start` is not part of ids).

        Once a group is full the whole past is run again; between, only the current group, with the latents kept from the groups
        before. sampling: see `regard.models.Sampling` (default: the likeliest token). Dropout is off for the duration.
        """
        require_tensor("ids", ids, dims=2)
        require_int("max_new_tokens", max_new_tokens, 0)
        wanted = ids.shape[1] + max_new_tokens
        need = f"at most {self.max_length} tokens with the new ones"
        require(wanted <= self.max_length, "max_new_tokens", f"{wanted} tokens in all", need)
        choose = Sampling(**sampling)
        training = self.training
        self.eval()
        try:
            return self._continued(F.pad(ids, (1, 0), value=self.start), wanted, choose)
        finally:
            self.train(training)

    def _continued(self, inputs: Tensor, wanted: int, choose: Sampling) -> Tensor:
        before: list[Tensor] = []
        done = -1
        while inputs.shape[1] <= wanted:
            group = (inputs.shape[1] - 1) // self.tokens
            if group != done:
                done, before = group, self._latents_before(inputs, group)
            current = inputs[:, group * self.tokens :]
            hidden = self.embedding(current)[:, None] + self.positions[: current.shape[1]]
            hidden = self.body.within_group(hidden, before)
            inputs = torch.cat([inputs, choose(self._read_out(hidden[:, 0, -1]))[:, None]], dim=1)
        return inputs[:, 1:]

    def _latents_before(self, inputs: Tensor, group: int) -> list[Tensor]:
        """For each stage that writes, what group `group` is written to from, (B, 1, latents, latent_dim)."""
        written: list[Tensor] = []
        self._logits(inputs[:, : max(group, 1) * self.tokens], written)
        if group == 0:
            return [torch.zeros_like(latents[:, :1]) for latents in written]
        return [latents[:, group - 1 : group] for latents in written]

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' Keras variables ("fitar/token_embedding", ...) in our names and layout."""
        return fit_keys(
            state,
            (r"^(inp_)?token_embedding$", "embedding.weight"),
            (r"^outp_token_embedding$", "output_embedding.weight"),
            (r"^outp_bias$", "output_bias"),
            (r"^x_output_ln", "norm"),
        )


def _cut_normal(tensor: Tensor) -> Tensor:
    return nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04)
