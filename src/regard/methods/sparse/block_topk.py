"""`BlockTopK`: read the blocks of keys whose summaries fit the queries best. Training-free, in prefill and decoding.

With "minmax" summaries the criterion is that of Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"
(2024, arXiv 2406.10774), which is for decoding only; with "mean" and one choice a kv head, that of the block top-k of Sadhukhan et
al., "Kinetics: Rethinking Test-Time Scaling Laws" (2025, arXiv 2506.05333).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..._checks import require, require_int, require_name, resolve_budget
from ...ops.select.block_topk import block_topk
from ...ops.select.blocks import SHARINGS
from ...ops.select.choice import Choice
from ...ops.select.running_summaries import BlockSummaries
from ...ops.select.summaries import SUMMARIES
from ..call import AttentionCall
from .choosing import ChoosingMethod, Stretch
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, windowed


@dataclass
class BlockTopK(ChoosingMethod):
    """Each block of queries reads the blocks of keys with the best summary scores, up to a budget.

    The cache holds everything; what is not chosen is not read. Summaries are kept up to date while decoding: a finished block is
    summarised once. A budget of the whole context is dense attention.

    Args:
        budget: keys a query block reads, int tokens or float in (0, 1], a fraction of the context; rounded up to whole blocks. Sink
            and recent keys are within it (where they do not fit, as with a small fraction of a short context, they are read anyway).
        block_size: keys a block. block_q: queries of a prompt that choose together; larger is faster on a CPU and chooses less well.
            A token that is generated chooses for itself.
        summary: what stands for a block: "minmax" (Quest's bound), "mean", "maxminmean", "centroid", "max", "min"; see
            `regard.ops.select.block_summaries`. Extremes are found in keys as they were turned by their positions.
        share: whether the query heads of a kv head choose together, by the "mean" or "max" of their scores, or each for itself
            ("none": as Quest; slower, since every head gathers its own keys).
        rows: "max": every query of a block is scored, and the block has its best; "mean": the mean query is, which is cheaper and loses
            single queries that want something else than their neighbours.
        sink: keys at the start that are always read. recent: keys up to each query, itself included, that are always read (>= 1).
        prefill, decode: where it acts. dense_layers: the first this many layers stay dense (Quest: 2), or layer numbers (negative
            from the end). Layers whose own sliding window already hides a part of the context are left alone.

    Raises (from `attach`):
        UnsupportedModelError: the model has no causal self-attention.
    """

    budget: int | float = 1024
    block_size: int = 64
    block_q: int = 64
    summary: str = "minmax"
    share: str = "mean"
    rows: str = "max"
    sink: int = 4
    recent: int = 64
    prefill: bool = True
    decode: bool = True
    dense_layers: DenseLayers = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block_size", self.block_size, 1),
            ("block_q", self.block_q, 1),
            ("sink", self.sink, 0),
            ("recent", self.recent, 1),
        ):
            require_int(name, value, least)
        resolve_budget("budget", self.budget, 1)
        if isinstance(self.budget, int):
            least = self.sink + self.recent
            require(self.budget >= least, "budget", self.budget, f"at least sink + recent = {least} keys")
        require_name("summary", self.summary, SUMMARIES)
        require_name("share", self.share, SHARINGS)
        require_name("rows", self.rows, ("mean", "max"))
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and not left_alone

    def choose(self, stretch: Stretch) -> Choice | None:
        rows, length = stretch.q.shape[2], stretch.k.shape[2]
        budget = resolve_budget("budget", self.budget, length)
        summaries = self._summaries(stretch)
        if budget >= length or not (self.decode if stretch.call.phase == "decode" else self.prefill):
            return None
        selection = block_topk(
            stretch.q,
            stretch.k,
            block_q=min(self.block_q, rows),
            block_k=self.block_size,
            summary=self.summary,
            share=self.share,
            rows=self.rows,
            summaries=summaries,
            budget=budget,
            sink=self.sink,
            recent=self.recent,
        )
        return Choice(selection)

    def _summaries(self, stretch: Stretch) -> BlockSummaries:
        """Those of the stretch's keys, brought up to date."""
        kept: BlockSummaries | None = stretch.memory.get("summaries")
        if kept is None:
            kept = stretch.memory["summaries"] = BlockSummaries(block=self.block_size, kind=self.summary)
        return kept.update(stretch.k)
