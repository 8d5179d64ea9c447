"""Head and layer plans: which rule says, in each layer and head, what of the past is seen and what a cache has to keep.

A rule speaks of positions counted from a row's first real token. It comes as a mask (prefill, training), as a predicate on
positions (decoding), and as slots (where in a cache an entry lies). `HeadPlan` holds one rule a head, or one a layer, and is saved
as JSON. MoA, MASFormer, DuoAttention's head patterns and S2-Attention are such plans.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_int, require_tensor
from .._files import write_whole
from ..ops import masks
from ..ops.masks import Mask
from .slots import AllSlots, RingSlots, ShardedSlots, Slots

FORMAT = "regard.head_plan/1"


@dataclass(frozen=True)
class Rule:
    """What a head sees of the past. Subclasses are plain data; equal rules are interchangeable."""

    kind: ClassVar[str] = ""

    def at(self, length: int) -> Rule:
        """The rule with everything that depends on the length of the prompt settled."""
        return self

    def mask(self) -> Mask | None:
        """As a mask over absolute positions, causal mask not included; None = everything."""
        raise NotImplementedError

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions `query` see positions `key` (int64, broadcastable; key < 0: empty), causality included."""
        raise NotImplementedError

    def slots(self) -> Slots:
        """Where a cache keeps what some later query may see."""
        raise NotImplementedError

    def tokens(self, length: int) -> int:
        """Entries that a cache holds after `length` tokens."""
        return self.slots().held_tokens(length)

    def row_lengths(self, length: int) -> Tensor:
        """How many keys each query of a prefill of `length` tokens looks at, int64 (length,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Full(Rule):
    """Everything."""

    kind: ClassVar[str] = "full"

    def mask(self) -> Mask | None:
        return None

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return (key >= 0) & (key <= query)

    def slots(self) -> Slots:
        return AllSlots()

    def row_lengths(self, length: int) -> Tensor:
        return torch.arange(length) + 1


@dataclass(frozen=True)
class Window(Rule):
    """The first `sink` tokens and the last `window` ones, the query's own included.

    With `block` > 1 the mask of a prefill is made of blocks, as in MoA's kernel: the query's own block and the
    `window / block - 1` before it; decoding counts tokens either way.
    """

    kind: ClassVar[str] = "window"
    sink: int = 0
    window: int = 1
    block: int = 1

    def __post_init__(self) -> None:
        require_int("sink", self.sink, 0)
        require_int("window", self.window, 1)
        require_int("block", self.block, 1)
        require(self.window % self.block == 0, "window", self.window, f"a multiple of the block, {self.block}")

    def mask(self) -> Mask | None:
        recent = masks.sliding_window(self.window)
        if self.block > 1:
            recent = masks.block_local(self.block, self.window // self.block - 1)
        return recent | masks.sink(self.sink) if self.sink else recent

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return (key >= 0) & (key <= query) & ((key < self.sink) | (query - key < self.window))

    def slots(self) -> Slots:
        return RingSlots(self.sink, self.window)

    def row_lengths(self, length: int) -> Tensor:
        query = torch.arange(length)
        first = (query // self.block + 1) * self.block - self.window
        return query + 1 - (first - self.sink).clamp(min=0)


@dataclass(frozen=True)
class Span(Rule):
    """MoA's rule: a head keeps alpha + beta * N entries, N the length of the prompt and `reserve` tokens to come.

    The number is at most N, at least `minimum`, and rounded up to whole blocks; `sink` of them stand at the start. Settled when a
    prompt is read, and kept for what is generated after it.
    """

    kind: ClassVar[str] = "span"
    alpha: float = 0.0
    beta: float = 1.0
    sink: int = 64
    block: int = 64
    minimum: int = 128
    reserve: int = 1024
    exact: bool = False

    def __post_init__(self) -> None:
        require_int("sink", self.sink, 0)
        require_int("block", self.block, 1)
        require_int("reserve", self.reserve, 0)
        require_int("minimum", self.minimum, 1)
        whole = -(-self.minimum // self.block) * self.block
        require(self.sink < whole, "minimum", self.minimum, f"more than the sinks, {self.sink}, in whole blocks")
        if not self.exact:
            require(self.sink % self.block == 0, "sink", self.sink, f"a multiple of the block, {self.block}")

    def entries(self, length: int) -> int:
        """Entries that the cache has room for when the prompt has `length` tokens."""
        most = length + self.reserve
        wanted = min(int(self.alpha + most * self.beta), most)
        return -(-max(wanted, self.minimum) // self.block) * self.block

    def at(self, length: int) -> Window:
        return Window(self.sink, self.entries(length) - self.sink, 1 if self.exact else self.block)

    def mask(self) -> Mask | None:
        raise bad_value("rule", self, "a settled one: rule.at(length)")

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        raise bad_value("rule", self, "a settled one: rule.at(length)")

    def slots(self) -> Slots:
        raise bad_value("rule", self, "a settled one: rule.at(length)")

    def tokens(self, length: int) -> int:
        return self.at(length).tokens(length)

    def row_lengths(self, length: int) -> Tensor:
        return self.at(length).row_lengths(length)


@dataclass(frozen=True)
class BlockLocal(Rule):
    """The query's own block of `block` tokens and `left_blocks` before it."""

    kind: ClassVar[str] = "block_local"
    block: int = 1024
    left_blocks: int = 1

    def __post_init__(self) -> None:
        require_int("block", self.block, 1)
        require_int("left_blocks", self.left_blocks, 0)

    def mask(self) -> Mask | None:
        return masks.block_local(self.block, self.left_blocks)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        back = query // self.block - key // self.block
        return (key >= 0) & (key <= query) & (back <= self.left_blocks)

    def slots(self) -> Slots:
        return RingSlots(0, (self.left_blocks + 1) * self.block)

    def row_lengths(self, length: int) -> Tensor:
        query = torch.arange(length)
        return query + 1 - ((query // self.block - self.left_blocks) * self.block).clamp(min=0)


@dataclass(frozen=True)
class Sharded(Rule):
    """S2-Attention's rule: `local_blocks` of a band, and every block j with (j + phase) % stride == 0; `sink` tokens besides."""

    kind: ClassVar[str] = "sharded"
    block: int = 64
    local_blocks: int = 16
    stride: int = 8
    phase: int = 0
    sink: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "local_blocks", "stride"):
            require_int(name, getattr(self, name), 1)
        require_int("sink", self.sink, 0)
        require_int("phase", self.phase, -(1 << 62))

    def mask(self) -> Mask | None:
        kept = masks.head_sharded(
            1, self.block, self.local_blocks, self.stride, homogeneous=True, step=0, offset=self.phase
        )
        return kept | masks.sink(self.sink) if self.sink else kept

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        return self.visible_by(query, key, self.phase)

    def visible_by(self, query: Tensor, key: Tensor, phase: int | Tensor) -> Tensor:
        """`visible` with other phases than the rule's own, one a head."""
        column = key // self.block
        kept = (query // self.block - column < self.local_blocks) | ((column + phase) % self.stride == 0)
        return (key >= 0) & (key <= query) & (kept | (key < self.sink))

    def slots(self) -> Slots:
        return ShardedSlots(self.block, self.local_blocks, self.stride, (self.phase % self.stride,), self.sink)

    def row_lengths(self, length: int) -> Tensor:
        query = torch.arange(length)
        band = (query // self.block + 1 - self.local_blocks).clamp(min=0)  # the first block of the band
        columns = ((band + self.phase % self.stride + self.stride - 1) // self.stride) - (
            (self.phase % self.stride + self.stride - 1) // self.stride
        )
        strided = torch.arange(self.sink) // self.block + self.phase
        lone = torch.arange(self.sink)[strided % self.stride != 0]  # sinks that are no strided column
        beside = (lone < (band * self.block)[:, None]).sum(1) if len(lone) else torch.zeros_like(query)
        return query + 1 - band * self.block + columns * self.block + beside


KINDS: dict[str, type[Rule]] = {kind.kind: kind for kind in (Full, Window, Span, BlockLocal, Sharded)}


@dataclass(frozen=True)
class HeadPlan:
    """One rule for each layer and head.

    Attributes:
        layers: for each layer its rules: one (for all heads), one a kv head, or one a query head.
    """

    layers: tuple[tuple[Rule, ...], ...]

    def __post_init__(self) -> None:
        layers = tuple((layer,) if isinstance(layer, Rule) else tuple(layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        for number, rules in enumerate(layers):
            if not rules or not all(isinstance(rule, Rule) for rule in rules):
                raise bad_type(f"layers[{number}]", rules, "rules, at least one")

    def __len__(self) -> int:
        return len(self.layers)

    def rules(self, layer: int, num_heads: int, num_kv_heads: int) -> tuple[Rule, ...]:
        """The rules of a layer, one a query head. `ValueError` where their number fits neither kind of head."""
        rules = self.layers[layer]
        require(
            len(rules) in (1, num_kv_heads, num_heads),
            "plan",
            f"{len(rules)} rules in layer {layer}",
            f"1, {num_kv_heads} (one a kv head) or {num_heads} (one a query head)",
        )
        return tuple(rule for rule in rules for _ in range(num_heads // len(rules)))

    def check(self, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
        """Raise a `ValueError` unless the plan is made for such a model."""
        require(len(self) == num_layers, "plan", f"{len(self)} layers", f"{num_layers}, like the model")
        for layer in range(num_layers):
            self.rules(layer, num_heads, num_kv_heads)

    def tokens(self, length: int) -> list[float]:
        """Entries that a cache keeps per head after a prompt of `length` tokens, mean of each layer's rules."""
        return [sum(rule.tokens(length) for rule in rules) / len(rules) for rules in self.layers]

    def kv_share(self, length: int) -> float:
        """KV-cache entries after `length` tokens, of those of a dense cache, if each rule had its own cache."""
        return sum(self.tokens(length)) / (len(self) * length)

    def density(self, length: int) -> float:
        """Query-key pairs that a prefill of `length` tokens looks at, of those of causal attention: the share of its FLOPs."""
        dense = length * (length + 1) / 2
        pairs = {
            rule: float(rule.row_lengths(length).sum()) for rule in {rule for rules in self.layers for rule in rules}
        }
        return sum(sum(pairs[rule] for rule in rules) / len(rules) for rules in self.layers) / (dense * len(self))

    # Files

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        known = list(dict.fromkeys(rule for rules in self.layers for rule in rules))
        number = {rule: i for i, rule in enumerate(known)}
        content = {
            "format": FORMAT,
            "rules": [{"kind": rule.kind, **asdict(rule)} for rule in known],
            "layers": [[number[rule] for rule in rules] for rules in self.layers],
        }
        return write_whole(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadPlan:
        """Read what `save` wrote, or a plan published by MoA's authors (`alphas` and `betas`, one list a layer)."""
        try:
            content = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"path: {str(path)!r} is not JSON ({error})") from None
        if isinstance(content, dict) and {"alphas", "betas"} <= content.keys():
            return cls.from_spans(content["alphas"], content["betas"])
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            need = f"a plan: a JSON object with format {FORMAT!r}, or with alphas and betas"
            raise bad_value("path", str(path), need)
        try:
            known = [_rule(entry) for entry in content["rules"]]
            return cls(tuple(tuple(known[number] for number in rules) for rules in content["layers"]))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"path: {str(path)!r} is not a whole plan ({error!r})") from None

    @classmethod
    def from_spans(cls, alphas: Any, betas: Any, **options: Any) -> HeadPlan:
        """MoA's spans, alpha + beta * N, from two (layers, heads) tables; `options` are fields of `Span`."""
        alpha, beta = torch.as_tensor(alphas), torch.as_tensor(betas)
        require(alpha.dim() == 2, "alphas", f"shape {tuple(alpha.shape)}", "(layers, heads)")
        require(alpha.shape == beta.shape, "betas", f"shape {tuple(beta.shape)}", f"{tuple(alpha.shape)}, like alphas")
        tables = zip(alpha.double().tolist(), beta.double().tolist())
        return cls(tuple(tuple(Span(a, b, **options) for a, b in zip(row, slope)) for row, slope in tables))

    @classmethod
    def from_gates(cls, gates: Tensor, sparsity: float, *, sink: int = 64, recent: int = 256) -> HeadPlan:
        """DuoAttention's pattern: kv heads below the `sparsity` quantile of `gates` (layers, Hkv) see sinks and recent tokens only."""
        from .caches.duo_attention import streaming_heads

        require_tensor("gates", gates, dims=2, floating=True)
        short, long = Window(sink, recent), Full()
        return cls(tuple(tuple(short if s else long for s in row) for row in streaming_heads(gates, sparsity).tolist()))

    def spans(self) -> tuple[Tensor, Tensor]:
        """(alphas, betas), each (layers, heads) float64, of a plan made of `Span` rules, as MoA's authors store it."""
        rows: Sequence[Sequence[Any]] = self.layers
        if not all(isinstance(rule, Span) for rules in rows for rule in rules):
            raise bad_value("plan", "other rules", "`Span` rules alone")
        table = torch.tensor([[[rule.alpha, rule.beta] for rule in rules] for rules in rows], dtype=torch.float64)
        return table[..., 0], table[..., 1]


def union(rules: Sequence[Rule]) -> Rule:
    """The rule that keeps what any of these settled rules needs: query heads that share a kv head share its cache."""
    first = rules[0]
    if all(rule == first for rule in rules):
        return first
    if any(isinstance(rule, Full) for rule in rules):
        return Full()
    if all(isinstance(rule, Window) and rule.sink == first.sink for rule in rules):  # type: ignore[attr-defined]
        return max(rules, key=lambda rule: rule.window)  # type: ignore[attr-defined]
    raise bad_value("plan", list(rules), "rules of one kind (and equal sinks) for query heads that share a kv head")


def _rule(entry: dict[str, Any]) -> Rule:
    kind = KINDS.get(entry.get("kind", ""))
    if kind is None:
        raise bad_value("rules", entry.get("kind"), f"one of {sorted(KINDS)}")
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in entry.items() if name in known})
