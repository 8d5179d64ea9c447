"""Relative convolutional multi-head attention: short causal convolutions on queries, keys and values, and learned relative positions.

Paper: "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling" (2023, arXiv 2308.03429). Code read for
numbers: hermansh-id/rcmha @ 87df49b (Apache-2.0), `rcmha/attention.py`. Differences: a row that may see nothing gives zeros (theirs
NaN); decoding by a state, which carries the convolutions on over the border (theirs only has a memory of earlier segments, which the
queries' convolution does not reach into: `memory`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_tensor
from ...ops import masks
from ...ops.attention import attention
from ..layers import rename_keys
from .pre_norm import require_rate

__all__ = ["RelativeConvAttention", "RelativeConvState", "relative_shift"]

ROWS = 512  # queries whose position scores are held at once


def relative_shift(scores: Tensor, kv_len: int) -> Tensor:
    """Scores by distance (..., N, N + kv_len - 1) -> by key (..., N, kv_len): row i is columns N - 1 - i and on.

    Columns stand from the key that is furthest back for the last row to the key that is furthest ahead for the first.
    """
    length, width = scores.shape[-2:]
    require(width == length + kv_len - 1, "scores", f"shape {tuple(scores.shape)}", f"(..., N, N + {kv_len - 1})")
    if length == 1:
        return scores
    flat = scores.flatten(-2)[
        ..., length - 1 :
    ]  # rows one shorter than they are: each begins one column before the last one's
    return flat[..., : length * (width - 1)].unflatten(-1, (length, width - 1))[..., :kv_len]


class HeadwiseCausalConv(nn.Conv1d):
    """A causal convolution of each channel of a head along the tokens, the same for all heads: (B, H, N, D) -> (B, H, N, D)."""

    def __init__(self, head_dim: int, kernel: int) -> None:
        super().__init__(head_dim, head_dim, kernel, groups=head_dim)

    def along(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """before: the kernel - 1 inputs before x, (B, H, kernel - 1, D); None: zeros. Also gives those before what follows x."""
        reach = self.kernel_size[0] - 1
        before = x.new_zeros(*x.shape[:2], reach, x.shape[3]) if before is None else before
        whole = torch.cat((before, x), dim=2)
        y = super().forward(rearrange(whole, "b h n d -> (b h) d n"))
        return rearrange(y, "(b h) d n -> b h n d", b=x.shape[0]), whole[:, :, whole.shape[2] - reach :]


@dataclass
class RelativeConvState:
    """What the layer carries while decoding: k, v (B, H, n, D); for each convolution its last inputs (B, H, kernel - 1, D)."""

    k: Tensor
    v: Tensor
    tails: dict[str, Tensor]

    def select(self, rows: Tensor) -> RelativeConvState:
        """Batch row i becomes what row `rows[i]` was."""
        return RelativeConvState(self.k[rows], self.v[rows], {name: tail[rows] for name, tail in self.tails.items()})


class RelativeConvAttention(nn.Module):
    """Softmax attention of convolved q, k, v with learned relative positions: (B, N, dim) -> (B, N, dim).

    A query at position i scores a key at j by ((q_i + u) k_j + q_i r[i - j] + c[i - j]) / sqrt(head_dim).

    Args:
        dim, num_heads. causal: whether a token sees no later ones. kernel: tokens that a convolution spans.
        max_len: longest distance + 1; the tables r (2 * max_len, H, D) and c (2 * max_len, H) are zero at first, as is u.
        conv_on: which of queries, keys and values are convolved, letters of "qkv". dropout: of attention weights, in training.

    Queries and keys have no bias, values and output have. Position scores take a matrix of N x M a head, of which 512 rows at a time are
    held where no gradient is needed. Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        kernel: int = 3,
        max_len: int = 4096,
        conv_on: str = "qkv",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        require_int("kernel", kernel, 1)
        if not isinstance(conv_on, str):
            raise bad_type("conv_on", conv_on, "letters of 'qkv'")
        require(set(conv_on) <= set("qkv"), "conv_on", conv_on, "letters of 'qkv'")
        self.causal, self.max_len = bool(causal), require_int("max_len", max_len, 1)
        self.dropout, self.head_dim = require_rate("dropout", dropout), dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.convs = nn.ModuleDict(
            {name: HeadwiseCausalConv(self.head_dim, kernel) for name in "qkv" if name in conv_on}
        )
        self.position_keys = nn.Parameter(torch.zeros(2 * max_len, num_heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(2 * max_len, num_heads))
        self.query_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        state: RelativeConvState | None = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, RelativeConvState) with `return_state`.

        memory: (B, M, dim), what keys and values are made of beside x and before it, as the authors have earlier segments; the queries'
        convolution begins anew at x. state: what an earlier call returned; x then goes on as if both had come in one call.
        """
        self._check("x", x)
        if memory is not None:
            self._check("memory", memory)
            require(state is None and not return_state, "memory", "given", "None with a state")
            require(len(memory) == len(x), "memory", f"shape {tuple(memory.shape)}", f"({len(x)}, M, {self.dim})")
        require(self.causal or (state is None and not return_state), "state", "wanted", "a causal layer")
        if state is not None:
            if not isinstance(state, RelativeConvState):
                raise bad_type("state", state, "a RelativeConvState")
            fits = (*state.k.shape[:2], state.k.shape[3]) == (len(x), self.num_heads, self.head_dim)
            need = f"({len(x)}, {self.num_heads}, n, {self.head_dim})"
            require(fits, "state", f"k of shape {tuple(state.k.shape)}", need)
        before = {} if state is None else state.tails
        whole = x if memory is None else torch.cat((memory, x), dim=1)
        made, tails = {}, {}
        for name, source in (("q", x), ("k", whole), ("v", whole)):
            made[name], tail = self._heads(name, source, before.get(name))
            if tail is not None:
                tails[name] = tail
        q, k, v = made["q"], made["k"], made["v"]
        if state is not None:
            k, v = torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2)
        y = self._mix(q, k, v, masks.causal if self.causal else None)
        return (y, RelativeConvState(k, v, tails)) if return_state else y

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
        """query (B, N, dim) on key and value (B, M, dim), N <= M, queries at the last N positions -> (B, N, dim).

        mask: anything `regard.ops.attention` takes, and all that decides: `causal` of the layer does not count here.
        """
        for name, given in (("query", query), ("key", key), ("value", value)):
            self._check(name, given)
        require(key.shape == value.shape, "value", f"shape {tuple(value.shape)}", f"{tuple(key.shape)}, that of key")
        fits = len(query) == len(key) and query.shape[1] <= key.shape[1]
        require(fits, "query", f"shape {tuple(query.shape)}", f"({len(key)}, at most {key.shape[1]}, {self.dim})")
        q, k, v = (self._heads(name, x, None)[0] for name, x in zip("qkv", (query, key, value)))
        return self._mix(q, k, v, mask)

    def position_scores(self, q: Tensor, kv_len: int, offset: int) -> Tensor:
        """q_i r[i - j] + c[i - j], not yet scaled, (B, H, N, kv_len): q (B, H, N, D) with row 0 at position `offset`."""
        last = offset + q.shape[2] - 1
        rows = slice(self.max_len - last, self.max_len - offset + kv_len)
        by_distance = torch.einsum("bhnd,ehd->bhne", q, self.position_keys[rows])
        return relative_shift(by_distance + self.position_bias[rows].T[:, None], kv_len)

    def _heads(self, name: str, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        split = rearrange(getattr(self, f"{name}_proj")(x), "b n (h d) -> b h n d", h=self.num_heads)
        return self.convs[name].along(split, before) if name in self.convs else (split, None)  # type: ignore[operator]

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        length, kv_len, scale = q.shape[2], k.shape[2], self.head_dim**-0.5
        need = f"at most max_len ({self.max_len})"
        require(kv_len <= self.max_len, "x", f"{kv_len} tokens, those before it included", need)
        drop, outs = self.dropout if self.training else 0.0, []
        mask = None if mask is None else masks.as_mask(mask)
        for start in range(0, length, ROWS):
            part = q[:, :, start : start + ROWS]
            offset = kv_len - length + start
            bias = self.position_scores(part, kv_len, offset) * scale
            asked = part + self.query_bias[:, None]
            outs.append(attention(asked, k, v, mask=mask, bias=bias, q_offset=offset, scale=scale, dropout=drop))
        out = torch.cat(outs, dim=2) if len(outs) != 1 else outs[0]
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))

    def _check(self, name: str, x: Tensor) -> None:
        require_tensor(name, x, dims=3, floating=True)
        require(x.shape[2] == self.dim, name, f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `RelativeMultiHeadAttention`; of position tables longer than ours the middle, which is what ours can reach."""
        ours = rename_keys(
            state,
            (r"^(query|key|value)\.0\.linear\.", lambda m: f"{m[1][0]}_proj."),
            (r"^(query|key|value)\.1\.conv\.", lambda m: f"convs.{m[1][0]}."),
            (r"^output\.", "o_proj."),
            (r"^key_pos_embeddings$", "position_keys"),
            (r"^key_pos_bias$", "position_bias"),
            (r"^query_pos_bias$", "query_bias"),
        )
        for name in ("position_keys", "position_bias"):
            if name in ours and len(ours[name]) > 2 * self.max_len:
                middle = len(ours[name]) // 2
                ours[name] = ours[name][middle - self.max_len : middle + self.max_len]
        return ours

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, causal={self.causal}, max_len={self.max_len}, conv_on={''.join(self.convs)!r}"
        )
