"""MoA, Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (2024, arXiv 2406.14909).
Code read for numbers: thu-nics/MoA @ e224fe3 (MIT).

Every head has a span of its own that grows with the length of the prompt in its own way, alpha + beta * N. Plans come from
`regard.lens.span_plan(regard.lens.attention_influence(model, batches))`, or from the authors' `moa_alpha_beta.json`.

Differs from the authors' code: models with grouped queries keep their kv heads (theirs are converted to full heads
first), and a kv head's cache is that of its widest query head; spans follow each row's own length, where theirs
follow the padded one, so that a row comes out the same whatever it is batched with; padding is not counted either
where a row is shorter than the sinks; further turns of a conversation see what the cache holds (theirs ignore it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..._checks import bad_type, bad_value, require, require_int, require_name
from ..plans import HeadPlan, Rule, Span
from .planned import PlannedMethod


@dataclass
class MoA(PlannedMethod):
    """Heads with elastic spans: the first `sink` tokens and the last alpha + beta * N - `sink`, N = prompt + `new_tokens`.

    The cache of a head has that many entries (whole blocks, at least two blocks, at most N), fixed when the prompt is read: sinks
    stand, the rest is a ring. Keys keep their positions. The paper's densities are 0.5 and less.

    Args:
        plan: a `HeadPlan` of `Span` rules (one a query or kv head), the path of one, or of a `moa_alpha_beta.json`. None: every head
            has the span `budget` * N, the uniform baseline of the authors' own comparison.
        budget: share of N that every head keeps, without a plan: a float in (0, 1], or tokens.
        new_tokens: tokens to be generated that spans are made for.
        sink, block: tokens at the start, tokens a block; None: those of the plan's rules (64 and 64).
        variant: "released": in a prompt a query sees whole blocks, its own and those before it, as the authors' kernel does.
            "paper": it sees tokens, as in decoding, so that a prompt read at once and token by token come to the same.

    Raises (from `attach`): `ValueError` for a plan of other layers or heads; `UnsupportedModelError` for models without causal
    self-attention or a decoder cache.
    """

    plan: HeadPlan | str | Path | None = None
    budget: float | int = 0.5
    new_tokens: int = 1024
    sink: int | None = None
    block: int | None = None
    variant: str = "released"

    def __post_init__(self) -> None:
        require_int("new_tokens", self.new_tokens, 0)
        require_name("variant", self.variant, ("released", "paper"))
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)):
            raise bad_type("budget", self.budget, "a float in (0, 1] or tokens (int)")
        if isinstance(self.budget, float):
            require(0.0 < self.budget <= 1.0, "budget", self.budget, "a float in (0, 1] or tokens (int)")
        else:
            require_int("budget", self.budget, 1)
        if isinstance(self.plan, (str, Path)):
            self.plan = HeadPlan.load(self.plan)
        if self.plan is not None and not isinstance(self.plan, HeadPlan):
            raise bad_type("plan", self.plan, "a HeadPlan, or the path of one")
        self._uniform = self._fitted(self._even())
        if self.plan is not None:
            if not all(isinstance(rule, Span) for rules in self.plan.layers for rule in rules):
                raise bad_value("plan", "rules of other kinds", "`Span` rules alone (PlannedAttention takes any)")
            self.plan = HeadPlan(
                tuple(tuple(self._fitted(rule) for rule in rules) for rules in self.plan.layers)  # type: ignore[arg-type]
            )

    def _even(self) -> Span:
        block = 64 if self.block is None else require_int("block", self.block, 1)
        share = isinstance(self.budget, float)
        alpha, beta = (0.0, float(self.budget)) if share else (float(self.budget), 0.0)
        return Span(alpha, beta, sink=block, block=block, minimum=2 * block)

    def _fitted(self, rule: Span) -> Span:
        """The rule with this method's own sinks, blocks and reserve."""
        block = rule.block if self.block is None else require_int("block", self.block, 1)
        sink = (rule.sink if self.block is None else block) if self.sink is None else require_int("sink", self.sink, 0)
        minimum = rule.minimum if self.block is None else max(2 * block, sink + block)
        exact = self.variant == "paper"
        return replace(rule, block=block, sink=sink, minimum=minimum, reserve=self.new_tokens, exact=exact)

    def rules_of(self, layer: int, num_layers: int, num_heads: int, num_kv_heads: int) -> Sequence[Rule]:
        if self.plan is None:
            return (self._uniform,) * num_heads
        assert isinstance(self.plan, HeadPlan)
        if len(self.plan) != num_layers:
            self.plan.check(num_layers, num_heads, num_kv_heads)
        return self.plan.rules(layer, num_heads, num_kv_heads)
