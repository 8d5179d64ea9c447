"""The parts of a Block Transformer: what embeds a block, and the three token decoders that spell it out.

Block Transformer (Ho et al. 2024, NeurIPS, arXiv 2406.02657); code read for numbers: itsnamgyu/block-transformer @ 17842dd (MIT),
`model/embedder/`, `model/token_decoder/`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..nn.sequence.neox import NeoXStack
from ..nn.sequence.t5_decoder import T5Decoder
from ..ops.growing_store import GrowingStore

__all__ = ["LookupEmbedder", "TokenDecoder", "left_pad_to_block"]

_STD = 0.02


class LookupEmbedder(nn.Module):
    """Blocks of token ids (M, block) -> (M, dim): a table of its own, the vectors of a block side by side.

    Without `projection` the table is dim / block wide. With it, the table is `width` wide (default dim) and a linear map over the
    whole block (a convolution of kernel and stride `block`) makes the block's vector. The row of `pad` starts at zero.
    """

    def __init__(
        self, vocab_size: int, dim: int, block: int, pad: int, projection: bool = False, width: int | None = None
    ) -> None:
        super().__init__()
        if not projection:
            require(dim % block == 0, "dim", dim, f"a multiple of block ({block}), or embedder='projection'")
            require(width in (None, dim // block), "embed_dim", width, f"dim / block ({dim // block})")
            width = dim // block
        width = width or dim
        self.table = nn.Embedding(vocab_size, width, padding_idx=pad)
        nn.init.normal_(self.table.weight, std=_STD)
        with torch.no_grad():
            self.table.weight[pad].zero_()
        self.projection = nn.Conv1d(width, dim, block, block) if projection else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=(width * block) ** -0.5)
            nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (M, block), True for real tokens; not used here, there for embedders that attend."""
        vectors = self.table(ids)
        if self.projection is None:
            return vectors.flatten(1)
        return self.projection(vectors.transpose(1, 2)).squeeze(-1)


class TokenDecoder(nn.Module):
    """Spells out a block from one vector: (vectors (M, block_dim), ids (M, block)) -> logits for each of the block's tokens.

    The vector becomes `count` vectors of width `dim` (a linear map), which are
        "prefix": put in front of the tokens, whose first one is left to predict from the last of them;
        "summation": added to [bos, tokens], place by place (count = block);
        "cross": attended to by a T5 decoder over [bos, tokens] (count = block by default).
    Nothing crosses from one block to another; positions begin anew in each.
    """

    def __init__(
        self,
        vocab_size: int,
        block_dim: int,
        block: int,
        strategy: str,
        count: int,
        dim: int,
        bos: int,
        stack: NeoXStack | T5Decoder,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.strategy, self.block, self.count, self.dim, self.bos, self.tied = strategy, block, count, dim, bos, tied
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=1.0 if strategy == "cross" else _STD)
        self.expansion = nn.Conv1d(block_dim, dim * count, 1)
        nn.init.normal_(self.expansion.weight, std=block_dim**-0.5)
        nn.init.zeros_(self.expansion.bias)  # type: ignore[arg-type]
        self.stack = stack
        self.head = nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=_STD)
        if tied:
            self.head.weight = self.embedding.weight

    def expand(self, vectors: Tensor) -> Tensor:
        """(M, block_dim) -> (M, count, dim)."""
        return self.expansion(vectors[..., None]).view(len(vectors), self.count, self.dim)

    def states(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """What predicts each token of ids (M, block), all at once: (M, block, dim)."""
        expanded = self.expand(vectors)
        before = ids[:, :-1]
        if self.strategy == "prefix":
            inputs = torch.cat([expanded, self.embedding(before)], dim=1)
            return self._run(inputs)[:, self.count - 1 :]
        inputs = self.embedding(F.pad(before, (1, 0), value=self.bos))
        if self.strategy == "summation":
            return self._run(inputs + expanded)
        assert isinstance(self.stack, T5Decoder)
        return self.stack(inputs, self.stack.read(expanded))

    def _run(self, inputs: Tensor, stores: list[GrowingStore] | None = None, positions: Tensor | None = None) -> Tensor:
        assert isinstance(self.stack, NeoXStack)
        return self.stack(inputs, stores=stores, positions=positions)

    def logits(self, states: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab_size); where the table is shared, T5 scales the states first."""
        return self.head(states * self.dim**-0.5 if self.tied else states)

    def decode(
        self, vectors: Tensor, choose: Any, length: int, eos: int | None, pad: int, variant: str = "paper"
    ) -> Tensor:
        """Token ids (M, length) of a block, one after the other; what follows `eos` is `pad`.

        choose: logits (M, V) -> ids (M,). variant: "released" counts positions as the authors' generation does: all prefix vectors
        at 0, token i at i, not as in training. The cache holds at most count + length - 1 rows and is dropped at the end.
        """
        expanded = self.expand(vectors)
        stores = self.stack.new_stores(page=self.count + self.block)
        context = self.stack.read(expanded) if isinstance(self.stack, T5Decoder) else []
        made = torch.full((len(vectors), length), pad, dtype=torch.long, device=vectors.device)
        open_rows = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
        last = torch.full((len(vectors),), self.bos, dtype=torch.long, device=vectors.device)
        for place in range(length):
            if self.strategy == "prefix" and place == 0:
                inputs = expanded
            else:
                inputs = self.embedding(last)[:, None]
                if self.strategy == "summation":
                    inputs = inputs + expanded[:, place : place + 1]
            if isinstance(self.stack, T5Decoder):
                state = self.stack(inputs, context, stores)
            else:
                at = torch.full((inputs.shape[1],), place, device=inputs.device) if variant == "released" else None
                state = self._run(inputs, stores, at)
            last = choose(self.logits(state[:, -1])).masked_fill(~open_rows, pad)
            made[:, place] = last
            if eos is not None:
                open_rows &= last != eos
                if not open_rows.any():
                    break
        return made


def left_pad_to_block(
    ids: Tensor,
    block: int,
    pad: int,
    mask: Tensor | None = None,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids (B, N) as blocks (B, n, block), and which are real, (B, n, block) bool.

    Missing tokens are filled in with `pad`: on the left, up to a block boundary; with `random` each row gets 0 ... block - 1 of
    them on the left and what is missing then on the right, as in training, so that every alignment is seen.
    mask: (B, N), nonzero for real tokens (default all).
    """
    require_tensor("ids", ids, dims=2)
    require_int("block", block, 1)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    require(real.shape == ids.shape, "mask", f"shape {tuple(real.shape)}", f"shape {tuple(ids.shape)}")
    batch, length = ids.shape
    if not random:
        missing = -length % block
        ids, real = F.pad(ids, (missing, 0), value=pad), F.pad(real, (missing, 0), value=False)
        return ids.unflatten(1, (-1, block)), real.unflatten(1, (-1, block))
    device = generator.device if generator is not None else ids.device
    left = torch.randint(block, (batch, 1), generator=generator, device=device).to(ids.device)
    width = -(-(length + block - 1) // block) * block
    place = torch.arange(length, device=ids.device) + left
    wide = torch.full((batch, width), pad, dtype=ids.dtype, device=ids.device).scatter(1, place, ids)
    real = torch.zeros(batch, width, dtype=torch.bool, device=ids.device).scatter(1, place, real)
    return wide.unflatten(1, (-1, block)), real.unflatten(1, (-1, block))
