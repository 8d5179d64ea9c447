"""RAT's layer: a gated recurrence within chunks and softmax attention across them; and the gated recurrence alone.

RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (Wei et al. 2025, arXiv 2507.04416); code read for numbers:
CLAIRE-Labo/RAT @ d4a8f54 (MIT), `src/model/backbone/rat/rat.py`, `.../rnn/rnn.py`, `src/model/embedding/pe.py` (`InterRoPE`). What differs:
norm and residual are outside (`regard.models.RATLM` has them); any length, and decoding from the first token (theirs: whole chunks, and one
head until the first chunk is full); states are not rounded to bfloat16 unless the layer is bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_shape, require_tensor
from ...ops.chunk_recurrence import ChunkRecurrentState, chunk_recurrent_attention
from ...ops.state.linear_scan import linear_scan
from .rotary import rotary_table, rotate

__all__ = ["GatedRecurrence", "GatedRecurrenceState", "RATAttention"]


def _init(layer: nn.Module, dim: int, reach: int) -> None:
    """Chrono initialisation of the gate: states that keep for 1 to `reach` - 1 tokens. Theirs of matrices is 0.02, at dim 2048."""
    for linear in (layer.in_proj, layer.out_proj):
        nn.init.normal_(linear.weight, std=dim**-0.5)  # type: ignore[union-attr, arg-type]
    bias = layer.gate_bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        # log(1) is 0: with one token, or two, nothing is to be kept beyond it
        nn.init.uniform_(bias, 0.0, 1.0).mul_(max(reach - 2, 0)).add_(1.0).log_()


class RATAttention(nn.Module):
    """Attention to one running state a chunk: (B, N, dim) -> (B, N, dim), causal.

    One gate (B, N, dim) drives the recurrence of keys and of values (`regard.ops.chunk_recurrent_attention`); queries and keys are shared
    by heads (head h uses group h % num_groups), but as gates are not, every head has its own states. The output is multiplied by
    sigmoid(z), z linear in x.

    Args:
        dim, num_heads: dim a multiple of num_heads. chunk_size: tokens of a chunk; 1 is attention, at least N a gated recurrence.
        num_groups: query and key groups, a divisor of num_heads; default 2, or 1 where num_heads is odd.
        rope_base: of rotary positions, the position being the number of the chunk; None: none.

    `in_proj` gives z, v, gate, q, k in that order. Parameter names are the authors'.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        chunk_size: int = 16,
        num_groups: int | None = None,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.head_dim, self.chunk_size = dim // num_heads, require_int("chunk_size", chunk_size, 1)
        if num_groups is None:
            num_groups = 1 if num_heads % 2 else 2
        self.num_groups = require_int("num_groups", num_groups, 1)
        require(num_heads % num_groups == 0, "num_groups", num_groups, f"a divisor of num_heads ({num_heads})")
        if rope_base is not None:
            require(rope_base > 0, "rope_base", rope_base, "a number > 0, or None")
            need = "an even number for rotary positions"
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, need)
        self.rope_base = rope_base
        self.in_proj = nn.Linear(dim, 3 * dim + 2 * num_groups * self.head_dim, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        _init(self, dim, chunk_size)

    def forward(self, x: Tensor, *, state: ChunkRecurrentState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, ChunkRecurrentState) with `return_state`; `state`: what an earlier call returned.

        Rows of a batch may end in padding (their later outputs mean nothing), not begin with it: chunks are counted from the first token.
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        shared = self.num_groups * self.head_dim
        z, v, g, q, k = self.in_proj(x).split((self.dim, self.dim, self.dim, shared, shared), dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        gate = torch.sigmoid((g + self.gate_bias).to(wide))
        v, gate = (rearrange(t, "b n (h d) -> b h n d", d=self.head_dim) for t in (v, gate))
        tiles = self.num_heads // self.num_groups  # tiled, not repeated: groups 0 1 0 1
        q, k = (rearrange(t, "b n (h d) -> b h n d", d=self.head_dim).repeat(1, tiles, 1, 1) for t in (q, k))
        made = chunk_recurrent_attention(
            q, k, v, gate, self.chunk_size, state=state, return_state=return_state,
            rotate=None if self.rope_base is None else self._rotate,
        )  # fmt: skip
        out, after = made if return_state else (made, None)
        y = self.out_proj(torch.sigmoid(z) * rearrange(out, "b h n d -> b n (h d)"))
        return (y, after) if return_state else y

    def _rotate(self, x: Tensor, number: Tensor) -> Tensor:
        assert self.rope_base is not None
        return rotate(x, rotary_table(number, self.head_dim, self.rope_base))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layer has its norm inside, `input_norm`: dropped, it is the caller's (`RATLM` keeps it)."""
        return {name: tensor for name, tensor in state.items() if not name.startswith("input_norm.")}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, chunk_size={self.chunk_size}, num_groups={self.num_groups}"


@dataclass
class GatedRecurrenceState:
    """What the layer carries while decoding: h (B, dim)."""

    h: Tensor

    def select(self, rows: Tensor) -> GatedRecurrenceState:
        """Batch row i becomes what row `rows[i]` was."""
        return GatedRecurrenceState(self.h[rows])


class GatedRecurrence(nn.Module):
    """h_t = g_t h_(t-1) + (1 - g_t) v_t, y_t = W (sigmoid(z_t) h_t): (B, N, dim) -> (B, N, dim), causal. RAT with one chunk for all.

    Args:
        dim. num_heads: taken so that it can stand where attention stands; not used.
        max_len: how long a state should keep at the start of training, at most (the authors: the training length).

    Parameter names are the authors' (`RNN`); `in_proj` gives z, v, gate.
    """

    causal = True

    def __init__(self, dim: int, num_heads: int = 1, *, max_len: int = 1024) -> None:
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        _init(self, dim, require_int("max_len", max_len, 1))

    def forward(self, x: Tensor, *, state: GatedRecurrenceState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, GatedRecurrenceState) with `return_state`."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, GatedRecurrenceState):
            raise bad_type("state", state, "a GatedRecurrenceState")
        if state is not None:
            require_shape("state.h", state.h, (len(x), self.dim))
        if not x.shape[1]:
            kept = GatedRecurrenceState(x.new_zeros(len(x), self.dim)) if state is None else state
            return (x, kept) if return_state else x
        z, v, g = self.in_proj(x).chunk(3, dim=-1)
        gate = torch.sigmoid((g + self.gate_bias).to(torch.promote_types(x.dtype, torch.float32)))
        h = linear_scan(gate, (1 - gate) * v, None if state is None else state.h).to(x.dtype)
        y = self.out_proj(torch.sigmoid(z) * h)
        return (y, GatedRecurrenceState(h[:, -1])) if return_state else y

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `RATAttention.official_keys`."""
        return RATAttention.official_keys(state)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
