"""Eviction by score: the frame in which H2O, SnapKV and their kin are small classes.

Every entry of the cache carries a score; what a call reads updates the scores; when a sequence (a row of the batch and a kv head) is
over its budget, the lowest scores leave, for good and from memory. The first tokens and the last ones can be protected. A policy says
two things: how many tokens may stay (`limits`), and how scores follow from attention (`rescore`):

    @dataclass
    class TOVA(EvictingMethod):
        budget: int | float = 0.25

        def limits(self, tokens):
            return Limits.of(self.budget, tokens)

        def rescore(self, look, old):
            return look.attention(last=1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, resolve_budget
from ..call import AttentionCall, Method, UnsupportedModelError
from .decoder import find_rotary, ragged_layers
from .layer import AttendingLayer

if TYPE_CHECKING:
    from .evicting import EvictingLayer


@dataclass
class Limits:
    """Tokens that may stay, by row of the batch, int64 (B,) on the CPU: in all, and of these the most recent; and the first `sink`."""

    total: Tensor
    recent: Tensor
    sink: int = 0

    @classmethod
    def of(cls, budget: int | float, tokens: Tensor, recent: int | float = 0, sink: int = 0) -> Limits:
        """`budget` and `recent` as tokens or as fractions of each row's own number of `tokens`."""
        numbers = tokens.tolist()
        total = [max(1, resolve_budget("budget", budget, n)) for n in numbers]
        last = [recent if isinstance(recent, int) else int(recent * n) for n in numbers]
        return cls(torch.tensor(total), torch.tensor(last), sink)

    def rows(self, old: list[int]) -> Limits:
        at = torch.tensor(old)
        return Limits(self.total[at], self.recent[at], self.sink)


@dataclass
class Look:
    """What a policy may ask about the queries of one call and the entries of some sequences.

    Attributes:
        keys: (..., L, D), as stored; (...) is (B, Hkv) or sequences (G,). position: (..., L), absolute. q_len: queries of the call.
        sums: `sums(last, group)` -> (..., L): attention summed over the last queries (None = all), reduced over the query heads.
    """

    keys: Tensor
    position: Tensor
    q_len: int
    sums: Callable[[int | None, str], Tensor]

    def attention(self, last: int | None = None, group: str = "sum") -> Tensor:
        """The attention that each entry receives, (..., L) float32: softmax rows added up over the queries, or over the `last`."""
        return self.sums(last, group)


@dataclass
class EvictingMethod(Method):
    """Base of methods that evict by score. Class attribute `reads`: whether `rescore` asks for attention."""

    reads: ClassVar[bool] = True

    def limits(self, tokens: Tensor) -> Limits:
        """How many tokens may stay, given each row's number of `tokens` (without padding), int64 (B,) on the CPU."""
        raise TypeError(f"{type(self).__name__} does not define limits()")

    def rescore(self, look: Look, old: Tensor) -> Tensor:
        """New scores (..., L) of entries whose scores were `old` (0 for new ones); the highest stay."""
        raise TypeError(f"{type(self).__name__} does not define rescore()")

    def check(self, model: nn.Module) -> None:
        self.cache(model)  # says why, where it cannot

    def cache(self, model: nn.Module) -> Any:
        rotary = None
        if getattr(self, "positions", "kept") == "cache":
            rotary = require_rotary(model, type(self).__name__)
        return ragged_layers(model, lambda _: self.make_layer(rotary), type(self).__name__)

    def make_layer(self, rotary: Any) -> EvictingLayer:
        """The cache layer for one layer of the model; `rotary` as from `find_rotary`, or None for positions kept."""
        from .evicting import EvictingLayer

        return EvictingLayer(self, rotary)

    def attend(self, call: AttentionCall) -> Tensor | None:
        return call.cache.attend(call) if isinstance(call.cache, AttendingLayer) else None


def require_rotary(model: nn.Module, method: str) -> Any:
    rotary = find_rotary(model)
    if rotary is None:
        raise UnsupportedModelError(
            f"{method}(positions='cache') needs rotary embeddings of constant frequencies, and {type(model).__name__} has none that "
            "could be found; use positions='kept'"
        )
    return rotary


def check_budget(budget: Any, sink: int = 0, recent: Any = 0) -> None:
    """Errors for a budget, sinks and recent tokens (tokens, or a fraction) that cannot be met."""
    resolve_budget("budget", budget, 1 << 20)
    require_int("sink", sink, 0)
    if isinstance(recent, bool) or not isinstance(recent, (int, float)):
        raise bad_type("recent", recent, "tokens (int >= 0) or a fraction (float in [0, 1])")
    whole = isinstance(recent, int)
    require(recent >= 0 and (whole or recent <= 1.0), "recent", recent, "tokens (int >= 0) or a fraction in [0, 1]")
    if isinstance(budget, int):
        held = sink + (recent if whole else 0)
        require(budget >= max(1, held), "budget", budget, f"at least sink + recent = {held} tokens")
    elif not whole:
        require(budget >= recent, "budget", budget, f"at least recent = {recent}")
