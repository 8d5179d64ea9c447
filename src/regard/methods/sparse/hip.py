"""HiP Attention, Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention" (2024, ICLR 2025, arXiv 2406.09827). Code read for numbers: DeepAuto-AI/hip-attention @ fea42c7 (FSL-1.1-MIT).

The search is `regard.ops.select.hierarchical_topk`, exact to the authors' deterministic v1.1 search. What their GPU kernels switch on for
speed (32 query channels, half the resolution, random representatives) is off by default here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..._checks import require, require_int, require_name, resolve_budget
from ...ops.select.choice import Choice
from ...ops.select.hierarchical_attention import search_window, with_window
from ...ops.select.hierarchical_topk import hierarchical_topk
from ...ops.selection import Selection
from ..call import AttentionCall
from .choosing import ChoosingMethod, Stretch
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, windowed


@dataclass
class HiP(ChoosingMethod):
    """Training-free sparse attention: a tree search finds about `budget` keys for each block of queries in O(log T) steps.

    Every query sees the keys that were found for its block, its last `window` keys and the first `sink`. A context that budget
    and window cover is dense. The cache still holds everything. Layers whose own sliding
    window is shorter than the context are left as they are.

    Args:
        budget: keys found per query block, int tokens or float in (0, 1], a fraction of the context.
        window: recent keys that every query sees, itself included; at least `group`.
        sink: keys at the start that every query sees, rounded up to whole key blocks.
        dense_layers: the first this many layers stay dense, or a sequence of layer numbers (negative from the end).
        refresh_every: in decoding, search at every this many-th step only and keep to what was found in between (the window
            then reaches back to where it began at the search, so no key is lost). With beam search a beam that was replaced
            may go on with its sibling's keys until the next search.
        block_q: queries that are searched for together. block_k: keys a key block. group: neighbouring keys searched as one.
        query_dims, resolution, sifters: see `regard.ops.select.hierarchical_topk`. representative: of a group of keys, its "first" block
            or a "random" one, drawn by `seed`, layer and length, so that equal prompts give equal answers.
        variant: "released" (the authors' v1.1) or "paper" (v1.0), see `regard.ops.select.hierarchical_topk`.

    Raises (from `attach`):
        UnsupportedModelError: the model has no causal self-attention.
    """

    budget: int | float = 512
    window: int = 128
    sink: int = 0
    dense_layers: DenseLayers = 3
    refresh_every: int = 1
    block_q: int = 32
    block_k: int = 2
    group: int = 1
    query_dims: int | None = None
    resolution: int = 1
    sifters: int = 1
    representative: str = "first"
    seed: int = 0
    variant: str = "released"

    def __post_init__(self) -> None:
        resolve_budget("budget", self.budget, 1)
        for name, value, least in (
            ("window", self.window, 1),
            ("sink", self.sink, 0),
            ("refresh_every", self.refresh_every, 1),
            ("block_q", self.block_q, 1),
            ("block_k", self.block_k, 1),
            ("group", self.group, 1),
            ("query_dims", 1 if self.query_dims is None else self.query_dims, 1),
            ("resolution", self.resolution, 1),
            ("sifters", self.sifters, 1),
            ("seed", self.seed, 0),
        ):
            require_int(name, value, least)
        require(self.window >= self.group, "window", self.window, f"at least group = {self.group} keys")
        if isinstance(self.budget, int):
            require(self.budget >= self.group, "budget", self.budget, f"at least group = {self.group} keys")
        require_name("variant", self.variant, ("released", "paper"))
        require_name("representative", self.representative, ("first", "random"))
        require(self.sifters <= 2, "sifters", self.sifters, "1 or 2")
        if self.variant == "paper":
            plain = self.sifters == 1 and self.representative == "first"
            require(plain, "variant", self.variant, "sifters=1 and representative='first' with variant='paper'")
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and not left_alone

    def choose(self, stretch: Stretch) -> Choice | None:
        length = stretch.k.shape[2]
        budget = max(self.group, resolve_budget("budget", self.budget, length))
        if length <= budget + self.window:  # there is nothing to leave out
            return None
        if stretch.q.shape[2] > 1 or self.refresh_every == 1:
            return with_window(self._search(stretch, budget), self.window, self.sink, stretch.q_offset)
        found, age = self._found_lately(stretch, budget)
        return with_window(found, self.window + age, self.sink, stretch.q_offset)

    def _search(self, stretch: Stretch, budget: int) -> Selection:
        call, generator = stretch.call, None
        if self.representative == "random":
            seed = (self.seed * 1009 + call.layer) * (1 << 32) + stretch.k.shape[2]
            generator = torch.Generator(stretch.q.device).manual_seed(seed % (1 << 63))
        return hierarchical_topk(
            stretch.q,
            stretch.k,
            budget,
            self.block_q,
            self.block_k,
            search_window(self.window, self.group),
            self.group,
            representative=self.representative,
            query_dims=self.query_dims,
            resolution=self.resolution,
            sifters=self.sifters,
            variant=self.variant,
            generator=generator,
        )

    def _found_lately(self, stretch: Stretch, budget: int) -> tuple[Selection, int]:
        """What the last search found, and how many steps ago; searches when that is too long ago."""
        length = stretch.k.shape[2]
        found: Selection | None = stretch.memory.get("found")
        age = 0 if found is None else length - found.kv_len
        if found is None or not 0 < age < self.refresh_every:
            found, age = self._search(stretch, budget), 0
            stretch.memory["found"] = found
        kept = Selection(found.indices, block_q=found.block_q, block_k=found.block_k, q_len=1, kv_len=length)
        return kept, age
