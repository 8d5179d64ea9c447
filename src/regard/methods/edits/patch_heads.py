"""Head outputs taken from another run (activation patching), as a method: for generation, and for runs of one's own.

`regard.lens.total_effects` asks what each of many heads does; this one puts chosen heads into a model for good. The values come from
`regard.lens.head_outputs(model, other_prompt)`, or are any that one likes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import bad_type, bad_value, require
from ..call import AttentionCall, Method
from .zero_tuning import check_layers

__all__ = ["PatchHeads"]


@dataclass
class PatchHeads(Method):
    """Replace the outputs of chosen heads in the prompt by given values.

        other = regard.lens.head_outputs(model, corrupted_ids)                  # (L, B, H, T, Dv)
        with regard.attach(model, PatchHeads({(5, 3): other[5][:, 3]})):
            model(clean_ids)

    Args:
        values: (layer, head) -> (B, P, Dv), or (P, Dv) for all rows of the batch. Layers may be negative, from the end.
        positions: the P columns of the prompt that they are for, from its end where negative; None: the whole prompt, which then
            has P tokens.

    Only the prompt is treated; decoded tokens go on from what it left in the stream.
    """

    values: Mapping[tuple[int, int], Tensor]
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise bad_type("values", self.values, "a mapping (layer, head) -> tensor")
        self._table: dict[int, list[int]] = {}
        for pair, value in self.values.items():
            fits = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
            require(fits, "values", pair, "(layer, head) pairs")
            if not isinstance(value, Tensor) or value.dim() not in (2, 3):
                raise bad_value("values", getattr(value, "shape", value), "tensors (B, P, Dv) or (P, Dv)")
            if self.positions is not None:
                count = len(self.positions)
                require(value.shape[-2] == count, "values", f"{value.shape[-2]} places", f"{count}, one a position")
            self._table.setdefault(pair[0], []).append(pair[1])

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        wanted = [
            (layer, head) for layer in {call.layer, call.layer - call.num_layers} for head in self._table.get(layer, ())
        ]
        if not wanted or call.phase == "decode":
            return
        positions = range(call.q_len) if self.positions is None else self.positions
        inside = all(-call.q_len <= position < call.q_len for position in positions)
        require(inside, "positions", list(positions), f"columns of a prompt of {call.q_len} tokens")
        at = torch.tensor([position % call.q_len for position in positions], device=call.q.device)
        for layer, head in wanted:
            require(0 <= head < call.num_heads, "values", (layer, head), f"heads in [0, {call.num_heads})")
            value = self.values[layer, head]
            fits = value.shape[-2:] == (len(at), call.v.shape[-1]) and (value.dim() == 2 or len(value) == call.batch)
            need = f"({call.batch}, {len(at)}, {call.v.shape[-1]}), or without the batch"
            require(fits, "values", f"shape {tuple(value.shape)} for {(layer, head)}", need)

        def put(out: Tensor) -> Tensor:
            out = out.clone()
            for pair in wanted:
                value = self.values[pair].to(out)
                out[:, pair[1]].index_copy_(1, at, value.expand(len(out), *value.shape[-2:]))
            return out

        call.on_output(put)
