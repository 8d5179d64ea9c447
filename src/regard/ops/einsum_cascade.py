"""Cascades of Einsums: a small language for algorithms on tensors, and how often each must pass over a rank.

FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design (Nayak et al., 2024, arXiv 2406.10491). Code read for numbers:
FPSG-UIUC/micro24-fusemax-artifact at f543beb (MIT). The artifact holds hand-made mappings for Timeloop; the language, the automatic
count of passes and the executor (`cascade_run.py`) are ours, after the paper's definitions.

    split m: m1, m0                                  the key rank in tiles: m1 counts tiles, m0 runs inside one
    QK[m1, m0, p] += Q[e, p] * K[e, m1, m0]          += sums, max= takes the maximum over ranks that the left side lacks
    RM[0, p] = -inf                                  the start of a running value
    RM[m1 + 1, p] = max(RM[m1, p], LM[m1, p])        its step from one tile to the next
    AV[f, p] = RNV[f, M1, p] / RD[M1, p]             a rank's name in capitals: after the last tile

Expressions have + - * /, exp(x), max(x, y), numbers and inf. Tensors that are never defined are inputs.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .._checks import require, require_name

__all__ = [
    "Cascade",
    "Einsum",
    "Index",
    "Number",
    "Operation",
    "Ref",
    "Stage",
    "count_passes",
    "parse_cascade",
    "schedule",
]


@dataclass(frozen=True)
class Index:
    """One index of a tensor: the coordinate of `rank` plus `shift`; with `at` "start" or "end" a fixed place along it."""

    rank: str
    shift: int = 0
    at: str | None = None


@dataclass(frozen=True)
class Ref:
    """A tensor with its indices."""

    name: str
    indices: tuple[Index, ...]

    @property
    def ranks(self) -> tuple[str, ...]:
        """Ranks that the indices run over."""
        return tuple(index.rank for index in self.indices if index.at is None)


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Operation:
    """`kind`: add, sub, mul, div, exp, max or neg."""

    kind: str
    arguments: tuple[Expression, ...]


Expression = Ref | Number | Operation


@dataclass(frozen=True)
class Einsum:
    """One statement. `reduce`: how ranks that the output lacks are combined, "sum" or "max"; None: there are none."""

    output: Ref
    reduce: str | None
    expression: Expression
    text: str

    @property
    def name(self) -> str:
        return self.output.name

    @cached_property
    def inputs(self) -> tuple[Ref, ...]:
        return tuple(part for part in _walk(self.expression) if isinstance(part, Ref))

    @cached_property
    def ranks(self) -> tuple[str, ...]:
        """The iteration space: every rank that runs on either side, output ranks first."""
        return tuple(dict.fromkeys([*self.output.ranks, *(rank for ref in self.inputs for rank in ref.ranks)]))

    @property
    def reduced(self) -> tuple[str, ...]:
        return tuple(rank for rank in self.ranks if rank not in self.output.ranks)

    @cached_property
    def operations(self) -> Counter[str]:
        """Operations for each point of the iteration space. A sum of products is a multiply-accumulate (mac), not two."""
        found = Counter(part.kind for part in _walk(self.expression) if isinstance(part, Operation))
        if self.reduce == "sum":
            product = isinstance(self.expression, Operation) and self.expression.kind == "mul"
            found["mac" if product else "add"] += 1
            found["mul"] -= int(product)
        elif self.reduce == "max":
            found["max"] += 1
        return +found


@dataclass(frozen=True)
class Cascade:
    """Einsums in order. `splits`: rank -> (tiles, inside a tile). `name`, `source`: for tables."""

    einsums: tuple[Einsum, ...]
    splits: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    name: str = "cascade"
    source: str = ""

    @cached_property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """Tensors that are given, with their ranks."""
        made = {einsum.name for einsum in self.einsums}
        return {ref.name: ref.ranks for einsum in self.einsums for ref in einsum.inputs if ref.name not in made}

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Tensors that nothing else reads."""
        read = {ref.name for einsum in self.einsums for ref in einsum.inputs}
        return tuple(dict.fromkeys(einsum.name for einsum in self.einsums if einsum.name not in read))

    def family(self, rank: str) -> tuple[str, ...]:
        """The names that `rank` goes by: itself, or the two it is split into."""
        return self.splits.get(rank, (rank,))


def parse_cascade(text: str, name: str = "cascade", source: str = "") -> Cascade:
    """A `Cascade` from its text, one statement a line (`#` begins a comment). Errors name the line and what is wrong with it."""
    splits: dict[str, tuple[str, str]] = {}
    einsums: list[Einsum] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        try:
            split = re.fullmatch(r"split\s+(\w+)\s*:\s*(\w+)\s*,\s*(\w+)", line)
            if split:
                splits[split[1]] = (split[2], split[3])
            else:
                einsums.append(_statement(line, {parts[0] for parts in splits.values()}))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"text: line {number} ({line!r}): {error}") from None
    require(bool(einsums), "text", text, "at least one Einsum")
    cascade = Cascade(tuple(einsums), splits, name, source)
    _check(cascade)
    return cascade


def _statement(line: str, tile_ranks: set[str]) -> Einsum:
    found = re.fullmatch(r"(\w+\s*\[[^\]]*\])\s*(\+=|max=|=)\s*(.+)", line)
    if found is None:
        raise ValueError("need NAME[ranks] = expression, with =, += or max=")
    left, operator, right = found.groups()
    output = _expression(ast.parse(left, mode="eval").body, tile_ranks)
    assert isinstance(output, Ref)
    expression = _expression(ast.parse(right, mode="eval").body, tile_ranks)
    einsum = Einsum(output, {"=": None, "+=": "sum", "max=": "max"}[operator], expression, line)
    if einsum.reduce is None and einsum.reduced:
        raise ValueError(f"{', '.join(einsum.reduced)} stands on the right only: say how to reduce it, += or max=")
    if einsum.reduce is not None and not einsum.reduced:
        raise ValueError(f"{operator} has nothing to reduce: every rank stands on the left too")
    return einsum


_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_CALLS = {"exp": 1, "max": 2}


def _expression(node: ast.expr, tile_ranks: set[str]) -> Expression:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return Operation(
            _BINARY[type(node.op)], (_expression(node.left, tile_ranks), _expression(node.right, tile_ranks))
        )
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _expression(node.operand, tile_ranks)
        return Number(-inner.value) if isinstance(inner, Number) else Operation("neg", (inner,))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        wanted = _CALLS.get(node.func.id)
        if wanted is None or wanted != len(node.args):
            raise ValueError(f"{ast.unparse(node)}: need exp(x) or max(x, y)")
        return Operation(node.func.id, tuple(_expression(argument, tile_ranks) for argument in node.args))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return Ref(node.value.id, tuple(_index(part, tile_ranks) for part in inside))
    if isinstance(node, ast.Name) and node.id == "inf":
        return Number(float("inf"))
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Number(float(node.value))
    raise ValueError(f"{ast.unparse(node)}: need tensors with their indices, numbers, + - * /, exp and max")


def _index(node: ast.expr, tile_ranks: set[str]) -> Index:
    if isinstance(node, ast.Name):
        lower = node.id.lower()
        if node.id != lower:
            require(
                lower in tile_ranks,
                "index",
                node.id,
                f"the capital form of a rank of tiles, one of {sorted(tile_ranks)}",
            )
            return Index(lower, at="end")
        return Index(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and isinstance(node.left, ast.Name):
        one = isinstance(node.right, ast.Constant) and node.right.value == 1
        require(one and node.left.id in tile_ranks, "index", ast.unparse(node), "rank + 1, of a rank of tiles")
        return Index(node.left.id, shift=1)
    if isinstance(node, ast.Constant) and node.value == 0:
        require(len(tile_ranks) == 1, "index", 0, "exactly one rank of tiles that it can be the start of")
        return Index(next(iter(tile_ranks)), at="start")
    raise ValueError(f"index {ast.unparse(node)}: need a rank, a rank of tiles + 1, 0, or a rank of tiles in capitals")


def _walk(expression: Expression) -> Iterator[Expression]:
    yield expression
    if isinstance(expression, Operation):
        for argument in expression.arguments:
            yield from _walk(argument)


def _check(cascade: Cascade) -> None:
    made = {einsum.name for einsum in cascade.einsums}
    seen: dict[str, tuple[str, ...]] = {}
    for einsum in cascade.einsums:
        for ref in (*einsum.inputs, einsum.output):
            ranks = tuple(index.rank for index in ref.indices)
            known = seen.get(ref.name)
            if known is None and ref.name in made and ref is not einsum.output:
                raise ValueError(f"text: {einsum.text!r} reads {ref.name} before anything defines it")
            if known is not None and known != ranks:
                raise ValueError(
                    f"text: {einsum.text!r} has {ref.name}[{', '.join(ranks)}], before it was [{', '.join(known)}]"
                )
            seen[ref.name] = ranks
    whole = [rank for rank in cascade.splits if any(rank in einsum.ranks for einsum in cascade.einsums)]
    require(not whole, "text", whole, "a rank that is split by its parts only")


@dataclass(frozen=True)
class Stage:
    """When an Einsum can run, counted in passes over a rank.

    Attributes:
        grain: "inside" when it runs over the rank's elements, "tiles" when over its tiles only, "outside" when over neither.
        ready: the pass during which its results for the tile at hand are there. complete: passes after which all of them are.
    """

    grain: str
    ready: int
    complete: int

    @property
    def streams(self) -> bool:
        """Whether it runs tile by tile within pass `ready`; else after pass `complete`."""
        return self.grain == "inside" or (self.grain == "tiles" and self.ready == self.complete)


def schedule(cascade: Cascade, rank: str) -> list[Stage]:
    """The earliest stage of every Einsum. What is reduced over `rank` can be read only after a whole pass; what keeps the rank (or its
    tiles) can be read in the pass that makes it."""
    outer, inner = cascade.family(rank)[0], cascade.family(rank)[-1]
    require_name("rank", inner, {name for einsum in cascade.einsums for name in einsum.ranks})
    ready: dict[str, int] = dict.fromkeys(cascade.inputs, 0)
    complete: dict[str, int] = dict.fromkeys(cascade.inputs, 0)
    stages: list[Stage] = []
    for _ in range(len(cascade.einsums) + 2):
        before, stages = stages, []
        for einsum in cascade.einsums:
            grain = "inside" if inner in einsum.ranks else "tiles" if outer in einsum.ranks else "outside"
            needs, ends = [], []
            for ref in einsum.inputs:
                if grain != "outside" and outer in ref.ranks:
                    needs.append(ready.get(ref.name, 0))
                elif ref.name not in cascade.inputs:
                    needs.append(complete.get(ref.name, 0) + 1)
                ends.append(complete.get(ref.name, 0))
            last = max(ends, default=0)
            if grain == "inside":
                now = max(1, *needs, 1)
                stage = Stage(grain, now, now)
            elif grain == "tiles":
                stage = Stage(grain, max(needs, default=0), last)
            else:
                stage = Stage(grain, last, last)
            stages.append(stage)
            ready[einsum.name] = max(ready.get(einsum.name, 0), stage.ready)
            complete[einsum.name] = max(complete.get(einsum.name, 0), stage.complete)
        if stages == before:
            return stages
    raise ValueError(
        f"cascade: {cascade.name} has a running value that needs a whole pass over {rank} for each of its steps"
    )


def count_passes(cascade: Cascade, rank: str = "m") -> int:
    """How many times the cascade must go over `rank` from end to end: the longest chain of Einsums that each need all of the rank
    reduced before they can touch its first element. Running over a split rank's tiles alone is no pass. 0: it never runs over it."""
    return max((stage.ready for stage in schedule(cascade, rank) if stage.grain == "inside"), default=0)
