"""Block Transformer: one decoder over blocks of tokens with the long cache, a second one inside each block with hardly any.

Block Transformer: Global-to-Local Language Modeling for Fast Inference (Ho et al. 2024, NeurIPS, arXiv 2406.02657); code read for
numbers: itsnamgyu/block-transformer @ 17842dd (MIT), `model/` and `custom_dataset/`.

What differs: a block that follows a padding block is not predicted (the authors predict it from a state that attended to padding;
their training data never has one); -100 in labels leaves a token out of the mean (theirs stay in it as zeros); block losses leave
out padding blocks (the contrastive one of the authors divides by zero there); generation samples, stops a row at its own end of text
and takes prompts of different lengths in one batch. Embedders that attend (RoBERTa, T5) can be given as modules; one vector a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_name, require_tensor
from ..nn.sequence.neox import NeoXStack
from ..nn.sequence.t5_decoder import T5Decoder
from ..ops.growing_store import GrowingStore
from .block_parts import LookupEmbedder, TokenDecoder, left_pad_to_block
from .sampling import Sampling

__all__ = ["BlockOutput", "BlockState", "BlockTransformer", "block_transformer", "left_pad_to_block"]

_STRATEGIES = ("prefix", "summation", "cross")


@dataclass
class BlockOutput:
    """loss: the sum of what was asked for, or None without labels. token_loss, block_loss, auto_encoding_loss: its parts (weighted).
    logits: (B, n - 1, block, V), of blocks 1 ... n - 1; zeros where nothing is predicted. None where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_loss: Tensor | None = None
    block_loss: Tensor | None = None
    auto_encoding_loss: Tensor | None = None


@dataclass
class BlockState:
    """What generation carries from block to block: the block decoder's cache and which blocks are real, (B, n) bool."""

    stores: list[GrowingStore]
    seen: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, storage not in use yet included."""
        return sum(store.nbytes for store in self.stores)


class BlockTransformer(nn.Module):
    """A language model over blocks of `block` tokens: embedder, causal block decoder, token decoder (`TokenDecoder`).

    Block b + 1 is spelled out from what the block decoder made of blocks 0 ... b; the first block is never predicted. Decoding
    needs one step of the block decoder a block (its cache has one entry a BLOCK) and `block` steps of the token decoder, whose
    cache is thrown away after the block; a prompt costs the token decoder nothing.

    Args:
        vocab_size: V. dim: width of the block decoder. block_layers, token_layers: layers of the two. num_heads: of the block decoder.
        block: tokens a block. prefix: vectors made of a block state, for "prefix"; the other strategies make `block` of them.
        strategy: "prefix", "summation" or "cross" (a T5 token decoder).
        token_dim, token_heads: of the token decoder (default as the block decoder). hidden, token_hidden: MLPs (default 4 times).
        embedder: "lookup", "projection", or a module (ids (M, block), mask (M, block)) -> (M, dim). embed_dim: table width, for
            "projection" (default dim).
        rotary, rotary_base, parallel, eps: of GPT-NeoX layers (Pythia's defaults).
        bos, eos, pad: token ids (Pythia's: 0, 0, 1); eos None never ends.
        block_loss: None, "mse" or "contrastive" (temperature 0.07): the block decoder is also to predict the next block's embedding.
        auto_encoding: the token decoder is also to spell out a block from its own embedding (needs no extra weights).
        block_loss_weight, auto_encoding_weight: their weights. dropout: of both decoders, in training.
        t5: further arguments of `regard.nn.T5Decoder` for "cross" (head_dim, feed_forward, ...), and tied=True for a shared table.

    Errors: ValueError or TypeError naming the argument. `official_keys` takes the authors' state dicts; `from_vanilla` starts from a
    GPT-NeoX model.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        block_layers: int,
        token_layers: int,
        num_heads: int,
        block: int = 4,
        prefix: int = 2,
        strategy: str = "prefix",
        token_dim: int | None = None,
        token_heads: int | None = None,
        hidden: int | None = None,
        token_hidden: int | None = None,
        embedder: str | nn.Module = "lookup",
        embed_dim: int | None = None,
        rotary: float = 0.25,
        rotary_base: float = 10000.0,
        parallel: bool = True,
        eps: float = 1e-5,
        bos: int = 0,
        eos: int | None = 0,
        pad: int = 1,
        block_loss: str | None = None,
        block_loss_weight: float = 1.0,
        auto_encoding: bool = False,
        auto_encoding_weight: float = 1.0,
        dropout: float = 0.0,
        t5: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block = require_int("vocab_size", vocab_size, 1), require_int("block", block, 1)
        self.strategy = require_name("strategy", strategy, _STRATEGIES)
        for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
            known = (token is None and name == "eos") or (isinstance(token, int) and 0 <= token < vocab_size)
            require(known, name, token, f"a token id below {vocab_size}")
        self.eos, self.pad = eos, pad
        if block_loss is not None:
            require_name("block_loss", block_loss, ("mse", "contrastive"))
        self.block_loss, self.block_loss_weight = block_loss, block_loss_weight
        self.auto_encoding, self.auto_encoding_weight = auto_encoding, auto_encoding_weight
        if isinstance(embedder, str):
            kind = require_name("embedder", embedder, ("lookup", "projection"))
            embedder = LookupEmbedder(vocab_size, dim, block, pad, kind == "projection", embed_dim)
        elif not isinstance(embedder, nn.Module):
            raise bad_type("embedder", embedder, '"lookup", "projection" or a module')
        self.embedder = embedder
        neox: dict[str, Any] = {"rotary": rotary, "rotary_base": rotary_base, "parallel": parallel, "eps": eps}
        self.block_decoder = NeoXStack(block_layers, dim, num_heads, hidden, dropout=dropout, **neox)
        width, heads = token_dim or dim, token_heads or num_heads
        options, tied = dict(t5 or {}), False
        if strategy == "cross":
            tied = options.pop("tied", False)
            stack: NeoXStack | T5Decoder = T5Decoder(
                token_layers, width, heads, hidden=token_hidden, dropout=dropout, **options
            )
        else:
            require(not options, "t5", t5, f"None with strategy {strategy!r}")
            stack = NeoXStack(token_layers, width, heads, token_hidden, dropout=dropout, **neox)
        count = require_int("prefix", prefix, 1) if strategy == "prefix" else block
        self.token_decoder = TokenDecoder(vocab_size, dim, block, strategy, count, width, bos, stack, tied)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Blocks (B, n, block) and which tokens are real -> (B, n, dim)."""
        return self.embedder(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, random_padding: bool = False
    ) -> BlockOutput:
        """ids (B, n, block), or flat (B, N), which are padded on the left to a block boundary.

        labels: like ids, usually ids themselves; -100 leaves a token out. They are NOT to be shifted. mask: like ids, nonzero for
        real tokens (default: all; padding that is added here is never real). random_padding: for flat ids in training, see
        `left_pad_to_block`.
        """
        ids, mask, labels = self._blocks(ids, mask, labels, random_padding)
        seen = mask.any(-1)
        embeds = self.embed(ids, mask)
        states = self.block_decoder(embeds, seen=None if bool(seen.all()) else seen)
        predicted = seen[:, 1:] & seen[:, :-1]
        targets = ids[:, 1:][predicted]
        spelled = self.token_decoder.states(states[:, :-1][predicted], targets)
        real = mask[:, 1:][predicted] | (targets != self.pad)
        if labels is None:
            logits = spelled.new_zeros(*predicted.shape, self.block, self.vocab_size)
            rows = logits.new_zeros(*spelled.shape[:2], self.vocab_size)
            rows = rows.masked_scatter(real[..., None], self.token_decoder.logits(spelled[real]))
            return BlockOutput(logits=logits.masked_scatter(predicted[..., None, None], rows))
        wanted = labels[:, 1:][predicted].masked_fill(~real, -100)
        parts = [self._token_loss(spelled, wanted)]
        out = BlockOutput(token_loss=parts[0])
        if self.block_loss is not None:
            out.block_loss = self.block_loss_weight * self._block_loss(
                states[:, :-1][predicted], embeds[:, 1:][predicted]
            )
            parts.append(out.block_loss)
        if self.auto_encoding:
            again = self.token_decoder.states(embeds[:, 1:][predicted], targets)
            out.auto_encoding_loss = self.auto_encoding_weight * self._token_loss(again, wanted)
            parts.append(out.auto_encoding_loss)
        out.loss = torch.stack(parts).sum()
        return out

    def _token_loss(self, states: Tensor, wanted: Tensor) -> Tensor:
        kept = wanted != -100
        logits = self.token_decoder.logits(states[kept])
        return F.cross_entropy(logits, wanted[kept], reduction="sum") / kept.sum().clamp(min=1)

    def _block_loss(self, states: Tensor, embeds: Tensor) -> Tensor:
        states, embeds = states.float(), embeds.detach().float()
        if self.block_loss == "mse":
            return F.mse_loss(states, embeds)
        likeness = F.normalize(states, dim=-1) @ F.normalize(embeds, dim=-1).T / 0.07
        return F.cross_entropy(likeness, torch.arange(len(states), device=states.device))

    def _blocks(
        self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, random_padding: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        require_tensor("ids", ids)
        need = f"(B, N) or (B, n, {self.block}) ints"
        fits = ids.dim() == 2 or (ids.dim() == 3 and ids.shape[-1] == self.block)
        require(fits and not ids.is_floating_point() and ids.numel() > 0, "ids", f"shape {tuple(ids.shape)}", need)
        for name, other in (("mask", mask), ("labels", labels)):
            if other is not None:
                need = f"shape {tuple(ids.shape)}"
                require(other.shape == ids.shape, name, f"shape {tuple(other.shape)}", need)
        if ids.dim() == 3:
            return ids, (torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()), labels
        if labels is None:
            blocks, real = left_pad_to_block(ids, self.block, self.pad, mask, random_padding)
            return blocks, real, None
        # labels go the way of ids: the places of ids are laid out, and both are read from there
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
        places, real = left_pad_to_block(places, self.block, 0, mask, random_padding)
        flat = places.flatten(1)
        blocks = F.pad(ids, (1, 0), value=self.pad).gather(1, flat).view_as(places)
        return blocks, real, F.pad(labels, (1, 0), value=-100).gather(1, flat).view_as(places)

    # ---- generation ----

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, BlockState]:
        """A prompt, as in `forward` -> (the last block's state (B, dim), what `next_block` goes on from)."""
        ids, mask, _ = self._blocks(ids, mask, None)
        seen = mask.any(-1)
        require(bool(seen[:, -1].all()), "mask", "a row whose last block is padding", "prompts that end together")
        state = BlockState(self.block_decoder.new_stores(page=32), seen)
        embeds = self.embed(ids, mask)
        return self.block_decoder(embeds, self._keys(state), state.stores)[:, -1], state

    @torch.no_grad()
    def next_block(self, ids: Tensor, state: BlockState) -> Tensor:
        """The block (B, block) just made goes into the state; the block decoder's output for it, (B, dim)."""
        embeds = self.embed(ids[:, None], torch.ones_like(ids, dtype=torch.bool)[:, None])
        state.seen = F.pad(state.seen, (0, 1), value=True)
        return self.block_decoder(embeds, self._keys(state), state.stores)[:, -1]

    def _keys(self, state: BlockState) -> Tensor | None:
        return None if bool(state.seen.all()) else state.seen

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None, variant: str = "paper", **sampling: Any
    ) -> Tensor:
        """ids (B, N), N >= 1 -> (B, N + new), new <= max_new_tokens: the prompt as it was given, and what follows.

        mask: (B, N), nonzero for real tokens: prompts of different lengths are padded on the LEFT. A row ends with `eos` and then
        `pad`; all stop when the last row has ended. sampling: see `regard.models.Sampling` (default: the likeliest token). Dropout is
        off for the duration.

        variant: "paper" (default) gives what teacher forcing gives. "released" is the authors' generation (transformers 4.39.3), which
        with strategy "prefix" counts positions in a block otherwise than training does: the tokens come out differently.
        """
        require_tensor("ids", ids, dims=2)
        require_int("max_new_tokens", max_new_tokens, 0)
        require_name("variant", variant, ("paper", "released"))
        if mask is not None:
            require(bool(mask.bool()[:, -1].all()), "mask", "a row that ends in padding", "padding on the left")
        choose = Sampling(**sampling)
        training = self.training
        self.eval()
        try:
            made = self._generate(ids, max_new_tokens, mask, choose, variant)
        finally:
            self.train(training)
        return torch.cat([ids, *made], dim=1)

    def _generate(self, ids: Tensor, wanted: int, mask: Tensor | None, choose: Sampling, variant: str) -> list[Tensor]:
        if wanted == 0:
            return []
        vectors, state = self.prefill(ids, mask)
        open_rows = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        made: list[Tensor] = []
        for start in range(0, wanted, self.block):
            length = min(self.block, wanted - start)
            new = ids.new_full((len(ids), length), self.pad)
            new[open_rows] = self.token_decoder.decode(vectors[open_rows], choose, length, self.eos, self.pad, variant)
            made.append(new)
            if self.eos is not None:
                open_rows &= ~(new == self.eos).any(1)
                if not open_rows.any():
                    ended = (new == self.eos).int().argmax(1)[(new == self.eos).any(1)]
                    made[-1] = new[:, : int(ended.max()) + 1]
                    break
            if start + length < wanted:
                vectors = self.next_block(new, state)
        return made

    # ---- other people's weights ----

    @classmethod
    def from_vanilla(
        cls,
        vanilla: nn.Module,
        block: int = 4,
        method: str = "partition",
        prefix: int = 2,
        block_layers: int | None = None,
        **options: Any,
    ) -> BlockTransformer:
        """A Block Transformer to be trained on ("uptraining") from a GPT-NeoX language model of Hugging Face (Pythia).

        method: "partition" (the first `block_layers` layers, default half, to the block decoder, the others to the token decoder),
        "skip" (every second layer to both), "duplicate" (all layers to both). The embedder is the mean of the tokens' vectors (a
        projection, to be trained), the block state enters as `prefix` copies of itself, tables, head and final norm are copied.
        options: of the constructor, for bos, eos, pad, losses. `vanilla` is not changed and shares nothing.
        """
        from .block_weights import plan_vanilla

        given, fill = plan_vanilla(vanilla, block, method, prefix, block_layers)
        model = cls(block=block, prefix=prefix, embedder="projection", **(given | options))
        fill(model)
        return model

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict in our names. Tables and buffers that nothing reads (the block decoder's `embed_in`) are dropped."""
        from .block_weights import block_keys

        return block_keys(state)


_SIZES = {
    "5m": (256, 3, 8),
    "19m": (512, 3, 8),
    "85m": (768, 6, 12),
    "300m": (1024, 12, 16),
    "800m": (2048, 8, 16),
    "1.2b": (2048, 12, 16),
}


def block_transformer(size: str = "85m", **options: Any) -> BlockTransformer:
    """The authors' models with blocks of 4 and Pythia's vocabulary (50304), by parameters without tables: "5m" ... "1.2b". Random weights.

    options: of `BlockTransformer`, in place of theirs (vocab_size, block, ...).
    """
    dim, layers, heads = _SIZES[require_name("size", size, _SIZES)]
    given: dict[str, Any] = {"vocab_size": 50304, "dim": dim, "block_layers": layers, "token_layers": layers}
    return BlockTransformer(**(given | {"num_heads": heads} | options))
