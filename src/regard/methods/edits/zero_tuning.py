"""ZeroTuning: one factor on the attention that the first token gets.

Paper: Han et al. 2025, "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training" (ICLR
2026, arXiv 2505.11739). Authors' code, read for numbers: FeijiangHan/ZeroTuning (`modelling_llama.py:ZeroTuning_Attention`).

Weights on key 0 are multiplied by gamma and each row is renormalised, in the chosen heads of the chosen layers, for every query
of the prompt and of every decode step. Above 1 this flattens what is left for the other tokens, below 1 it sharpens it; how the
others share it never changes. Done as log gamma added to the scores, which is exactly the same, so fast kernels stay.

What differs from the authors' code: with left padding, positions count from each row's first real token, where theirs takes the
padding for token 0; rows that a factor of 0 leaves without any weight are zeros, where theirs are NaN. (Their published file calls
the function by a misspelt name and fails as shipped; the function itself gives the numbers that ours are checked against.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..._checks import bad_type, bad_value, require, require_int
from ...ops.reweight import log_factor_bias
from ..call import AttentionCall, Method

__all__ = ["ZeroTuning", "check_layers", "heads_by_layer"]


def heads_by_layer(heads: Any) -> dict[int, list[int]] | None:
    """{layer: head numbers} from such a mapping or from (layer, head) pairs; None for a plain list of head numbers or None."""
    if heads is None:
        return None
    if isinstance(heads, Mapping):
        return {int(layer): sorted({int(head) for head in numbers}) for layer, numbers in heads.items()}
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
        raise bad_type("heads", heads, "head numbers, (layer, head) pairs, a mapping {layer: heads} or None")
    heads = list(heads)
    if all(isinstance(head, int) and not isinstance(head, bool) for head in heads):
        return None
    table: dict[int, list[int]] = {}
    for pair in heads:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(number, int) for number in pair):
            raise bad_value("heads", heads, "head numbers, (layer, head) pairs, a mapping {layer: heads} or None")
        table.setdefault(int(pair[0]), []).append(int(pair[1]))
    return {layer: sorted(set(numbers)) for layer, numbers in table.items()}


def check_layers(table: dict[int, list[int]] | None, num_layers: int) -> None:
    """Raise a `ValueError` if a table of `heads_by_layer` names a layer that the model has not."""
    for layer in table or ():
        require(-num_layers <= layer < num_layers, "heads", f"layer {layer}", f"layers in [0, {num_layers})")


@dataclass
class ZeroTuning(Method):
    """Scale the attention on one key, the first, or on a span of keys, and renormalise.

        with regard.attach(model, regard.ZeroTuning(gamma=2.0, heads=profile.up)):
            model.generate(**inputs)

    Args:
        gamma: factor on the weights, >= 0. 1 changes nothing, 0 removes the key. The authors' demo sweeps 1 to 4; their examples
            use 4 (SST-2) and 0.3 (BoolQ). A good value is found on a few unlabelled prompts with `regard.lens.tune_gamma`.
        heads: which query heads: numbers, applied in every layer treated (the authors' rule); or (layer, head) pairs, or
            {layer: head numbers}, for exactly those. None = all.
        layers: which layers, negative from the end; None = all. (The paper finds the first two thirds to matter most.)
        key: position of the key. span: a range (start, end) of keys instead. Both count from the first real token of each row; 0
            is normally the BOS token.
    """

    gamma: float = 2.0
    heads: Any = None
    layers: Sequence[int] | None = None
    key: int = 0
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)):
            raise bad_type("gamma", self.gamma, "a number >= 0")
        require(0 <= self.gamma < float("inf"), "gamma", self.gamma, "a finite number >= 0")
        require_int("key", self.key, 0)
        if self.span is not None:
            span = tuple(self.span)
            fits = len(span) == 2 and all(isinstance(end, int) for end in span) and 0 <= span[0] <= span[1]
            require(fits, "span", span, "a (start, end) pair of positions, 0 <= start <= end")
            require(self.key == 0, "key", self.key, "0 (the default) where a span is given")
        self._table = heads_by_layer(self.heads)

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)
        if self.layers is not None:
            check_layers({layer: [] for layer in self.layers}, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        heads = self.heads if self._table is None else self._heads_here(call)
        if self.gamma == 1 or (heads is not None and not len(heads)):
            return
        begin, end = (self.key, self.key + 1) if self.span is None else self.span
        position = torch.arange(call.kv_len, device=call.q.device) + call.key_offset - call.start[:, None]
        chosen = (position >= begin) & (position < end)
        gamma = torch.tensor(float(self.gamma), dtype=torch.float64 if call.q.dtype == torch.float64 else torch.float32)
        call.add_bias(log_factor_bias(chosen, gamma, call.kv_len, num_heads=call.num_heads, heads=heads))

    def _heads_here(self, call: AttentionCall) -> list[int]:
        assert self._table is not None
        return sorted({*self._table.get(call.layer, ()), *self._table.get(call.layer - call.num_layers, ())})
