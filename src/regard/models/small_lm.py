"""A small language model into which any mixer of the library plugs by name: for training, comparing and generating.

Pre-norm blocks, `x + conv(norm(x))` (if wanted), `x + mixer(norm(x))`, `x + mlp(norm(x))`; tied embeddings. Mixers that keep a state
generate at the memory of that state, however long the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from ..nn.mixers import MIXERS, build_mixer, can_decode, decode_mixer, run_mixer, state_bytes, takes
from ..nn.sequence.pre_norm import require_rate
from ..nn.sequence.short_conv import ShortConv

__all__ = ["SmallLM", "SmallLMState"]

POSITIONS = ("auto", "rope", "learned", "none")


@dataclass
class SmallLMState:
    """Where a text has been read to: each block's last tokens before the convolution, and its mixer's state; tokens seen so far."""

    convs: list[Tensor | None]
    mixers: list[Any]
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return state_bytes([self.convs, self.mixers])


class Block(nn.Module):
    """One layer of `SmallLM`."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        hidden: int,
        short_conv: int,
        dropout: float,
        bias: bool = True,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        self.conv_norm = nn.RMSNorm(dim, eps) if short_conv else None
        self.conv = ShortConv(dim, short_conv) if short_conv else None
        self.norm, self.mixer, self.drop = nn.RMSNorm(dim, eps), mixer, nn.Dropout(dropout)
        self.mlp_norm, self.mlp = None, None
        if hidden:
            self.mlp_norm = nn.RMSNorm(dim, eps)
            self.mlp = nn.Sequential(nn.Linear(dim, hidden, bias), nn.GELU(), nn.Linear(hidden, dim, bias))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.conv is not None and self.conv_norm is not None:
            x = x + self.conv(self.conv_norm(x))[0]
        mixed, aux = run_mixer(self.mixer, self.norm(x))
        return self._rest(x + self.drop(mixed)), aux

    def decode(self, x: Tensor, before: Tensor | None, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        if self.conv is not None and self.conv_norm is not None:
            made, before = self.conv(self.conv_norm(x), before)
            x = x + made
        mixed, state = decode_mixer(self.mixer, self.norm(x), state)
        return self._rest(x + mixed), before, state

    def _rest(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.mlp_norm is None else x + self.drop(self.mlp(self.mlp_norm(x)))


class SmallLM(nn.Module):
    """ids (B, N) -> logits (B, N, vocab_size), with any mixer of `regard.nn.MIXERS` in its blocks.

    Args:
        vocab_size: tokens. None: the input is vectors (B, N, in_dim), the output (B, N, out_dim), with linear maps for embeddings.
        dim, num_layers, num_heads. mixer: a name, or several for a hybrid (layer i takes number i modulo their count).
        mixer_options: of the mixer; for a hybrid, one mapping for each name or a mapping from names to them.
        mlp_ratio: hidden width of the MLPs over dim; 0: no MLPs.
        positions: "auto": rotary positions in the mixers that have them (`rope_base`), none elsewhere; "rope": the same, and all must
            have them; "learned": a table of `max_len` added to the embeddings, no rotary positions; "none".
        max_len: longest sequence for "learned" and for mixers that must know. rope_base: of rotary positions.
        short_conv: width of a causal convolution before each mixer, as most recurrent language models have it; 0: none (causal only).
        causal: whether a token sees no later ones. dropout: of the branches, in training. tie: output weights are the embedding's.
        mlp_bias: of the MLPs' linear maps. norm_eps: of all norms; None: the dtype's smallest step.

    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        vocab_size: int | None,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        mixer: str | Sequence[str] = "softmax",
        *,
        mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        mlp_ratio: float = 4.0,
        positions: str = "auto",
        max_len: int = 2048,
        rope_base: float = 10000.0,
        short_conv: int = 0,
        causal: bool = True,
        dropout: float = 0.0,
        tie: bool = True,
        in_dim: int | None = None,
        out_dim: int | None = None,
        mlp_bias: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_layers", num_layers), ("num_heads", num_heads), ("max_len", max_len)):
            require_int(name, value, 1)
        require_name("positions", positions, POSITIONS)
        require_int("short_conv", short_conv, 0)
        require(mlp_ratio >= 0, "mlp_ratio", mlp_ratio, "a number >= 0")
        require(causal or not short_conv, "short_conv", short_conv, "0 where not causal")
        require_rate("dropout", dropout)
        names = [mixer] if isinstance(mixer, str) else list(mixer)
        require(bool(names), "mixer", mixer, "at least one name")
        options = options_of(names, mixer_options)
        self.vocab_size, self.dim, self.causal, self.max_len, self.positions = (
            vocab_size,
            dim,
            causal,
            max_len,
            positions,
        )
        self.embedding: nn.Module
        if vocab_size is None:
            need = "widths of the vectors, as vocab_size is None"
            require(in_dim is not None and out_dim is not None, "in_dim, out_dim", (in_dim, out_dim), need)
            self.embedding = nn.Linear(require_int("in_dim", in_dim, 1), dim)
            self.head = nn.Linear(dim, require_int("out_dim", out_dim, 1))
        else:
            require(in_dim is None and out_dim is None, "in_dim, out_dim", (in_dim, out_dim), "None beside vocab_size")
            self.embedding = nn.Embedding(require_int("vocab_size", vocab_size, 1), dim)
            self.head = nn.Linear(dim, vocab_size, bias=False)
            # unit vectors, nearly orthogonal: from the usual tiny ones a circuit for recall takes several times as long to form
            nn.init.normal_(self.embedding.weight, std=dim**-0.5)
            if tie:
                self.head.weight = self.embedding.weight
        self.position_table = nn.Embedding(max_len, dim) if positions == "learned" else None
        if self.position_table is not None:
            nn.init.normal_(self.position_table.weight, std=0.02)
        layers = []
        for index in range(num_layers):
            name, own = names[index % len(names)], dict(options[index % len(names)])
            if takes(name, "rope_base"):
                own.setdefault("rope_base", rope_base if positions in ("auto", "rope") else None)
            elif positions == "rope":
                raise bad_value("positions", positions, f"another kind: the mixer {name!r} has no rotary positions")
            kind = MIXERS[name]
            require(
                kind.layout == "sequence", "mixer", name, "a mixer of sequences (the others: regard.models.SmallViT)"
            )
            layer = build_mixer(
                name, dim, num_heads, causal, layer_idx=index, num_layers=num_layers, max_len=max_len, **own
            )
            layers.append(Block(dim, layer, round(mlp_ratio * dim), short_conv, dropout, mlp_bias, norm_eps))
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(dim, norm_eps)

    @property
    def decodes(self) -> bool:
        """Whether every mixer goes on from a state (else `generate` reads the whole text again for every token)."""
        return all(can_decode(block.mixer) for block in self.blocks)  # type: ignore[arg-type]

    def forward(
        self, ids: Tensor, state: SmallLMState | None = None, return_state: bool = False, return_aux: bool = False
    ) -> Any:
        """ids (B, N) int64 (or vectors (B, N, in_dim)) -> logits (B, N, vocab_size) (or (B, N, out_dim)).

        state: of an earlier call; ids are the tokens after it. return_state: also give the next one, as a pair.
        return_aux: also give the sum of the mixers' own losses (a scalar, 0 where none has one), as a pair; not with a state.
        """
        offset = 0
        if state is not None:
            if not isinstance(state, SmallLMState):
                raise bad_type("state", state, "a SmallLMState")
            offset = state.position
        x = self._embed(ids, offset)
        if state is None and not return_state:
            aux = x.new_zeros((), dtype=torch.float32)
            for block in self.blocks:
                x, own = block(x)
                aux = aux if own is None else aux + own.float()
            logits = self.head(self.norm(x))
            return (logits, aux) if return_aux else logits
        require(not return_aux, "return_aux", True, "False with a state")
        count = len(self.blocks)
        convs = [None] * count if state is None else state.convs
        mixers = [None] * count if state is None else state.mixers
        require(len(mixers) == count, "state", f"{len(mixers)} layers", f"{count}, those of this model")
        after = SmallLMState([], [], offset + x.shape[1])
        for block, conv, mixer in zip(self.blocks, convs, mixers):
            x, conv, mixer = block.decode(x, conv, mixer)  # type: ignore[operator]
            after.convs.append(conv)
            after.mixers.append(mixer)
        logits = self.head(self.norm(x))
        return (logits, after) if return_state else logits

    def _embed(self, ids: Tensor, offset: int) -> Tensor:
        if self.vocab_size is None:
            require_tensor("ids", ids, dims=3, floating=True)
        else:
            require_tensor("ids", ids, dims=2)
            require(not ids.is_floating_point(), "ids", ids.dtype, "integers")
        x = self.embedding(ids)
        if self.position_table is not None:
            end = offset + x.shape[1]
            require(
                end <= self.max_len, "ids", f"{end} tokens", f"at most max_len ({self.max_len}) with learned positions"
            )
            x = x + self.position_table.weight[offset:end]
        return x

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        **first: Any,
    ) -> Tensor:
        """ids (B, N), N >= 1 -> (B, N + max_new_tokens). temperature 0: the likeliest token; else drawn from softmax(logits / it).

        first: further arguments of the forward that reads `ids` (a padding mask), where the model has them and a state.

        In eval mode, whatever mode the model is in. Memory beside the ids: that of the mixers' states where all have one.
        """
        require_int("max_new_tokens", max_new_tokens, 0)
        require(self.vocab_size is not None and self.causal, "generate", "this model", "a causal one with a vocabulary")
        require(temperature >= 0, "temperature", temperature, "a number >= 0")
        require_tensor("ids", ids, dims=2)
        require(ids.shape[1] > 0, "ids", f"shape {tuple(ids.shape)}", "at least one token")
        mode = self.training
        self.eval()
        try:
            state, new, step_by_step = None, ids, self.decodes
            require(step_by_step or not first, "generate", sorted(first), "no such arguments without a state")
            for _ in range(max_new_tokens):
                if step_by_step:
                    logits, state = self(new, state, return_state=True, **first)
                    first = {}
                else:
                    logits = self(ids)
                last = logits[:, -1].float()
                if temperature:
                    new = torch.multinomial(F.softmax(last / temperature, dim=-1), 1, generator=generator)
                else:
                    new = last.argmax(-1, keepdim=True)
                ids = torch.cat((ids, new), dim=1)
            return ids
        finally:
            self.train(mode)

    def state_nbytes(self, length: int, batch: int = 1) -> int | None:
        """Bytes of the state after `length` tokens, measured by running; None where a mixer has none."""
        if not self.decodes:
            return None
        device = self.head.weight.device
        if self.vocab_size is None:
            width = int(self.embedding.weight.shape[1])  # type: ignore[union-attr, index, arg-type]
            ids = torch.zeros(batch, length, width, device=device)
        else:
            ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        with torch.no_grad():
            return self(ids, return_state=True)[1].nbytes

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, dim={self.dim}, positions={self.positions!r}"


def options_of(
    names: list[str], given: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
) -> list[Mapping[str, Any]]:
    if given is None:
        return [{} for _ in names]
    if isinstance(given, Mapping):
        if given and all(isinstance(value, Mapping) for value in given.values()):
            for name in given:
                require_name("mixer_options", name, names)
            return [given.get(name, {}) for name in names]
        require(len(set(names)) == 1, "mixer_options", "one mapping", f"a mapping for each of {', '.join(names)}")
        return [given for _ in names]
    require(len(given) == len(names), "mixer_options", f"{len(given)} mappings", f"{len(names)}, one a name")
    return list(given)
