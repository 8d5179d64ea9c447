"""SinkLoRA, Zhang, "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models" (2024, arXiv
2406.05678), and S2-Attn of LongLoRA (Chen et al. 2023, arXiv 2309.12307) on which it builds. Code read for numbers:
Dexter-GT-86/SinkLoRA @ a741094 (Apache-2.0).

What was released under that name is LongLoRA's S2-Attn: no sinks, no heads returned, and groups that wrap around the end of the
sequence, so the first half group of shifted heads sees the future. SF-Attn itself is only in the paper's text, which does not say how
many heads return nor how many sinks there are. Here: half of the shifted heads, four sinks, both fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..._checks import bad_value, require, require_fraction, require_int, require_name
from ...ops import masks
from ...ops.masks import Mask
from ...ops.shifted_groups import shifted_group_attention
from ..call import AttentionCall, Method
from .layers import require_causal, windowed


@dataclass
class SinkLoRA(Method):
    """Attention inside groups of tokens while the model TRAINS; full attention in eval mode.

    Half the heads see the groups as they are, the others moved by half a group, so that information crosses the borders; a
    quarter of the sequence as group costs a quarter of the attention. Train with it, by LoRA or in full, and use the model without it (or
    with `H2O`). A group of at least the context, or `sink` of at least the context, is full causal attention.

    Args:
        group_ratio: tokens a group, as a share of the sequence (as long as the batch is, padding included), in (0, 1].
        group: tokens a group, in place of the ratio: then no row depends on what it is batched with.
        sink: tokens at the start of each row that every later query sees, in every head (SF-Attn).
        share: of the shifted half of the heads, the share that is returned to the unshifted state (SF-Attn), in [0, 1].
        variant: "paper" (default): SF-Attn. Nothing sees the future. "released": S2-Attn as in the released code, which does:
            `sink` and `share` have no part in it, rows must not be padded, and their length must be a multiple of the group.

    Raises (in training): `ValueError` for "released" where the sequence is padded or does not divide into groups.
    """

    group_ratio: float = 0.25
    group: int | None = None
    sink: int = 4
    share: float = 0.5
    variant: str = "paper"
    _masks: dict[tuple[int, int], Mask] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_fraction("group_ratio", self.group_ratio)
        require(self.group_ratio > 0, "group_ratio", self.group_ratio, "a share of the sequence in (0, 1]")
        if self.group is not None:
            require_int("group", self.group, 1)
        require_int("sink", self.sink, 0)
        require_fraction("share", self.share)
        require_name("variant", self.variant, ("paper", "released"))

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)

    def applies(self, call: AttentionCall) -> bool:
        return super().applies(call) and call.module.training and not windowed(call)

    def group_of(self, length: int) -> int:
        """Tokens a group in a sequence of `length` tokens."""
        return max(1, int(length * self.group_ratio)) if self.group is None else self.group

    def mask(self, call: AttentionCall) -> Mask | None:
        if self.variant == "released":
            return None
        key = (call.num_heads, self.group_of(call.seen))
        if key not in self._masks:
            moved = 0.5 * (1.0 - self.share)
            self._masks[key] = masks.shifted_group(key[0], key[1], shift_heads=moved, sink=self.sink)
        mask = self._masks[key]
        if call.mask is None or not bool(call.start.any()):
            return mask
        return masks.shifted(mask, call.start)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if self.variant == "paper":
            return None
        length, group = call.q_len, self.group_of(call.q_len)
        if call.kv_len != length or length % group:
            need = f"a sequence without a past, of a multiple of the group, {group} tokens, with variant='released'"
            raise bad_value("input", f"{length} queries and {call.kv_len} keys", need)
        if call.mask is not None and (call.start.any() or not bool(call.mask[..., -1, :].all())):
            raise bad_value("input", "padded rows", "rows without padding with variant='released'")
        if call.soft_cap is not None:
            raise bad_value("model", "a soft cap on the scores", "none with variant='released'")
        return shifted_group_attention(
            call.q, call.k, call.v, group, shift="cyclic", scale=call.scale, dropout=call.dropout, backend=call.backend
        )
