"""Switching attention heads off, to see what they were for.

"uniform" is the ablation of Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality" (ICLR 2025, arXiv
2404.15574; authors' code nightdessert/Retrieval_Head, `faiss_attn/source/modeling_*.py`, `block_list`): the head's queries count
nothing, so it reads the mean of the values that it may see. The authors do so in decode steps alone and leave the prompt as it is.

What differs from the authors' code: their eager form sets the scores to 0 after the mask was added, which with several queries
would let a masked head see the future and padding. Ours is that of their flash form, uniform over what is visible; for one query
without padding the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import bad_type, bad_value, require, require_name
from ..call import AttentionCall, Method
from .zero_tuning import check_layers, heads_by_layer

__all__ = ["MaskHeads"]


@dataclass
class MaskHeads(Method):
    """Switch heads off while the model decodes, or always.

        with regard.attach(model, regard.MaskHeads(scores.top(30))):
            model.generate(**inputs)

    Args:
        heads: (layer, head) pairs, as `HeadScores.top` and `HeadScores.random` give them, or {layer: head numbers}. Layers may be
            negative, from the end.
        mode: "uniform": the head attends to all it may see alike. "zero": its output is zero. "mean": its output is `means`.
        phase: "decode": only steps that read a cached past with one query (the authors'); "all": the prompt too.
        means: for mode "mean", the output that stands for each head: (layers, H, Dv).
    """

    heads: Any
    mode: str = "uniform"
    phase: str = "decode"
    means: Tensor | None = None

    def __post_init__(self) -> None:
        require_name("mode", self.mode, ("uniform", "zero", "mean"))
        require_name("phase", self.phase, ("decode", "all"))
        table = heads_by_layer(self.heads)
        if table is None and (self.heads is None or list(self.heads)):
            raise bad_value("heads", self.heads, "(layer, head) pairs or {layer: head numbers}")
        self._table = table or {}
        if (self.means is not None) != (self.mode == "mean"):
            raise bad_type(
                "means",
                self.means,
                f"{'a tensor (layers, H, Dv)' if self.mode == 'mean' else 'None'} for mode {self.mode!r}",
            )
        if self.means is not None:
            require(self.means.dim() == 3, "means", f"shape {tuple(self.means.shape)}", "(layers, H, Dv)")

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        heads = sorted({*self._table.get(call.layer, ()), *self._table.get(call.layer - call.num_layers, ())})
        if not heads or (self.phase == "decode" and call.phase != "decode"):
            return
        require(heads[0] >= 0 and heads[-1] < call.num_heads, "heads", heads, f"head numbers in [0, {call.num_heads})")
        if self.mode == "uniform":
            self._uniform(call, heads)
            return
        index = torch.tensor(heads, device=call.q.device)
        if self.mode == "zero":
            call.on_output(lambda out: out.index_fill(1, index, 0.0))
            return
        assert self.means is not None
        fits = self.means.shape[0] == call.num_layers and self.means.shape[1:] == (call.num_heads, call.v.shape[-1])
        wanted = f"(layers, H, Dv) = {(call.num_layers, call.num_heads, call.v.shape[-1])}"
        require(fits, "means", f"shape {tuple(self.means.shape)}", wanted)
        means = self.means[call.layer, heads]
        call.on_output(lambda out: _replace(out, index, means))

    @staticmethod
    def _uniform(call: AttentionCall, heads: list[int]) -> None:
        """Zero queries give equal scores. Where the model itself adds a bias to its scores, that has to go too."""
        index = torch.tensor(heads, device=call.q.device)
        call.q = call.q.index_fill(1, index, 0.0)
        call.biases = [_without(bias, index, call.num_heads) for bias in call.biases]


def _without(bias: Tensor, index: Tensor, num_heads: int) -> Tensor:
    """The bias without its finite part in these heads; what forbids a key (-inf, or a number as large as the type has) stays."""
    full = bias.expand(-1, num_heads, -1, -1)
    rows = full[:, index]
    return full.index_copy(1, index, torch.where(rows < torch.finfo(bias.dtype).min / 2, rows, 0.0))


def _replace(out: Tensor, index: Tensor, means: Tensor) -> Tensor:
    rows = means.to(out)[None, :, None].expand(out.shape[0], -1, out.shape[2], -1)
    return out.index_copy(1, index, rows)
