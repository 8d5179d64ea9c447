"""Titans: a long-term memory beside attention, as context (MAC), through a gate (MAG) or as the layer before it (MAL).

Titans: Learning to Memorize at Test Time (Behrouz et al. 2025, arXiv 2501.00663), section 4. No code by the authors. Residuals are the
caller's, and the block around a mixer here (`regard.models.TitansLM`). Chosen where the paper leaves it open:

- MAC: its equations let the tokens of a segment see what was recalled for later tokens of it, and the memory after the whole segment.
  Here token i of a segment sees what was recalled for tokens 0 to i, and the memory as token i leaves it: nothing looks ahead. The memory
  stores attention's outputs at the segment's own places, with a residual ("in all blocks") so that a token's own content is in them; the
  gate takes attention's outputs without it. (With the residual in the gate too, small models here hardly learned to recall.)
- The gate: RMSNorm of both sides (the learned vectors), then one times SiLU of the other; a linear map follows.
- Persistent tokens have no rotary position, so that they look the same from everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_shape, require_tensor
from ...ops import masks
from ...ops.attention import attention
from ...ops.reference import merge_lse
from ...ops.state.neural_memory import NeuralMemoryState
from .neural_memory import MemoryState, NeuralMemory
from .rotary import rotary_table, rotate

__all__ = ["TitansMAC", "TitansMAG", "TitansMAL", "TitansState"]

Pair = tuple[Tensor, Tensor]


@dataclass
class TitansState:
    """What a Titans layer carries: its memory, tokens seen, and keys and values (B, H, n, D) that attention may still see.

    MAC: those of the open segment, with `recalled` those of what was recalled for it, and `frozen`, the memory as the segment began.
    MAL: `prefix`, those of the persistent tokens behind the memory. n is bounded by segment or window.
    """

    memory: MemoryState
    position: int
    near: Pair
    recalled: Pair | None = None
    frozen: NeuralMemoryState | None = None
    prefix: Pair | None = None


class _Titans(nn.Module):
    """What the three have in common: persistent tokens, attention without an output map, a memory, a gate, an output map.

    Args:
        dim, num_heads: of the attention; dim a multiple. persistent: learned tokens that come before every text.
        memory_heads: default num_heads. rope_base: of rotary positions in the attention; None: none.
        depth, expansion, chunk_size, momentum, forget, max_step, conv, residual: of the memory (`regard.nn.NeuralMemory`).
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        persistent: int = 4,
        memory_heads: int | None = None,
        rope_base: float | None = None,
        depth: int = 2,
        expansion: float = 2.0,
        chunk_size: int = 16,
        momentum: bool = True,
        forget: bool = True,
        max_step: float = 1.0,
        conv: int = 4,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.head_dim = dim // num_heads
        if rope_base is not None:
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number for rotary positions")
        self.rope_base = rope_base
        self.persistent = nn.Parameter(torch.randn(require_int("persistent", persistent, 0), dim) * 0.02)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.memory = NeuralMemory(
            dim, num_heads if memory_heads is None else memory_heads, depth=depth, expansion=expansion, chunk_size=chunk_size,
            momentum=momentum, forget=forget, max_step=max_step, conv=conv, residual=residual,
        )  # fmt: skip
        self.attention_norm, self.memory_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, *, state: TitansState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, TitansState) with `return_state`; `state`: what an earlier call returned."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None:
            if not isinstance(state, TitansState):
                raise bad_type("state", state, "a TitansState")
            for near in state.near:
                require_shape("state.near", near, (x.shape[0], self.num_heads, None, self.dim // self.num_heads))
        y, state = self._mix(x, state)
        y = self.out_proj(y)
        return (y, state) if return_state else y

    def _mix(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        raise NotImplementedError

    def _tokens(self, batch: int) -> Tensor:
        return self.persistent.expand(batch, -1, -1)

    def _project(self, x: Tensor, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D); turned by positions from `first` on."""
        q, k, v = rearrange(self.qkv_proj(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return (q, k, v) if first is None else (self._turn(q, first), self._turn(k, first), v)

    def _turn(self, x: Tensor, first: int) -> Tensor:
        if self.rope_base is None:
            return x
        return rotate(x, rotary_table(torch.arange(first, first + x.shape[2], device=x.device), self.head_dim, self.rope_base))  # fmt: skip

    def _merge(self, attended: Tensor, remembered: Tensor) -> Tensor:
        return self.attention_norm(attended) * F.silu(self.memory_norm(remembered))

    def _nothing(self, x: Tensor) -> Pair:
        none = x.new_zeros(x.shape[0], self.num_heads, 0, self.head_dim)
        return none, none

    def _windowed(self, x: Tensor, prefix: Pair, past: Pair, position: int, window: int) -> tuple[Tensor, Pair]:
        """Attention to the last `window` tokens and to the prefix: (B, N, dim), and what the next tokens can still see."""
        plain, k, v = self._project(x)
        q, k = self._turn(plain, position), torch.cat((past[0], self._turn(k, position)), dim=2)
        v = torch.cat((past[1], v), dim=2)
        out, lse = attention(q, k, v, mask=masks.sliding_window(window) & masks.causal, return_lse=True)
        if prefix[0].shape[2]:
            more, at = attention(plain, *prefix, return_lse=True)
            out = merge_lse([out, more], [lse, at])[0]
        first = max(0, k.shape[2] - window + 1)
        near = (k[:, :, first:].contiguous(), v[:, :, first:].contiguous())
        return rearrange(out, "b h n d -> b n (h d)").to(x.dtype), near

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, persistent={len(self.persistent)}"


class TitansMAC(_Titans):
    """Memory as context: each token attends to the persistent tokens, what the memory recalls, and its segment. (B, N, dim) -> the same.

    For a segment, h = M(W x) at the memory as the segment before left it; a = attention of the segment to [persistent, h, segment],
    causal; y = x + a is stored in the memory; the output is a gated by what the memory then says to y.

    Args:
        segment: tokens of a segment. The others: `dim`, `num_heads`, `persistent`, `memory_heads`, `rope_base` (positions within a
            segment), `depth`, `expansion`, `chunk_size`, `momentum`, `forget`, `max_step`, `conv`, `residual`, as all Titans have them.
    """

    def __init__(self, dim: int, num_heads: int, *, segment: int = 32, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.segment = require_int("segment", segment, 1)

    def _mix(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        if state is None:
            state = TitansState(self.memory.start(x.shape[0]), 0, self._nothing(x), self._nothing(x))
        _, *fixed = self._project(self._tokens(x.shape[0]))
        made, at = [x[:, :0]], 0
        while at < x.shape[1]:
            begun = state.position % self.segment
            piece = x[:, at : at + self.segment - begun]
            y, state = self._piece(piece, begun, state, (fixed[0], fixed[1]))
            made.append(y)
            at += piece.shape[1]
        return torch.cat(made, dim=1), state

    def _piece(self, x: Tensor, begun: int, state: TitansState, fixed: Pair) -> tuple[Tensor, TitansState]:
        """Tokens of one segment, the first of them being number `begun` of it."""
        assert state.recalled is not None
        frozen = state.frozen if begun and state.frozen is not None else state.memory.memory
        near, recalled = (state.near, state.recalled) if begun else (self._nothing(x), self._nothing(x))
        h = self.memory.recall(x, frozen)
        q, *own = self._project(x, begun)
        _, *from_memory = self._project(h, begun)
        near = (torch.cat((near[0], own[0]), dim=2), torch.cat((near[1], own[1]), dim=2))
        recalled = (torch.cat((recalled[0], from_memory[0]), dim=2), torch.cat((recalled[1], from_memory[1]), dim=2))
        k, v = (torch.cat(parts, dim=2) for parts in zip(fixed, recalled, near))
        count = begun + x.shape[1]
        row = torch.arange(begun, count, device=x.device)[:, None]
        sees = torch.arange(count, device=x.device) <= row
        sees = torch.cat((sees.new_ones(len(row), fixed[0].shape[2]), sees, sees), dim=1)
        attended = rearrange(attention(q, k, v, mask=masks.dense(sees)), "b h n d -> b n (h d)").to(x.dtype)
        y = x + attended
        said, memory = self.memory(y, state=state.memory, return_state=True)
        return self._merge(attended, said), TitansState(memory, state.position + x.shape[1], near, recalled, frozen)


class TitansMAG(_Titans):
    """Memory as a gate: attention to a window and the persistent tokens, gated by the memory of all before. (B, N, dim) -> the same.

    Args:
        window: tokens that attention sees, its own included. The others as in `TitansMAC`; rotary positions are those of the text.
    """

    def __init__(self, dim: int, num_heads: int, *, window: int = 64, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.window = require_int("window", window, 1)

    def _mix(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        tokens = self._tokens(x.shape[0])
        if state is None:
            said, memory = self.memory(torch.cat((tokens, x), dim=1), return_state=True)
            said, near, position = said[:, tokens.shape[1] :], self._nothing(x), 0
        else:
            said, memory = self.memory(x, state=state.memory, return_state=True)
            near, position = state.near, state.position
        _, *fixed = self._project(tokens)
        y, near = self._windowed(x, (fixed[0], fixed[1]), near, position, self.window)
        return self._merge(y, said), TitansState(memory, position + x.shape[1], near)


class TitansMAL(_Titans):
    """Memory as a layer: the memory first, then attention to a window of its outputs, and to those of the persistent tokens.

    Args: as `TitansMAG`. There is no gate between the two.
    """

    def __init__(self, dim: int, num_heads: int, *, window: int = 64, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.window = require_int("window", window, 1)
        del self.attention_norm

    def _mix(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        if state is None:
            tokens = self._tokens(x.shape[0])
            said, memory = self.memory(torch.cat((tokens, x), dim=1), return_state=True)
            said, first = said[:, tokens.shape[1] :], said[:, : tokens.shape[1]]
            _, *fixed = self._project(self.memory_norm(first))
            prefix, near, position = (fixed[0], fixed[1]), self._nothing(x), 0
        else:
            said, memory = self.memory(x, state=state.memory, return_state=True)
            assert state.prefix is not None
            prefix, near, position = state.prefix, state.near, state.position
        y, near = self._windowed(self.memory_norm(said), prefix, near, position, self.window)
        return y, TitansState(memory, position + x.shape[1], near, prefix=prefix)
