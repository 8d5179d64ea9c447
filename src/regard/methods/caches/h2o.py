"""H2O: heavy hitters and recent tokens stay, the rest is evicted as decoding goes on.

Zhang et al. 2023 (NeurIPS), arXiv 2306.14048; here for SinkLoRA (arXiv 2406.05678), which uses it at inference. Numbers from the
`H2OKVCache_LayerWise` class that SUSTechBruce/LOOK-M (MIT) carries. Differences: that code is for batch 1 and one kv head a query
head; here the sums of a group's query heads are added, rows of a batch have scores and, for fractions, budgets of their own, and
the prompt's N x N weights are never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..._checks import bad_type, require, require_int, require_name
from .policy import EvictingMethod, Limits, Look, check_budget


@dataclass
class H2O(EvictingMethod):
    """Each kv head keeps the tokens that received the most attention so far (heavy hitters) and the most recent ones.

    Attributes:
        budget: tokens (int) or a fraction of the prompt (float in (0, 1]), split evenly into heavy hitters and recent tokens.
        heavy, recent: the two parts by themselves, each tokens or a fraction (rounded down); both or neither. They replace `budget`.
        sink: first tokens that are never evicted (0, as published).
        group: how the sums of the query heads of one kv head are joined: "sum", "mean" or "max".
        positions: "kept": entries keep the rotary phase they were made with; "cache": they are seen at the positions that they have in
            the cache, which is for contexts past the model's (needs rotary embeddings).

    The prompt itself is attended densely; then each kv head keeps its own tokens. A fraction is of each row's own prompt (padding does
    not count) and stays that number of tokens while decoding. `ValueError` for parts that do not fit the budget.
    """

    budget: int | float = 0.2
    heavy: int | float | None = None
    recent: int | float | None = None
    sink: int = 0
    group: str = "sum"
    positions: str = "kept"

    def __post_init__(self) -> None:
        require_name("group", self.group, ("sum", "mean", "max"))
        require_name("positions", self.positions, ("kept", "cache"))
        require_int("sink", self.sink, 0)
        if self.heavy is None and self.recent is None:
            check_budget(self.budget, self.sink)
            return
        for name in ("heavy", "recent"):
            check_part(name, getattr(self, name))
        if isinstance(self.heavy, int) and isinstance(self.recent, int):
            check_budget(self.heavy + self.recent, self.sink, self.recent)

    def limits(self, tokens: Tensor) -> Limits:
        if self.heavy is None or self.recent is None:
            whole = Limits.of(self.budget, tokens, sink=self.sink)
            return Limits(whole.total, whole.total // 2, self.sink)
        heavy, recent = part_tokens(self.heavy, tokens), part_tokens(self.recent, tokens)
        return Limits((heavy + recent).clamp(min=1), recent, self.sink)

    def rescore(self, look: Look, old: Tensor) -> Tensor:
        return old + look.attention(group=self.group)


def check_part(name: str, value: object) -> None:
    """A part of a budget: tokens (int >= 0) or a fraction (float in [0, 1])."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(name, value, "tokens (int) or a fraction (float); heavy and recent go together")
    require(
        value >= 0 and (isinstance(value, int) or value <= 1.0),
        name,
        value,
        "tokens (int >= 0) or a fraction in [0, 1]",
    )


def part_tokens(value: int | float, tokens: Tensor) -> Tensor:
    """Tokens meant by a part, for each row: as they are, or the fraction of its tokens rounded down."""
    return tokens.clone().fill_(value) if isinstance(value, int) else (tokens.double() * value).floor().long()
