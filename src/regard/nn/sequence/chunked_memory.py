"""The neural memory that most people mean by Titans' code: one step of momentum and decay a chunk.

Unofficial: lucidrains/titans-pytorch @ cc016eb (MIT), `titans_pytorch/neural_memory.py` (`NeuralMemory`), `memory_models.py`, read for
numbers; the paper (Behrouz et al. 2025, arXiv 2501.00663) is in `neural_memory.py` beside this file. Against the paper: momentum and
forgetting are one number a chunk, of the mean of its tokens; the loss is the mean over channels; nothing is convolved or of unit
length; reads and stores have norms of their own; a token reads after the last whole chunk that it ends. Not here: several keys a token,
pooling by attention, orders of momentum, clamped and orthogonalised gradients, step sizes a layer, weights from the layer below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_name, require_tensor
from ...ops.state.neural_memory import NeuralMemoryState, neural_memory

__all__ = ["ChunkedMemoryState", "ChunkedNeuralMemory"]


@dataclass
class ChunkedMemoryState:
    """What the layer carries: the memory, the tokens of the open chunk (B, n < chunk_size, dim), and which of them are to be stored."""

    memory: NeuralMemoryState
    waiting: Tensor
    stored: Tensor

    def select(self, rows: Tensor) -> ChunkedMemoryState:
        """Batch row i becomes what row `rows[i]` was."""
        return ChunkedMemoryState(self.memory.select(rows), self.waiting[rows], self.stored[rows])


class _HeadNorm(nn.Module):
    """RMSNorm over the last axis, times 1 + gamma, a gamma a head: (B, H, N, D)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.gamma)


class ChunkedNeuralMemory(nn.Module):
    """(B, N, dim) -> (B, N, dim), causal: tokens are stored a whole chunk at a time; one that ends a chunk already sees it.

    Args:
        dim, num_heads, head_dim (default dim / num_heads; dim with one head). chunk_size: tokens of one step.
        batch_size: tokens after which gradients are taken at the newest weights, a multiple of chunk_size; None: always at the first ones.
        depth, expansion: of the memories, MLPs with GELU. residual: a memory is x + LayerNorm(mlp(x)) (1 + g), g stored with it.
        momentum: whether there is any. max_step: of the gradient steps.
        pre_norm, post_norm, qk_norm: RMSNorms of x, of reads, of queries and keys.
        variant: "paper" (default): chunks are counted from the first token of the text. "released": which chunk a token reads is
            counted from the first token of the call, so that reading a text in pieces is not reading it whole.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        head_dim: int | None = None,
        chunk_size: int = 16,
        batch_size: int | None = None,
        depth: int = 2,
        expansion: float = 4.0,
        residual: bool = True,
        momentum: bool = True,
        max_step: float = 1.0,
        pre_norm: bool = True,
        post_norm: bool = False,
        qk_norm: bool = False,
        variant: str = "paper",
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        if head_dim is None:
            require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads}), or head_dim")
        self.head_dim = dim // num_heads if head_dim is None else require_int("head_dim", head_dim, 1)
        require(num_heads > 1 or self.head_dim == dim, "head_dim", head_dim, f"dim ({dim}), with one head")
        self.chunk_size, self.batch_size = require_int("chunk_size", chunk_size, 1), batch_size
        if batch_size is not None:
            fits = require_int("batch_size", batch_size, 1) % chunk_size == 0
            require(fits, "batch_size", batch_size, f"a multiple of chunk_size ({chunk_size})")
        require(max_step > 0, "max_step", max_step, "a number > 0")
        self.max_step, self.variant = float(max_step), require_name("variant", variant, ("paper", "released"))
        inner = num_heads * self.head_dim
        self.store_norm, self.retrieve_norm = (nn.RMSNorm(dim) if pre_norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = (_HeadNorm(num_heads, self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.read_norm = _HeadNorm(num_heads, self.head_dim) if post_norm else nn.Identity()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.step_proj, self.forget_proj = nn.Linear(dim, num_heads), nn.Linear(dim, num_heads)
        self.momentum_proj = nn.Linear(dim, num_heads) if momentum else None
        self.gate_proj = nn.Linear(dim, num_heads, bias=False) if num_heads > 1 else None
        self.out_proj = nn.Linear(inner, dim, bias=False) if num_heads > 1 else nn.Identity()
        hidden = int(self.head_dim * expansion)
        require(require_int("depth", depth, 1) == 1 or hidden > 0, "expansion", expansion, "room for a hidden unit")
        widths = [self.head_dim, *[hidden] * (depth - 1), self.head_dim]
        made = []
        for a, b in pairwise(widths):
            bound = math.sqrt(6 / (a + b))
            made.append(nn.Parameter(torch.empty(num_heads, a, b).uniform_(-bound, bound)))
        if residual:
            made.append(nn.Parameter(torch.zeros(num_heads, self.head_dim)))
        self.first = nn.ParameterList(made)

    def start(self, batch: int) -> ChunkedMemoryState:
        """The state before the first token."""
        weight = self.step_proj.weight
        none = weight.new_zeros(batch, 0, self.dim)
        return ChunkedMemoryState(NeuralMemoryState.start(list(self.first), batch), none, none[..., 0].bool())

    def forward(
        self,
        x: Tensor,
        *,
        store_mask: Tensor | None = None,
        state: ChunkedMemoryState | None = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, ChunkedMemoryState) with `return_state`; `state`: what an earlier call returned.

        store_mask: (B, N), nonzero for tokens that are stored; the others only read (and count in the mean of their chunk).
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, ChunkedMemoryState):
            raise bad_type("state", state, "a ChunkedMemoryState")
        if store_mask is None:
            store_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        shape = tuple(require_tensor("store_mask", store_mask).shape)
        require(shape == tuple(x.shape[:2]), "store_mask", f"shape {shape}", f"(B, N) = {tuple(x.shape[:2])}")
        state = self.start(x.shape[0]) if state is None else state
        size, begun, length = self.chunk_size, state.waiting.shape[1], x.shape[1]
        whole = torch.cat((state.waiting, x), dim=1)
        stored = torch.cat((state.stored, store_mask.bool()), dim=1)
        steps = whole.shape[1] // size
        now, waiting = whole[:, : steps * size], whole[:, steps * size :]

        made = self.store_norm(now)
        heads = "b n (h d) -> b h n d"
        k, v = (rearrange(t, heads, h=self.num_heads) for t in (self.k_proj(made), self.v_proj(made)))
        step = self.max_step * torch.sigmoid(self.step_proj(made)) * stored[:, : steps * size, None]
        means = made.unflatten(1, (steps, size)).mean(2) if steps else made
        forget = torch.sigmoid(self.forget_proj(means)).mT
        momentum = None if self.momentum_proj is None else torch.sigmoid(self.momentum_proj(means)).mT
        asked = self.retrieve_norm(x)
        q = self.q_norm(rearrange(self.q_proj(asked), heads, h=self.num_heads))
        memory = state.memory
        offset = 0 if self.variant == "released" and length > 1 else begun
        if (
            self.variant == "released" and length > 1 and not steps
        ):  # nothing new: theirs reads where gradients are taken
            memory = NeuralMemoryState(memory.anchor, memory.momentum, memory.anchor, memory.position)
        y, after = neural_memory(
            q, self.k_norm(k), v, memory, step.mT / self.head_dim, momentum, forget, chunk_size=self.batch_size,
            update_size=size, seen=[(offset + i + 1) // size for i in range(length)],
        )  # fmt: skip
        y = self.read_norm(y)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(asked)).mT[..., None]
        y = self.out_proj(rearrange(y, "b h n d -> b n (h d)"))
        if not return_state:
            return y
        return y, ChunkedMemoryState(after if steps else state.memory, waiting, stored[:, steps * size :])

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """lucidrains' `NeuralMemory`; its `memory_model.*` is a template whose values nothing reads."""
        names = {
            "to_queries": "q_proj", "to_keys": "k_proj", "to_values": "v_proj", "to_adaptive_step.0": "step_proj",
            "to_momentum.0": "momentum_proj", "to_decay_factor.0": "forget_proj", "retrieve_gate.0": "gate_proj",
            "combine_heads": "out_proj", "multihead_rmsnorm": "read_norm",
        }  # fmt: skip
        ours = {}
        weights: list[tuple[bool, int, Tensor]] = []
        for name, tensor in state.items():
            path, _, kind = name.rpartition(".")
            if path == "memory_model_parameters":
                weights.append((tensor.dim() == 2, int(kind), tensor))  # theirs has the norm's vector first
            elif not name.startswith("memory_model."):
                ours[f"{names.get(path, path)}.{kind}"] = tensor
        for place, (_, _, tensor) in enumerate(sorted(weights, key=lambda one: one[:2])):
            ours[f"first.{place}"] = tensor
        return ours

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, chunk_size={self.chunk_size}, batch_size={self.batch_size}"
