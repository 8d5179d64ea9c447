"""Grouped top-k and block top-k decoding of Kinetics, Sadhukhan et al., "Kinetics: Rethinking Test-Time Scaling Laws" (2025,
arXiv 2506.05333). Code read for numbers: Infini-AI-Lab/Kinetics @ af7fa57 (no licence).

The rule on scores is `regard.ops.select.grouped_topk` / `grouped_block_topk`. The mean of the scores over the heads of a group and over the
keys of a block is the score of the mean query with the mean key, so the mean keys of blocks, made once, stand for all keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, resolve_budget
from ...ops.reference import accumulation_dtype
from ...ops.select.choice import Choice
from ...ops.select.running_summaries import BlockSummaries
from ...ops.selection import Selection
from ..call import AttentionCall
from .choosing import ChoosingMethod, Stretch
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, windowed


@dataclass
class GroupedTopK(ChoosingMethod):
    """Decoding reads `budget` keys: the first `sink`, the last `recent`, and the blocks that the mean query of each group wants most.

    The prompt is dense, and so is every call of more than one token. The cache still holds everything; with `block_size` > 1 a token reads
    one summary a block and then the chosen keys, with 1 (the oracle of the paper) all keys are scored. Keys that fill no block count as
    recent. Layers whose own sliding window is shorter than the context are left as they are.

    Args:
        budget: keys a token reads, int tokens or float in (0, 1], a fraction of the context. A fraction that does not cover sinks and
            recent keys leaves fewer recent ones.
        block_size: keys a block; 1: single keys.
        sink: keys at the start that are always read (4 as released). recent: keys at the end likewise.
        dense_layers: the first this many layers stay dense (1 as released), or a sequence of layer numbers (negative from the end).

    Raises:
        ValueError: an int budget that leaves no block beside sinks and recent keys.
        UnsupportedModelError (from `attach`): the model has no causal self-attention.
    """

    budget: int | float = 1024
    block_size: int = 16
    sink: int = 4
    recent: int = 64
    dense_layers: DenseLayers = 1

    def __post_init__(self) -> None:
        resolve_budget("budget", self.budget, 1)
        for name, value, least in (
            ("block_size", self.block_size, 1),
            ("sink", self.sink, 0),
            ("recent", self.recent, 1),
        ):
            require_int(name, value, least)
        if isinstance(self.budget, int):
            least = self.sink + self.recent + self.block_size
            need = f"at least sink + recent + block_size = {least} tokens"
            require(self.budget >= least, "budget", self.budget, need)
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and not left_alone

    def choose(self, stretch: Stretch) -> Choice | None:
        if stretch.call.phase != "decode":
            return None
        length, size = stretch.k.shape[2], self.block_size
        budget = resolve_budget("budget", self.budget, length)
        recent = min(self.recent, max(1, budget - self.sink))
        topk = max(0, budget - self.sink - recent) // size
        if length <= -(-(self.sink + recent + topk * size) // size) * size:
            return None
        count = (length - recent - self.sink) // size
        q = stretch.q.to(accumulation_dtype(stretch.q.dtype)).unflatten(1, (stretch.k.shape[1], -1)).mean(2)
        keys = self._summaries(stretch)[:, :, :count] if size > 1 else stretch.k[:, :, self.sink : self.sink + count]
        best = (q @ keys.to(q.dtype).transpose(-1, -2))[:, :, 0].topk(min(topk, count), dim=-1).indices
        return Choice(self._selection(best, count, length))

    def _selection(self, best: Tensor, count: int, length: int) -> Selection:
        """Blocks `best` (B, Hkv, k), the first after the sinks, with sinks and recent keys, in units that divide block and sinks."""
        unit = math.gcd(self.sink, self.block_size)
        per, first = self.block_size // unit, self.sink // unit
        chosen = (first + best[..., None] * per + torch.arange(per, device=best.device)).flatten(-2)
        late = torch.arange(first + count * per, -(-length // unit), device=best.device)
        always = torch.cat((torch.arange(first, device=best.device), late)).expand(*chosen.shape[:2], -1)
        indices = torch.cat((always, chosen), dim=-1)[:, :, None]
        return Selection(indices, block_q=1, block_k=unit, q_len=1, kv_len=length)

    def _summaries(self, stretch: Stretch) -> Tensor:
        """Mean keys of the blocks after the sinks, (B, Hkv, blocks, D): those of finished blocks are made once."""
        held: BlockSummaries | None = stretch.memory.get("summaries")
        if held is None:
            held = stretch.memory["summaries"] = BlockSummaries(block=self.block_size)
        return held.update(stretch.k[:, :, self.sink :]).values
