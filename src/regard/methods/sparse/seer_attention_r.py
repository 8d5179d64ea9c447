"""SeerAttention-R, Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning" (2025, arXiv 2506.08889). Code read for
numbers (MIT): microsoft/SeerAttention @ aba03e3, `seer_attn/decode_sparse/`.

What differs from the code: left padding is cut off before blocks are counted; a block that a token's budget does not reach is
not read at all. Variant "paper": see `GateKeys`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require_int, require_name
from ...nn.sequence.attention_gate import POOLS, DecodeAttentionGate, Rotary
from ...ops.select.choice import Choice
from ...ops.select.gate import decode_block_map
from ...ops.select.running_summaries import BlockSummaries
from ...ops.selection import Selection
from ..call import AttentionCall
from ..rotary import RotaryOf, key_positions, query_positions
from .choosing import ChoosingMethod, Stretch
from .layers import DenseLayers, check_dense_layers, require_causal, stays_dense, windowed
from .seer_attention import check_gates
from .seer_gates import as_gates


class GateKeys:
    """The gate's keys of one growing sequence: one a finished block, zero for the unfinished one, whose score is then 0.

    Args:
        gate: theirs. rope: positions (B, n) -> (cos, sin), or None: no turning.
        variant: "released": a block that is finished by `append`ing to it later is turned by the position of its last token, the
            blocks of the first `append` by that of their first. "paper": always by that of their first, as in training.
        start: position of the sequence's first token.
    """

    def __init__(
        self,
        gate: DecodeAttentionGate,
        rope: Callable[[Tensor], Rotary] | None,
        variant: str = "released",
        start: Tensor | int = 0,
    ) -> None:
        self.gate, self.rope, self.start = gate, rope, start
        self.variant = require_name("variant", variant, ("released", "paper"))
        kind = "+".join(POOLS[name] for name in gate.k_pool)
        self.pooled = BlockSummaries(block=gate.block_size, kind=kind)
        self.finished: Tensor | None = None

    @property
    def length(self) -> int:
        return self.pooled.length

    def append(self, k: Tensor) -> GateKeys:
        """Take in keys (B, Hkv, n, D), before rotary embedding, that follow those already here."""
        first = self.length == 0
        self.pooled.append(k)
        block, done = self.gate.block_size, 0 if self.finished is None else self.finished.shape[2]
        whole = self.length // block
        if whole > done or self.finished is None:
            at = torch.arange(done, whole, device=k.device) * block
            at = at + (block - 1 if self.variant == "released" and not first else 0) + self.start
            at = at.expand(k.shape[0], -1)
            fresh = self.pooled.values[:, :, done:whole].to(k.dtype)
            fresh = self.gate.project(fresh, None if self.rope is None else self.rope(at))
            self.finished = fresh if self.finished is None else torch.cat((self.finished, fresh), dim=2)
        return self

    @property
    def values(self) -> Tensor:
        """(B, Hkv, blocks, gate_dim)."""
        assert self.finished is not None
        return nn.functional.pad(self.finished, (0, 0, 0, len(self.pooled) - self.finished.shape[2]))

    def scores(self, q: Tensor, position: Tensor | int) -> Tensor:
        """Logits (B, Hkv, 1, blocks) of the query q (B, H, 1, D), before rotary embedding, at `position`, (B,) or one for all."""
        at = torch.as_tensor(position, device=q.device).reshape(-1, 1).expand(q.shape[0], -1)
        return self.gate.scores(self.gate.queries(q, None if self.rope is None else self.rope(at)), self.values)

    def reorder(self, rows: Tensor) -> None:
        """Let batch row i be what row `rows[i]` was (beam search)."""
        self.pooled.reorder(rows)
        if self.finished is not None:
            self.finished = self.finished.index_select(0, rows.to(self.finished.device))
        if isinstance(self.start, Tensor):
            self.start = self.start.index_select(0, rows.to(self.start.device))


@dataclass
class SeerAttentionR(ChoosingMethod):
    """Every generated token reads the blocks of keys that a small trained gate, one a layer, picks for it. The prompt is dense.

    One choice a kv head. The block that the token is in is always read. Gates are trained by
    `regard.losses.fit_seer_gates(model, data, decode=True)`, or read from the authors' checkpoints by `load_seer_gates`.

    Args:
        gates: `DecodeAttentionGate`s by layer number, or the file they are in. Layers without one stay dense.
        budget: keys a token reads, int tokens or float in (0, 1], a fraction of the context; rounded down to whole blocks, and the last
            block comes on top when it is not among the best (as released).
        threshold: blocks with a gate probability above it are read, in place of a budget.
        use_rope: whether gates turn what they compare (as in training).
        dense_layers: the first this many layers stay dense, or layer numbers (negative from the end).
        variant: "released" or "paper", see `GateKeys`.

    Raises (from `attach`): as `SeerAttention`.
    """

    gates: Mapping[Any, nn.Module] | nn.ModuleDict | str | Path | None = None
    budget: int | float | None = None
    threshold: float | None = None
    use_rope: bool = True
    dense_layers: DenseLayers = 0
    variant: str = "released"
    _rotary: WeakKeyDictionary[Any, RotaryOf] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.gates = as_gates(self.gates, DecodeAttentionGate)
        if self.threshold is not None and self.budget is not None:
            raise bad_value("budget, threshold", (self.budget, self.threshold), "one of them")
        if self.budget is None and self.threshold is None:
            self.budget = 4096
        if isinstance(self.budget, float):
            if not 0 < self.budget <= 1:
                raise bad_value("budget", self.budget, "tokens (int >= 1) or a fraction (float in (0, 1])")
        elif self.budget is not None:
            require_int("budget", self.budget, 1)
        require_name("variant", self.variant, ("released", "paper"))
        check_dense_layers(self.dense_layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        check_gates(self.gates, model, type(self).__name__)
        RotaryOf(model, type(self).__name__)

    def setup(self, session: Any) -> None:
        rotary = self._rotary[session] = RotaryOf(session.entry, type(self).__name__)
        rotary.watch(session)

    def applies(self, call: AttentionCall) -> bool:
        left_alone = windowed(call) or stays_dense(self.dense_layers, call.layer, call.num_layers)
        return super().applies(call) and str(call.layer) in self.gates and not left_alone  # type: ignore[operator]

    def choose(self, stretch: Stretch) -> Choice | None:
        call = stretch.call
        if call.cache is None:
            return None
        gate: Any = self.gates[str(call.layer)]  # type: ignore[index, call-overload]
        with torch.no_grad():
            rows = query_positions(call)
            rows = (rows if stretch.rows is None else rows[stretch.rows])[:, stretch.cut :]
            keys = self._keys(stretch, gate, rows)
            if call.phase != "decode":
                return None
            rotary = self._rotary[call.session]
            q = rotary.undo(stretch.q, rows).to(gate.linear_k.weight.dtype)
            kept = self._kept(keys.scores(q, rows[:, -1])[:, :, 0], gate.block_size, stretch.k.shape[2])
        sizes = {"block_q": 1, "block_k": gate.block_size, "q_len": 1, "kv_len": stretch.k.shape[2]}
        return Choice(Selection.from_block_map(kept[:, :, None], **sizes))

    def _kept(self, logits: Tensor, block: int, length: int) -> Tensor:
        if self.threshold is not None:
            return decode_block_map(logits.softmax(-1), threshold=self.threshold)
        assert self.budget is not None
        tokens = self.budget if isinstance(self.budget, int) else round(self.budget * length)
        return decode_block_map(logits, topk=tokens // block)

    def _keys(self, stretch: Stretch, gate: DecodeAttentionGate, rows: Tensor) -> GateKeys:
        """The gate's keys of the stretch, brought up to date."""
        rotary, length = self._rotary[stretch.call.session], stretch.k.shape[2]
        at = key_positions(rows, length)
        kept: GateKeys | None = stretch.memory.get("gate_keys")
        if kept is None or kept.length > length:
            rope = (lambda positions: rotary.angles(positions, gate.gate_dim)) if self.use_rope else None
            kept = stretch.memory["gate_keys"] = GateKeys(gate, rope, self.variant, at[:, :1].clone())
        if kept.length < length:
            fresh = rotary.undo(stretch.k[:, :, kept.length :], at[:, kept.length :])
            kept.append(fresh.to(gate.linear_k.weight.dtype))
        return kept
