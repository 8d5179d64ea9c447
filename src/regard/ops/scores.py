"""Score mods: how a score is bent before the softmax. `score_mod(score, b, h, q_idx, kv_idx) -> score`, FlexAttention's signature.

Compose with `>>`: `temperature(1.2) >> soft_cap(50.0)` applies the temperature first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, require, require_int, require_tensor

__all__ = [
    "ScoreMod",
    "alibi",
    "alibi_slopes",
    "from_function",
    "harmonic_alibi",
    "relative_bias",
    "soft_cap",
    "temperature",
]


class ScoreMod:
    """A function of (score, b, h, q_idx, kv_idx); index tensors broadcast against the score."""

    def __init__(self, function: Callable[..., Tensor], name: str, tensors: tuple[Tensor, ...] = ()) -> None:
        self.function, self.name, self.tensors = function, name, tensors

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.function(score, b, h, q_idx, kv_idx)

    def __rshift__(self, other: Any) -> ScoreMod:
        after = other if isinstance(other, ScoreMod) else from_function(other)
        first = self

        def both(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return after.function(first.function(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)

        return ScoreMod(both, f"{self.name} >> {after.name}", self.tensors + after.tensors)

    @property
    def requires_grad(self) -> bool:
        """Whether the mod reads tensors that are being trained."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def __repr__(self) -> str:
        return self.name


def from_function(function: Callable[..., Tensor], *tensors: Tensor) -> ScoreMod:
    """Any `score_mod` callable; name the `tensors` it reads so that gradients to them are noticed."""
    if not callable(function):
        raise bad_type("score_mod", function, "a callable (score, b, h, q_idx, kv_idx) -> score")
    return ScoreMod(function, getattr(function, "__name__", "score_mod"), tensors)


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes, (num_heads,): 2^(-8 i / n) for n a power of two; otherwise those of the power of two below, then every other
    one of the next power of two (Press et al. 2021, arXiv 2108.12409)."""
    require_int("num_heads", num_heads, 1)
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-8.0 * (2 * i + 1) / (2 * below)) for i in range(num_heads - below)]
    return torch.tensor(slopes, device=device)


def alibi(slopes: int | Tensor) -> ScoreMod:
    """`score - slope_h * |q - kv|`. Give the number of heads for the standard slopes, or (H,) slopes."""
    values = (
        alibi_slopes(slopes) if isinstance(slopes, int) else require_tensor("slopes", slopes, dims=1, floating=True)
    )

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - values.to(device=score.device, dtype=score.dtype)[h] * (q_idx - kv_idx).abs()

    return ScoreMod(mod, f"alibi({values.numel()} heads)", (values,))


def harmonic_alibi(slopes: int | Tensor) -> ScoreMod:
    """`score - slope_h * (1 + 1/2 + ... + 1/|q - kv|)`: ALiBi with harmonic steps, for use beside rotary positions.

    Give the number of heads for ALiBi's slopes, or (H,) slopes. The sum grows like ln(distance) + 0.577, so far keys stay in reach.
    Source: arXiv 2410.18441, which names the combination; its form here is our choice.
    """
    values = (
        alibi_slopes(slopes) if isinstance(slopes, int) else require_tensor("slopes", slopes, dims=1, floating=True)
    )

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (q_idx - kv_idx).abs().to(torch.promote_types(score.dtype, torch.float32))
        harmonic = torch.digamma(distance + 1) + 0.57721566490153286061
        return score - values.to(device=score.device, dtype=score.dtype)[h] * harmonic.to(score.dtype)

    return ScoreMod(mod, f"harmonic_alibi({values.numel()} heads)", (values,))


def soft_cap(cap: float) -> ScoreMod:
    """`cap * tanh(score / cap)`: scores stay within (-cap, cap) (Gemma 2)."""
    require(isinstance(cap, (int, float)) and cap > 0, "cap", cap, "a number > 0")
    return ScoreMod(lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap), f"soft_cap({cap})")


def temperature(value: float | Tensor) -> ScoreMod:
    """`score / value`: above 1 flattens, below 1 sharpens. A number > 0, or (H,) one a head."""
    if isinstance(value, Tensor):
        require_tensor("value", value, dims=1, floating=True)

        def by_head(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score / value.to(device=score.device, dtype=score.dtype)[h]

        return ScoreMod(by_head, f"temperature({value.numel()} heads)", (value,))
    require(isinstance(value, (int, float)) and value > 0, "value", value, "a number > 0")
    return ScoreMod(lambda score, b, h, q_idx, kv_idx: score / value, f"temperature({value})")


def relative_bias(table: Tensor) -> ScoreMod:
    """`score + table[h, kv - q + R]`, a learned bias by relative position. `table` (H, 2 R + 1); distances beyond R use the ends."""
    require_tensor("table", table, dims=2, floating=True)
    require(table.shape[1] % 2 == 1, "table", f"shape {tuple(table.shape)}", "(H, 2 R + 1), an odd number of distances")
    reach = table.shape[1] // 2

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (kv_idx - q_idx).clamp(-reach, reach) + reach
        return score + table.to(device=score.device, dtype=score.dtype)[h, distance]

    return ScoreMod(mod, f"relative_bias({tuple(table.shape)})", (table,))
