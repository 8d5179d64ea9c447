"""The methods that `regard bench cab` sets side by side: CAB's nine, vanilla attention, and no attention at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require, require_name
from ...nn import (
    S4D,
    BoundedMemoryAttention,
    CausalLongShortAttention,
    CosformerAttention,
    LinearRandomizedAttention,
    LocalAttention,
    LongShortAttention,
    NystromAttention,
    PatternAttention,
    PerformerAttention,
    ProbSparseAttention,
    VanillaAttention,
)
from ...nn.sequence.long_short_attention import default_chunks
from ...nn.sequence.pattern_attention import PATTERNS, pattern_name

__all__ = ["METHODS", "Method", "NoAttention", "register"]

_LANDMARKS, _WINDOW, _STATE = 16, 15, 16  # CAB's settings


class NoAttention(PatternAttention):
    """Zeros in place of attention: what the layer below it and the MLPs do alone ("benefit of attention" in CAB)."""

    def __init__(self, dim: int, num_heads: int, causal: bool = False, cross: bool = False) -> None:
        super().__init__(dim, num_heads, causal, cross)
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, context: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        self.check(x, context, keys)
        return torch.zeros_like(x) * self.nothing


Builder = Callable[[int, int, bool, bool, int], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way to attend.

    build: (dim, num_heads, causal, cross, length) -> layer, called as `layer(x, context=None)`. length: of the longest sequence it
    will meet. patterns: those it can do.
    """

    build: Builder
    patterns: frozenset[str]

    def layer(self, dim: int, num_heads: int, causal: bool, cross: bool, length: int) -> nn.Module:
        wanted = pattern_name(causal, cross)
        require(
            wanted in self.patterns, "causal, cross", (causal, cross), f"one of {sorted(self.patterns)}, not {wanted}"
        )
        return self.build(dim, num_heads, causal, cross, length)


def _plain(layer: type[PatternAttention], **options: object) -> Method:
    def build(dim: int, num_heads: int, causal: bool, cross: bool, length: int) -> nn.Module:
        return layer(dim, num_heads, causal, cross, **options)

    return Method(build, layer.patterns)


def _long_short(dim: int, num_heads: int, causal: bool, cross: bool, length: int) -> nn.Module:
    if not causal:
        return LongShortAttention(dim, num_heads, landmarks=_LANDMARKS, window=_WINDOW)
    chunk, memory = default_chunks(length)
    return CausalLongShortAttention(dim, num_heads, chunk=chunk, window=min(_WINDOW, memory), memory=memory)


METHODS: dict[str, Method] = {
    "vanilla": _plain(VanillaAttention),
    "local": _plain(LocalAttention, window=_WINDOW),
    "abc": _plain(BoundedMemoryAttention, landmarks=_LANDMARKS),
    "nystrom": _plain(NystromAttention, landmarks=_LANDMARKS),
    "performer": _plain(PerformerAttention, features=_LANDMARKS),
    "lara": _plain(LinearRandomizedAttention, landmarks=_LANDMARKS),
    "cosformer": _plain(CosformerAttention),
    "probsparse": _plain(ProbSparseAttention),
    "s4d": _plain(S4D, d_state=_STATE),
    "longshort": Method(_long_short, LongShortAttention.patterns | CausalLongShortAttention.patterns),
    "none": _plain(NoAttention),
}
"""Name -> method. Vanilla is the yardstick and "none" the floor; the other nine are CAB's."""


def register(name: str, build: Builder, patterns: Iterable[str] = PATTERNS) -> Method:
    """Add a method of your own under a name that is not taken: it then takes part in `run_tasks` and `regard bench cab`.

    build: (dim, num_heads, causal, cross, length) -> a layer called as `layer(x, context=None)`, e.g.
    `lambda d, h, causal, cross, n: regard.nn.OpAttention(d, h, causal, cross, op=...)`. patterns: what it can do.
    """
    require(name not in METHODS, "name", name, "a name that is not taken yet")
    if not callable(build):
        raise bad_type("build", build, "a callable (dim, num_heads, causal, cross, length) -> layer")
    known = frozenset(require_name("patterns", pattern, PATTERNS) for pattern in patterns)
    METHODS[name] = Method(build, known)
    return METHODS[name]
