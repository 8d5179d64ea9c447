"""A layer of landmark attention, with the memory that it retrieves blocks from when it reads long texts.

Mohtashami and Jaggi 2023 (NeurIPS), arXiv 2305.16300. Numbers from epfml/landmark-attention (Apache-2.0): `models/landmark.py`,
`models/caches/mem_cache.py`, `models/positional_encoders/rotary.py` (and `llama/llama_mem.py` for memories with few blocks).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._checks import require, require_fraction, require_int, require_name, require_tensor
from ...ops.landmark import insert_landmarks, landmark_attention, landmark_weights
from ...ops.reference import accumulation_dtype, attention_scores, weighted_values
from .rotary import rotary_table, rotate

__all__ = ["LandmarkAttention", "LandmarkCache"]

Rotate = Callable[[Tensor, Tensor], Tensor]
_SELECT = ("token_head", "heads", "tokens")


class LandmarkAttention(nn.Module):
    """Causal self-attention with landmarks, (B, N, dim) -> (B, N, dim).

    Rotary positions with angles position * 10000^(-2i / head_dim), as in the authors' GPT; landmarks take a position like others.

    Args:
        dim: channels. num_heads: heads. bias: of both linear maps.
        dropout: of attention weights and of the output. group_dropout: of what landmarks receive. Both in training only.
    """

    def __init__(
        self, dim: int, num_heads: int, bias: bool = True, dropout: float = 0.0, group_dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_int("num_heads", num_heads, 1)
        require(require_int("dim", dim, 1) % (2 * num_heads) == 0, "dim", dim, f"a multiple of 2 * {num_heads} heads")
        for name, rate in (("dropout", dropout), ("group_dropout", group_dropout)):
            require(require_fraction(name, rate) < 1.0, name, rate, "a probability in [0, 1)")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.dropout, self.group_dropout = dropout, group_dropout
        self.c_attn = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Tensor, is_landmark: Tensor, positions: Tensor | None = None, memory: LayerMemory | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, N, dim). is_landmark: bool (B, N).
            positions: int64 (N,) or (B, N); default 0, 1, 2 ..., with a memory those that follow from it.
            memory: of this layer, from a `LandmarkCache`; read, and x written to it. Inference only.
        """
        require_tensor("x", x, dims=3, floating=True)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1)
        )
        # the authors turn neighbouring channels, `rotate` those half a head apart: put in order alike, scores are the same
        q, k = (torch.cat([part[..., 0::2], part[..., 1::2]], -1) for part in (q, k))
        if memory is not None:
            out = memory.attend(q, k, v, is_landmark)
        else:
            at = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            table = _table(at, self.head_dim)
            active = self.training
            out = landmark_attention(
                rotate(q, table), rotate(k, table), v, is_landmark,
                dropout=self.dropout if active else 0.0, group_dropout=self.group_dropout if active else 0.0,
            )  # fmt: skip
        out = self.c_proj(out.transpose(1, 2).flatten(2))
        return nn.functional.dropout(out, self.dropout, self.training)


class LandmarkCache:
    """What a model with landmark attention remembers of a text that it reads piece by piece.

    Complete blocks are stored with keys before rotary embedding. A query looks at the landmarks of all of them, takes the `topk` best
    blocks, and attends to these, to the block that is begun and to its own piece. Positions are stingy: the last `topk` blocks stand
    right before the text, all older ones before those, at one place, and retrieved blocks are put side by side.

    Args:
        landmark_id: id of the landmark token, inserted here after every `block` tokens. block: ordinary tokens of a block.
        topk: blocks retrieved (0: none). select: whether each token of each head chooses ("token_head"), all heads of a token together
            ("heads", by the highest weight in a head) or all tokens of a piece together ("tokens").
        max_blocks: blocks remembered, the oldest are forgotten; None: all.
        offload: device that blocks are kept on ("cpu"); landmark keys stay with the model. None: the model's own.
        variant: what happens while there are exactly `topk` blocks: "released" places them one block too late, over the text;
            "paper" where they really are (as the release does for fewer).
    """

    def __init__(
        self,
        landmark_id: int,
        block: int = 50,
        topk: int = 1,
        select: str = "token_head",
        max_blocks: int | None = None,
        offload: str | None = None,
        variant: str = "released",
    ) -> None:
        self.landmark_id = require_int("landmark_id", landmark_id, 0)
        self.block, self.topk = require_int("block", block, 1), require_int("topk", topk, 0)
        self.select = require_name("select", select, _SELECT)
        self.max_blocks = None if max_blocks is None else require_int("max_blocks", max_blocks, max(1, topk))
        self.offload, self.variant = offload, require_name("variant", variant, ("released", "paper"))
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.filled = 0  # ordinary tokens of the block that is begun
        self.seen = 0  # tokens so far, landmarks included
        self.start = 0  # position of the first token of the piece being read
        self._layers: dict[int, LayerMemory] = {}

    def begin(self, ids: Tensor) -> Tensor:
        """A new piece of the text, ids (B, N): gives it with landmarks, to be put through all layers."""
        require_tensor("ids", ids, dims=2)
        with_landmarks = insert_landmarks(ids, self.landmark_id, self.block, self.filled)
        past = self.seen // (self.block + 1)
        self.start = min(past, self.topk + 1) * (self.block + 1) + self.filled
        self.filled = (self.filled + ids.shape[1]) % self.block
        self.seen += with_landmarks.shape[1]
        return with_landmarks

    def advance(self, count: int) -> None:
        """A new piece of `count` tokens that has its landmarks already, at the places where `begin` would put them."""
        length = self.block + 1
        self.start = min(self.seen // length, self.topk + 1) * length + self.seen % length
        self.seen += count
        self.filled = self.seen % length

    def take_back(self, count: int) -> None:
        """The last `count` tokens of the text, landmarks included, were never there. (Each layer's memory drops them by itself.)"""
        self.seen -= count
        self.filled = self.seen % (self.block + 1)

    def layer(self, number: int) -> LayerMemory:
        """The memory of one layer."""
        return self._layers.setdefault(number, LayerMemory(self))


class LayerMemory:
    """The memory of one layer: blocks (B, Hkv, blocks, block + 1, D) and the block that is begun, keys before rotary embedding.

    Args:
        cache: whose layer it is. rotate: the rotary embedding, `rotate(x (B, H, n, D), positions (B, n))`; None: that of
            `LandmarkAttention`. scale: of the scores; None: D ** -0.5.
    """

    def __init__(self, cache: LandmarkCache, rotate: Rotate | None = None, scale: float | None = None) -> None:
        self.cache, self.rotate, self.scale = cache, rotate or _rotate, scale
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.landmarks: Tensor | None = None
        self.tail: tuple[Tensor, Tensor] | None = None

    @property
    def blocks(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor) -> Tensor:
        """Outputs (B, H, N, D) of a piece, then the piece is remembered.

        q (B, H, N, D), k and v (B, Hkv, N, D), all before rotary embedding; is_landmark bool (B, N).
        """
        batch, _, rows, _ = q.shape
        start, device = self.cache.start, q.device
        tail = (k[:, :, :0], v[:, :, :0]) if self.tail is None else self.tail
        before = tail[0].shape[2]
        at = torch.arange(start - before, start + rows, device=device)
        turned = self._turned(torch.cat([tail[0], k], 2), at)
        query = self._turned(q, at[before:])
        scores = self._scores(query, turned)
        future = torch.arange(before + rows, device=device) > torch.arange(rows, device=device)[:, None] + before
        scores = scores.masked_fill(future, -torch.inf)
        marks = torch.cat([is_landmark.new_zeros(batch, before), is_landmark], 1)
        values = torch.cat([tail[1], v], 2)
        if self.blocks and self.cache.topk:
            found_scores, found_values = self._retrieve(query)
            width = found_scores.shape[-1]
            old = (torch.arange(width, device=device) % (self.cache.block + 1) == self.cache.block).expand(batch, -1)
            weights = landmark_weights(torch.cat([found_scores, scores], -1), torch.cat([old, marks], 1))
            out = weighted_values(weights[..., width:], values)
            fetched = weights[..., None, :width]
            out = out + torch.matmul(fetched, found_values.to(weights.dtype))[..., 0, :]
        else:
            out = weighted_values(landmark_weights(scores, marks), values)
        self._remember(torch.cat([tail[0], k], 2), values)
        return out.to(q.dtype)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, positions.expand(x.shape[0], -1))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled scores (B, H, N, M), float32 for half types."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return attention_scores(q, k, q_offset=0, scale=scale)

    def _retrieve(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Of the chosen blocks the scores (B, H, N, K * length) and values (B, H, N | 1, K * length, D); q (B, H, N, D), turned."""
        cache, dim, device = self.cache, q.shape[-1], q.device
        count, length = self.blocks, cache.block + 1
        topk = min(cache.topk, count)
        number = torch.arange(count, device=device)
        if count < cache.topk or (count == cache.topk and cache.variant == "paper"):
            slot = number  # all are taken, and stand where they really are
            behind = torch.zeros_like(number)
        else:
            slot = (number - (count - topk) + 1).clamp(min=0)
            behind = (slot > 0).long()
        assert self.landmarks is not None and self.keys is not None and self.values is not None
        weights = self._scores(q, self._turned(self.landmarks, slot * length + length - 1)).softmax(-1)
        if cache.select == "heads":
            weights = weights.amax(1, keepdim=True).expand(-1, q.shape[1], -1, -1)
        elif cache.select == "tokens":
            weights = weights.amax(2, keepdim=True)
        chosen = weights.topk(topk, dim=-1).indices.sort(-1).values  # (B, H, N | 1, K)
        keys, values = (self._gather(stored, chosen).to(q) for stored in (self.keys, self.values))
        inside = torch.arange(topk * length, device=device).view(topk, length)
        at = (inside + (behind[chosen] * length)[..., None]).flatten(3)
        lists = keys.flatten(3, 4)
        keys = self.rotate(lists.flatten(0, 2)[:, None], at.flatten(0, 2)).view(lists.shape)
        dtype = accumulation_dtype(q.dtype)
        scores = torch.matmul(keys.to(dtype), q.to(dtype)[..., None])[..., 0]
        return scores * (dim**-0.5 if self.scale is None else self.scale), values.flatten(3, 4)

    @staticmethod
    def _gather(stored: Tensor, chosen: Tensor) -> Tensor:
        """(B, Hkv, blocks, length, D) and (B, H, N, K) -> (B, H, N, K, length, D)."""
        row = torch.arange(stored.shape[0], device=stored.device)[:, None, None, None]
        head = torch.arange(chosen.shape[1], device=stored.device)[:, None, None] // (
            chosen.shape[1] // stored.shape[1]
        )
        return stored[row, head, chosen.to(stored.device)]

    def drop_last(self, count: int) -> None:
        """Take back the last `count` tokens of the text; blocks that are begun again by that return to the tail."""
        if self.tail is None or count == 0:
            return
        length, (keys, values) = self.cache.block + 1, self.tail
        back = -(-max(0, count - keys.shape[2]) // length)
        if back:
            require(back <= self.blocks, "count", count, "fewer tokens: blocks before those remembered are gone")
            assert self.keys is not None and self.values is not None and self.landmarks is not None
            keys = torch.cat([self.keys[:, :, -back:].flatten(2, 3).to(keys), keys], 2)
            values = torch.cat([self.values[:, :, -back:].flatten(2, 3).to(values), values], 2)
            self.keys, self.values = self.keys[:, :, :-back], self.values[:, :, :-back]
            self.landmarks = self.landmarks[:, :, :-back]
        self.tail = (keys[:, :, : keys.shape[2] - count], values[:, :, : values.shape[2] - count])

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor, batch dimension first, by `fn` of it; what is offloaded stays where it is."""
        away = self.cache.offload
        self.keys, self.values = (
            x if x is None else fn(x) if away is None else fn(x).to(away) for x in (self.keys, self.values)
        )
        self.landmarks = None if self.landmarks is None else fn(self.landmarks)
        self.tail = None if self.tail is None else (fn(self.tail[0]), fn(self.tail[1]))

    @torch.no_grad()
    def _remember(self, k: Tensor, v: Tensor) -> None:
        """Complete blocks of tail and piece join the stored ones; what is left over is the new tail."""
        length = self.cache.block + 1
        whole = k.shape[2] // length * length
        self.tail = (k[:, :, whole:].detach().clone(), v[:, :, whole:].detach().clone())
        if not whole:
            return
        keys, values = (x[:, :, :whole].detach().unflatten(2, (-1, length)) for x in (k, v))
        kept = -(self.cache.max_blocks or 0)
        marks = keys[:, :, :, -1]
        self.landmarks = (marks if self.landmarks is None else torch.cat([self.landmarks, marks], 2))[:, :, kept:]
        if self.cache.offload is not None:
            keys, values = keys.to(self.cache.offload), values.to(self.cache.offload)
        self.keys = (keys if self.keys is None else torch.cat([self.keys, keys], 2))[:, :, kept:]
        self.values = (values if self.values is None else torch.cat([self.values, values], 2))[:, :, kept:]


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, _table(positions, x.shape[-1]))


def _table(positions: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """`rotary_table` of positions (N,) or (B, N), to be used on (B, H, N, D)."""
    cos, sin = rotary_table(positions, dims)
    return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])
