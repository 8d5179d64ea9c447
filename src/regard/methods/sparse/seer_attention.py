"""SeerAttention, Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024, arXiv 2410.13276). Code read for
numbers (MIT): microsoft/SeerAttention @ aba03e3, `seer_attn/prefill_sparse/` and `seer_attn/modules/`.

What differs from the code: left padding is cut off before blocks are counted (theirs counts blocks of the padded row and hides those
that are all padding, so that a prompt's blocks depend on its batch mates); a prompt may come in several calls; query heads of a
kv head may choose together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_fraction, require_int, require_name
from ...nn.sequence.attention_gate import AttentionGate
from ...ops.select.blocks import SHARINGS, BlockGrid, share_scores
from ...ops.select.choice import Choice
from ...ops.select.gate import gate_block_map
from ...ops.selection import Selection
from ..call import AttentionCall, UnsupportedModelError
from ..rotary import RotaryOf, key_positions, query_positions
from .choosing import ChoosingMethod, Stretch
from .layers import require_causal, text_config, windowed
from .seer_gates import as_gates


@dataclass
class SeerAttention(ChoosingMethod):
    """Prompts read the blocks of keys that a small trained gate, one a layer, thinks worth it. Decoding is dense.

    Gates are trained by `regard.losses.fit_seer_gates`, or read from the authors' checkpoints by `load_seer_gates`.

    Args:
        gates: `AttentionGate`s by layer number, or the file they are in. Layers without one stay dense, and so do those whose own sliding
            window already hides a part of the context.
        threshold: blocks with a gate probability above it are read. Default 2e-3 when neither this nor `ratio` is given. Below 0:
            everything is.
        ratio: about this part of the causal triangle is read, in place of a threshold; 1: everything.
        dense_last: blocks of queries at the end of the prompt that see everything (as released: 2).
        diagonal: whether each block of queries always reads its own block of keys. False, as released: a row may lose even itself; one
            that is left with nothing gives zeros.
        share: "none": each query head has its own choice. "mean", "max": the query heads of a kv head choose together, by the mean or
            maximum of their gate scores, which is faster.

    Raises (from `attach`):
        UnsupportedModelError: the model is not causal, has no rotary embedding that can be undone, or the gates are not made for it.
    """

    gates: Mapping[Any, nn.Module] | nn.ModuleDict | str | Path | None = None
    threshold: float | None = None
    ratio: float | None = None
    dense_last: int = 2
    diagonal: bool = False
    share: str = "none"
    _rotary: WeakKeyDictionary[Any, RotaryOf] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.gates = as_gates(self.gates, AttentionGate)
        if self.threshold is not None and self.ratio is not None:
            raise bad_value("threshold, ratio", (self.threshold, self.ratio), "one of them")
        if self.threshold is None and self.ratio is None:
            self.threshold = 2e-3
        if self.ratio is not None:
            require(require_fraction("ratio", self.ratio) > 0, "ratio", self.ratio, "a fraction in (0, 1]")
        require_int("dense_last", self.dense_last, 0)
        require_name("share", self.share, SHARINGS)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        check_gates(self.gates, model, type(self).__name__)
        RotaryOf(model, type(self).__name__)

    def setup(self, session: Any) -> None:
        rotary = self._rotary[session] = RotaryOf(session.entry, type(self).__name__)
        rotary.watch(session)

    def applies(self, call: AttentionCall) -> bool:
        return super().applies(call) and str(call.layer) in self.gates and not windowed(call)  # type: ignore[operator]

    def choose(self, stretch: Stretch) -> Choice | None:
        call = stretch.call
        if call.phase == "decode" or (self.threshold is not None and self.threshold < 0) or self.ratio == 1:
            return None
        gate: Any = self.gates[str(call.layer)]  # type: ignore[index, call-overload]
        grid = BlockGrid(stretch.q.shape[2], stretch.k.shape[2], gate.block_size, gate.block_size, stretch.q_offset)
        if grid.num_k_blocks == 1:
            return None
        with torch.no_grad():
            kept = self._block_map(stretch, gate, grid)
        sizes = {"block_q": grid.block_q, "block_k": grid.block_k, "q_len": grid.q_len, "kv_len": grid.kv_len}
        return Choice(Selection.from_block_map(kept, **sizes))

    def _block_map(self, stretch: Stretch, gate: AttentionGate, grid: BlockGrid) -> Tensor:
        scores = gate_scores(
            stretch, gate, grid, self._rotary[stretch.call.session], softmax=self.threshold is not None
        )
        return gate_block_map(
            share_scores(scores, gate.num_kv_heads, self.share),
            threshold=self.threshold,
            ratio=self.ratio,
            dense_last=self.dense_last,
            diagonal=self.diagonal,
            visible=grid.visible(scores.device),
        )


def gate_scores(stretch: Stretch, gate: AttentionGate, grid: BlockGrid, rotary: RotaryOf, softmax: bool) -> Tensor:
    """What `gate` says of a stretch, (B, H, nQ, nK)."""
    rows = query_positions(stretch.call)
    rows = (rows if stretch.rows is None else rows[stretch.rows])[:, stretch.cut :]
    columns = key_positions(rows, stretch.k.shape[2])
    dtype = gate.linear_k.weight.dtype
    angles = tuple(rotary.angles(at[:, :: gate.block_size], gate.gate_dim) for at in (rows, columns))
    return gate(
        rotary.undo(stretch.q, rows).to(dtype),
        rotary.undo(stretch.k, columns).to(dtype),
        angles,
        torch.zeros((), dtype=dtype, device=stretch.q.device).masked_fill(
            ~grid.visible(stretch.q.device), torch.finfo(dtype).min
        ),
        softmax=softmax,
    )


def check_gates(gates: Any, model: nn.Module, method: str) -> None:
    """Raise `UnsupportedModelError` unless the gates fit the model's heads and layers."""
    config, first = text_config(model), next(iter(gates.values()))
    heads = config.num_attention_heads
    have = (heads, getattr(config, "num_key_value_heads", None) or heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if (first.num_heads, first.num_kv_heads, first.head_dim) != (*have, dim):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has {have[0]} query and {have[1]} kv heads of {dim}, and the gates of {method} were made for "
            f"{first.num_heads}, {first.num_kv_heads} and {first.head_dim}"
        )
    beyond = [layer for layer in gates if not 0 <= int(layer) < config.num_hidden_layers]
    if beyond:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has {config.num_hidden_layers} layers, and {method} has a gate for {beyond[0]}"
        )
