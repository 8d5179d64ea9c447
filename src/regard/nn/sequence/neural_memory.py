"""Titans' long-term memory as a layer: an MLP that learns the sequence while it is read.

Titans: Learning to Memorize at Test Time (Behrouz et al. 2025, arXiv 2501.00663), sections 3 and 4.4. No code by the authors, so nothing
here is pinned to their numbers; the arithmetic of the memory is `regard.ops.state.neural_memory`. The paper leaves open, and here is
chosen: heads (a memory each; 1 is the paper's), GELU between the memory's layers, first weights learned (the last matrix from zeros),
where the gates of step, momentum and forgetting start, and how the output is gated: RMSNorm, then SiLU of a linear map of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_name, require_tensor
from ...ops.state.neural_memory import ACTIVATIONS, NeuralMemoryState, memory_read, neural_memory
from .short_conv import ShortConv

__all__ = ["MemoryState", "NeuralMemory"]


@dataclass
class MemoryState:
    """What the layer carries: the memory, and the last inputs of its convolution (B, width - 1, 3 dim) or None. Constant in size."""

    memory: NeuralMemoryState
    conv: Tensor | None

    def detach(self) -> MemoryState:
        """The same numbers, without the way back to earlier tokens."""
        return MemoryState(self.memory.detach(), None if self.conv is None else self.conv.detach())

    def select(self, rows: Tensor) -> MemoryState:
        """Batch row i becomes what row `rows[i]` was."""
        return MemoryState(self.memory.select(rows), None if self.conv is None else self.conv[rows])


class NeuralMemory(nn.Module):
    """(B, N, dim) -> (B, N, dim), causal: token t is stored, then the memory is asked for it. Alone it is the paper's LMM.

    q, k, v are linear in x, convolved over the last `conv` tokens, through SiLU; q and k of length 1. Steps, momentum and forgetting
    are sigmoids of linear maps of x, one a token and head.

    Args:
        dim, num_heads: dim a multiple; heads have memories of their own. depth: layers of a memory; 1 is a matrix.
        expansion: hidden width of a memory over head_dim. chunk_size: tokens whose gradients are taken at the same weights.
        momentum, forget: whether there are such gates; without: 0. max_step: of the gradient steps. conv: width, 0: none.
        activation: inside the memory. residual: the memory is x + LayerNorm(mlp(x)) (1 + g), g learned with it: steadier when deep.
        start: where sigmoids begin: step over max_step, momentum, forgetting.
        form: of the op, "chunk" or "recurrent" (slow, the definition).

    Steps of a chunk add up before anyone corrects them: with `max_step * chunk_size` far above 1, equal keys can make a memory diverge.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        depth: int = 2,
        expansion: float = 2.0,
        chunk_size: int = 16,
        momentum: bool = True,
        forget: bool = True,
        max_step: float = 1.0,
        conv: int = 4,
        activation: str = "gelu",
        residual: bool = False,
        start: tuple[float, float, float] = (0.05, 0.5, 0.01),
        form: str = "chunk",
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.head_dim, self.depth = dim // num_heads, require_int("depth", depth, 1)
        require(expansion > 0, "expansion", expansion, "a number > 0")
        require(max_step > 0, "max_step", max_step, "a number > 0")
        inside = len(start) == 3 and all(0 < one < 1 for one in start)
        require(inside, "start", start, "three numbers in (0, 1)")
        self.chunk_size, self.max_step = require_int("chunk_size", chunk_size, 1), float(max_step)
        self.activation, self.form = require_name("activation", activation, ACTIVATIONS), form
        self.momentum, self.forget = bool(momentum), bool(forget)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv) if require_int("conv", conv, 0) else None
        self.scalar_proj = nn.Linear(dim, 3 * num_heads)
        hidden = max(1, round(self.head_dim * expansion))
        widths = [self.head_dim, *[hidden] * (depth - 1), self.head_dim]
        self.first = nn.ParameterList(torch.empty(num_heads, a, b) for a, b in pairwise(widths))
        if residual:
            self.first.append(nn.Parameter(torch.zeros(num_heads, self.head_dim)))
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, 1e-5)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            for place, weight in enumerate(list(self.first)[:depth]):
                bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
                nn.init.zeros_(weight) if place == depth - 1 else nn.init.uniform_(weight, -bound, bound)
            nn.init.normal_(self.scalar_proj.weight, std=0.02)
            logits = [math.log(one / (1 - one)) for one in start]
            self.scalar_proj.bias.copy_(torch.tensor(logits).repeat_interleave(num_heads))

    def start(self, batch: int) -> MemoryState:
        """The state before the first token."""
        return MemoryState(NeuralMemoryState.start(list(self.first), batch), None)

    def recall(self, x: Tensor, memory: NeuralMemoryState) -> Tensor:
        """What a memory holds under x (B, N, dim), asked by the layer's queries without their convolution: (B, N, dim), normed."""
        asked = F.silu(F.linear(x, self.qkv_proj.weight[: self.dim]))
        q = F.normalize(rearrange(asked, "b n (h d) -> b h n d", h=self.num_heads), dim=-1)
        return rearrange(self.norm(memory_read(memory.weights, q, self.activation)), "b h n d -> b n (h d)").to(x.dtype)

    def forward(self, x: Tensor, *, state: MemoryState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, MemoryState) with `return_state`; `state`: what an earlier call returned."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, MemoryState):
            raise bad_type("state", state, "a MemoryState")
        if state is not None:
            need = f"those of a batch of {x.shape[0]} in this layer"
            shapes = [tuple(weight.shape) for weight in state.memory.weights]
            fits = shapes == [(x.shape[0], *weight.shape) for weight in self.first]
            require(fits, "state.memory", f"weights {shapes}", need)
        state = self.start(x.shape[0]) if state is None else state
        qkv, tail = self.qkv_proj(x), None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, state.conv)
        q, k, v = rearrange(F.silu(qkv), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        step, momentum, forget = rearrange(
            self.scalar_proj(x).to(wide), "b n (three h) -> three b h n", three=3
        ).sigmoid()
        y, memory = neural_memory(
            q, k, v, state.memory, self.max_step * step, momentum if self.momentum else None, forget if self.forget else None,
            chunk_size=self.chunk_size, activation=self.activation, form=self.form,
        )  # fmt: skip
        y = rearrange(self.norm(y), "b h n d -> b n (h d)")
        y = self.out_proj(y * F.silu(self.gate_proj(x)))
        return (y, MemoryState(memory, tail)) if return_state else y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, depth={self.depth}, chunk_size={self.chunk_size}"
