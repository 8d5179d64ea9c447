"""DHSA, Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (2025,
arXiv 2510.24606). Code read for numbers (no licence): xiongsiheng/DHSA @ cc8e9c7, folder `legacy/`.

What differs from the code: layers with a sliding window keep the model's own window (the authors' mask is one key wider); batches
may be padded, and rows may have different numbers of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_name, resolve_budget
from ...ops.masks import causal
from ...ops.reference import attention_scores, softmax_with_lse
from ...ops.select.boundaries import attention_mass_ratio, even_boundaries, pick_boundaries
from ...ops.select.choice import Choice
from ...ops.select.chunk_attention import chunk_choice
from ...ops.select.chunk_topk import POOLINGS
from ..call import AttentionCall, UnsupportedModelError
from .choosing import ChoosingMethod, Stretch
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, text_config


@dataclass
class DHSA(ChoosingMethod):
    """Sparse prefill: the context is cut into chunks, chunks are scored, every block of queries reads the keys of the best ones.

    All heads of a layer share the choice. The last `instruction` tokens of the prompt see everything, and so does every token
    that is generated (decoding is dense; the cache holds everything). A budget of the whole context is dense attention.

    Args:
        budget: keys a query block, int tokens or float in (0, 1], a fraction of the context.
        block_q: queries a block. local: keys before the end of the block that are always read. sink: keys at the start likewise
            (in variant "released" they take the place of chosen keys, see `regard.ops.select.chunk_topk`).
        predictor: where chunks end. A `regard.nn.BoundaryPredictor` trained for the model; "attention": measured on the layer's
            own attention (a full N x N matrix, for experiments and as training labels); a function from keys (B, Hkv, N, D) to one
            score a gap (B, N); None: even chunks of `block_q // chunks_per_block` tokens.
        chunks_per_block: chunks are at most this many times the blocks of the prompt.
        theta: only gaps with a score above it end a chunk; None: no threshold. As released the predictor's raw logits, and with
            "attention" the mass ratio, are compared with the same 1.1.
        nms: chunks end more than this many tokens apart. 0: no rule.
        instruction: tokens at the end of the prompt that see everything.
        pooling: how blocks and chunks are summarised, "sqrt" (as published), "mean" or "max".
        share_boundaries: the first treated layer's chunks serve all layers of a forward pass (as released).
        dense_layers: the first this many layers stay dense, or a sequence of layer numbers (negative from the end).
        variant: "released" or "paper".

    Raises (from `attach`):
        UnsupportedModelError: the model has no causal self-attention, or its keys do not have the predictor's channels.
    """

    budget: int | float = 1024
    block_q: int = 128
    local: int = 128
    sink: int = 128
    predictor: nn.Module | Callable[[Tensor], Tensor] | str | None = None
    chunks_per_block: int = 8
    theta: float | None = 1.1
    nms: int = 8
    instruction: int = 64
    pooling: str = "sqrt"
    share_boundaries: bool = True
    dense_layers: DenseLayers = 0
    variant: str = "released"

    def __post_init__(self) -> None:
        resolve_budget("budget", self.budget, 1)
        for name, value, least in (
            ("block_q", self.block_q, 1),
            ("local", self.local, 0),
            ("sink", self.sink, 0),
            ("chunks_per_block", self.chunks_per_block, 1),
            ("nms", self.nms, 0),
            ("instruction", self.instruction, 0),
        ):
            require_int(name, value, least)
        if self.predictor is not None and not callable(self.predictor) and self.predictor != "attention":
            raise bad_value("predictor", self.predictor, 'a module or function, "attention", or None')
        require_name("pooling", self.pooling, POOLINGS)
        require_name("variant", self.variant, ("released", "paper"))
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        config, channels = text_config(model), getattr(self.predictor, "channels", None)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if not isinstance(channels, int) or heads is None:
            return
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if heads * width != channels:
            raise UnsupportedModelError(
                f"model: the keys of {type(model).__name__} have {heads} x {width} = {heads * width} channels, "
                f"and the boundary predictor was made for {channels}"
            )

    def applies(self, call: AttentionCall) -> bool:
        return super().applies(call) and not stays_dense(self.dense_layers, call.layer, call.num_layers)

    def choose(self, stretch: Stretch) -> Choice | None:
        rows, length = stretch.q.shape[2], stretch.k.shape[2]
        budget = resolve_budget("budget", self.budget, length)
        if stretch.call.phase == "decode" or rows <= self.instruction:
            return None
        if budget >= length and (self.variant == "paper" or self.sink <= self.block_q):
            return None
        window = stretch.call.window
        return chunk_choice(
            stretch.q,
            stretch.k,
            self._shared_boundaries(stretch),
            budget,
            self.block_q,
            self.local,
            self.sink,
            instruction=self.instruction,
            pooling=self.pooling,
            window=window if window is not None and window < length else None,
            variant=self.variant,
        )

    def _shared_boundaries(self, stretch: Stretch) -> Tensor:
        session = stretch.call.session
        if session is None or not self.share_boundaries:
            return self.boundaries(stretch)
        shared: dict[Any, Tensor] = session.last.setdefault("dhsa_boundaries", {})
        place = (stretch.start, stretch.k.shape[2])
        if place not in shared:
            shared[place] = self.boundaries(stretch)
        return shared[place].to(stretch.k.device)

    def boundaries(self, stretch: Stretch) -> Tensor:
        """Cuts of the stretch's keys into chunks, int64 (C + 1,) or (b, C + 1)."""
        length = stretch.k.shape[2]
        if self.predictor is None:
            return even_boundaries(length, max(1, self.block_q // self.chunks_per_block), device=stretch.k.device)
        with torch.no_grad():
            scores = self._gap_scores(stretch)
        shape = (stretch.k.shape[0], length)
        require(
            tuple(scores.shape) == shape, "predictor", f"scores of shape {tuple(scores.shape)}", f"(B, N) = {shape}"
        )
        chunks = length // self.block_q * self.chunks_per_block
        return pick_boundaries(
            scores, chunks, theta=self.theta, nms=self.nms, instruction=min(self.instruction, length - 1)
        )

    def _gap_scores(self, stretch: Stretch) -> Tensor:
        if isinstance(self.predictor, str):
            call, sliding = stretch.call, stretch.call.window
            require(
                stretch.q_offset == 0,
                "predictor",
                "attention",
                "the whole prompt in one call; this one continues an earlier one",
            )
            scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
            scores = attention_scores(stretch.q, stretch.k, mask=causal, q_offset=0, scale=scale)
            return attention_mass_ratio(softmax_with_lse(scores)[0], sliding=sliding)
        assert callable(self.predictor)
        gap_scores = getattr(self.predictor, "gap_scores", self.predictor)
        return gap_scores(stretch.k)
