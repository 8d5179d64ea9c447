"""Long-Short attention: a window of near keys and a few summaries of all (or all earlier) keys, in one softmax.

Long-Short Transformer (Zhu et al. 2021, arXiv 2107.02192). Code read for numbers: CAB's package efficient_attention (Shark-NLP/CAB @
0e49696, MIT), `modules/transformer_ls.py`: `AttentionLS` and `CausalLS`. What differs: any length works in the causal form (theirs
fails where the length is a multiple of the chunk but not of the window); the optional convolution of `AttentionLS`, which fails there,
is not here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_int
from .pattern_attention import PatternAttention, softmax_over_keys
from .pre_norm import require_rate

__all__ = ["CausalLongShortAttention", "LongShortAttention"]


class LongShortAttention(PatternAttention):
    """Non-causal self-attention to `landmarks` learned summaries of the whole sequence and to a window around each group of queries.

    The sequence is cut into groups of `window`; a group sees itself and window // 2 (at least 1) keys on either side. Keys and values
    are normalised over all heads together, summaries once more ("dual norm"). dropout: of attention weights.
    """

    patterns = frozenset({"NS"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        landmarks: int = 16,
        window: int = 15,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross)
        self.landmarks, self.window = require_int("landmarks", landmarks, 1), require_int("window", window, 1)
        self.dropout = nn.Dropout(require_rate("dropout", dropout))
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(dim, dim) for _ in range(4))
        self.dual_ln_s, self.dual_ln_l = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dconv_fc = nn.Linear(dim, num_heads * landmarks)

    def forward(self, x: Tensor, context: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        self.check(x, context, keys)
        if not x.shape[1]:
            return x
        length, window, side = x.shape[1], self.window, max(self.window // 2, 1)
        extra = -length % window
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if keys is None else keys.bool()
        x, real = F.pad(x, (0, 0, 0, extra)), F.pad(real, (0, extra), value=False)
        q = self._heads(self.W_q(x)) * self.head_dim**-0.5
        k, v = self._heads(self.dual_ln_l(self.W_k(x))), self._heads(self.dual_ln_l(self.W_v(x)))
        shares = softmax_over_keys(self.dconv_fc(x), real[..., None], dim=1)
        shares = rearrange(shares, "b n (h r) -> b h r n", h=self.num_heads)
        few_k, few_v = (self._heads(self.dual_ln_s(self._whole(shares @ t))) for t in (k, v))
        far = q @ few_k.transpose(-1, -2)  # (B, H, N, R)

        def tiles(t: Tensor) -> Tensor:
            """(B, H, N, D) -> (B, H, groups, window + 2 side, D)."""
            return F.pad(t, (0, 0, side, side)).unfold(2, window + 2 * side, window).transpose(-1, -2)

        seen = F.pad(real, (side, side), value=False).unfold(1, window + 2 * side, window)[:, None, :, None]
        near = q.unflatten(2, (-1, window)) @ tiles(k).transpose(-1, -2)
        near = near.masked_fill(~seen, float("-inf")).flatten(2, 3)
        weights = torch.cat([far, near], dim=-1).softmax(-1).masked_fill(~real[:, None, :, None], 0)
        weights = self.dropout(weights)
        out = weights[..., : self.landmarks] @ few_v
        out = out + (weights[..., self.landmarks :].unflatten(2, (-1, window)) @ tiles(v)).flatten(2, 3)
        return self.W_o(self._whole(out))[:, :length]

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def _whole(self, x: Tensor) -> Tensor:
        return rearrange(x, "b h n d -> b n (h d)")


class CausalLongShortAttention(PatternAttention):
    """Causal self-attention to the last `window` keys and to `rank` summaries of each earlier chunk of `chunk` tokens.

    Positions are relative, as in Transformer-XL: to near keys by their distance in tokens, to summaries by their distance in chunks.
    In front of every sequence stand `memory` tokens of zeros (the authors' cache, which is never filled): their summaries, and the
    zeros within the window, are attended to as any other. memory is a multiple of chunk and at least window. bias: of the four projections.
    dropout: of the output, attention_dropout: of weights. No padding.
    """

    patterns = frozenset({"CS"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        cross: bool = False,
        chunk: int = 32,
        window: int = 256,
        rank: int = 1,
        memory: int = 1024,
        bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross)
        self.chunk, self.window = require_int("chunk", chunk, 1), require_int("window", window, 1)
        self.rank, self.memory = require_int("rank", rank, 1), require_int("memory", memory, 0)
        need = f"a multiple of chunk ({chunk}), at least window ({window})"
        require(memory % chunk == 0 and memory >= window, "memory", memory, need)
        self.dropout = nn.Dropout(require_rate("dropout", dropout))
        self.dp_attn = nn.Dropout(require_rate("attention_dropout", attention_dropout))
        self.dconv_1 = nn.Linear(dim, num_heads * rank)
        self.r_net, self.r_net_chunk = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.r_r_bias = nn.Parameter(torch.zeros(1, num_heads, 1, self.head_dim))
        self.r_w_bias = nn.Parameter(torch.zeros(1, num_heads, 1, 1, self.head_dim))
        self.proj_query, self.proj_out, self.proj_val, self.proj_key = (
            nn.Linear(dim, dim, bias=bias) for _ in range(4)
        )
        for proj in (self.proj_query, self.proj_out, self.proj_val, self.proj_key):
            nn.init.xavier_normal_(proj.weight)
            if bias:
                nn.init.zeros_(proj.bias)
        self.dual_ln_dproj, self.dual_ln_win = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(0.0, dim, 2.0) / dim), persistent=False)

    frequencies: Tensor

    def forward(self, x: Tensor, context: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        self.check(x, context, keys)
        require(keys is None, "keys", "given", "none: causal Long-Short attention does not know of padding")
        length = x.shape[1]
        if not length:
            return x
        x = F.pad(x, (0, 0, 0, -length % self.chunk))  # what fills the last chunk is behind all real tokens
        q = self._heads(self.proj_query(x)) * self.head_dim**-0.5
        key, value = self.proj_key(x), self.proj_val(x)
        near_scores, near_values = self._near(q, key, value, x)
        far_scores, far_values = self._far(q, key, value, x)
        weights = self.dp_attn(torch.cat([far_scores, near_scores], dim=-1).softmax(-1))
        count = far_scores.shape[-1]
        out = weights[..., :count] @ far_values
        out = out + (weights[..., None, count:] @ near_values).squeeze(-2)
        whole = rearrange(out, "b h n d -> b n (h d)")[:, :length]
        return self.dropout(self.proj_out(whole))

    def _near(self, q: Tensor, key: Tensor, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, N, window) of the last `window` keys, and their values (B, H, N, window, D)."""
        before = x.new_zeros(x.shape[0], self.window, self.dim)
        key = self._heads(self.dual_ln_win(torch.cat([self.proj_key(before), key], dim=1)))
        value = self._heads(self.dual_ln_win(torch.cat([self.proj_val(before), value], dim=1)))
        # the row before a token's window ends `window` back, so that its own key is the last one
        keys, values = (t[:, :, 1:].unfold(2, self.window, 1).transpose(-1, -2) for t in (key, value))
        content = (keys @ (q + self.r_w_bias.squeeze(3))[..., None]).squeeze(-1)
        back = torch.arange(self.window - 1, -1, -1, device=x.device)
        distance = self._heads(self.r_net(self._codes(back))[None])
        return content + (q + self.r_r_bias) @ distance.transpose(-1, -2), values

    def _far(self, q: Tensor, key: Tensor, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, N, summaries) of the zeros in front and of earlier chunks, -inf elsewhere; the summaries' values."""
        batch, chunks, held = x.shape[0], x.shape[1] // self.chunk, self.memory // self.chunk * self.rank
        shares = (
            self.dconv_1(x).unflatten(1, (chunks, self.chunk)).unflatten(-1, (self.num_heads, self.rank)).softmax(2)
        )
        zero = x.new_zeros(1, 1, self.dim)

        def summaries(projected: Tensor, proj: nn.Linear) -> Tensor:
            split = projected.unflatten(1, (chunks, self.chunk)).unflatten(-1, (self.num_heads, self.head_dim))
            kept = torch.einsum("bnchr,bnchd->bnrhd", shares, split).flatten(1, 2).flatten(2)
            front = proj(zero).expand(batch, held, -1)
            return self._heads(self.dual_ln_dproj(torch.cat([front, kept], dim=1)))

        keys, values = summaries(key, self.proj_key), summaries(value, self.proj_val)
        own = torch.arange(chunks, device=x.device).repeat_interleave(self.chunk)[:, None]
        back = held + own * self.rank - 1 - torch.arange(keys.shape[2], device=x.device)  # negative: not earlier
        codes = self._heads(
            self.r_net_chunk(self._codes(torch.arange(held + chunks * self.rank, device=x.device)))[None]
        )
        by_distance = q @ codes.transpose(-1, -2)
        placed = by_distance.gather(-1, back.clamp(min=0).expand(*by_distance.shape[:3], -1))
        return (q @ keys.transpose(-1, -2) + placed).masked_fill(back < 0, float("-inf")), values

    def _codes(self, distance: Tensor) -> Tensor:
        angles = distance[:, None].to(self.frequencies.dtype) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.proj_key.weight.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors keep the frequencies of the positions, which follow from the width, as a buffer."""
        return {name: tensor for name, tensor in state.items() if name != "pos_emb.inv_freq"}


def default_chunks(length: int) -> tuple[int, int]:
    """A chunk and a memory that suit sequences of `length` tokens where the authors' 32 and 1024 would be longer than all of it."""
    chunk = max(1, min(32, 2 ** int(math.log2(max(1, length // 8)))))
    return chunk, max(chunk, min(1024, length) // chunk * chunk)
