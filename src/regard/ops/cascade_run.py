"""Runs a cascade of Einsums tile by tile, as its passes demand, and counts what it visits, keeps and computes."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int
from .einsum_cascade import Cascade, Einsum, Expression, Index, Number, Operation, Ref, Stage, schedule

__all__ = ["Trace", "run_cascade"]


@dataclass
class Trace:
    """What a run did. Counts are of elements and operations over all leading axes.

    Attributes:
        sweeps: for each pass over the rank, how many tiles of each tensor it read. live_peak: most elements of intermediate tensors
            alive at once. kept_peak: most of them alive between two tiles. operations: by Einsum, by kind.
        tiles: tiles of the rank.
    """

    sweeps: list[Counter[str]] = field(default_factory=list)
    live_peak: int = 0
    kept_peak: int = 0
    operations: dict[str, Counter[str]] = field(default_factory=dict)
    tiles: int = 0

    @property
    def passes(self) -> int:
        return len(self.sweeps)

    def visits(self, tensor: str) -> int:
        """Tiles of a tensor that were read, over all passes."""
        return sum(sweep[tensor] for sweep in self.sweeps)


def run_cascade(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    *,
    rank: str = "m",
    tile: int = 256,
    watch: Callable[[str, Tensor], Any] | None = None,
) -> tuple[dict[str, Tensor], Trace]:
    """(outputs, trace). `inputs`: every input of the cascade, its last axes being its ranks in order (of a split rank: one axis), what
    comes before being the same for all. The rank's last tile may be short."""
    run = _Run(cascade, inputs, rank, require_int("tile", tile, 1), watch)
    stages = schedule(cascade, rank)
    passes = max((stage.ready for stage in stages if stage.grain == "inside"), default=0)
    run.between(stages, 0)
    for number in range(1, passes + 1):
        run.sweep(stages, number)
        run.between(stages, number)
    return {name: run.result(name) for name in cascade.outputs}, run.trace


class _Run:
    def __init__(
        self, cascade: Cascade, inputs: Mapping[str, Tensor], rank: str, tile: int, watch: Callable[..., Any] | None
    ) -> None:
        missing = [name for name in cascade.inputs if name not in inputs]
        require(not missing, "inputs", sorted(inputs), f"also {', '.join(missing)}")
        self.cascade, self.watch, self.rank = cascade, watch, rank
        self.family = cascade.family(rank)
        self.outer, self.inner = self.family[0], self.family[-1]
        self.given = {name: inputs[name] for name in cascade.inputs}
        self.extents: dict[str, int] = {}
        self.lead: tuple[int, ...] | None = None
        for name, ranks in cascade.inputs.items():
            self._measure(name, self._whole(ranks))
        require(rank in self.extents, "rank", rank, f"a rank of the inputs, one of {sorted(self.extents)}")
        length = self.extents[rank]
        self.bounds = [(lo, min(lo + tile, length)) for lo in range(0, length, tile)]
        self.kept: dict[str, dict[int | None, Tensor]] = {}
        self.trace = Trace(operations={einsum.name: Counter() for einsum in cascade.einsums}, tiles=len(self.bounds))

    def _whole(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        """Ranks with the split one as a whole."""
        return tuple(dict.fromkeys(self.rank if rank in self.family else rank for rank in ranks))

    def _measure(self, name: str, ranks: tuple[str, ...]) -> None:
        tensor = self.given[name]
        require(tensor.dim() >= len(ranks), name, f"shape {tuple(tensor.shape)}", f"last axes {', '.join(ranks)}")
        lead = tuple(tensor.shape[: tensor.dim() - len(ranks)])
        self.lead = lead if self.lead is None else self.lead
        require(lead == self.lead, name, f"leading axes {lead}", f"{self.lead}, as the other inputs")
        for rank, extent in zip(ranks, tensor.shape[tensor.dim() - len(ranks) :]):
            known = self.extents.setdefault(rank, extent)
            require(known == extent, name, f"{extent} along {rank}", f"{known}, as in the other inputs")

    def sweep(self, stages: list[Stage], number: int) -> None:
        """One pass: every tile in turn, and in it what streams in this pass."""
        now = [
            (einsum, stage)
            for einsum, stage in zip(self.cascade.einsums, stages)
            if stage.streams and stage.ready == number
        ]
        later = {
            ref.name
            for einsum, stage in zip(self.cascade.einsums, stages)
            if (stage.ready if stage.streams else stage.complete + 1) > number
            for ref in einsum.inputs
        } | set(self.cascade.outputs)
        self.trace.sweeps.append(Counter())
        for place in range(len(self.bounds)):
            read = set()
            for einsum, _ in now:
                read |= {ref.name for ref in einsum.inputs if self.inner in ref.ranks}
                self.run(einsum, place)
            self.trace.sweeps[-1].update(read)
            self._forget(now, place, later)
            self.trace.kept_peak = max(self.trace.kept_peak, self._alive())
        for name in [name for name in self.kept if name not in later]:
            del self.kept[name]

    def _forget(self, now: list[tuple[Einsum, Stage]], place: int, later: set[str]) -> None:
        """Drop what only this tile needed. A running value's last step stays for the next tile."""
        for name in {einsum.name for einsum, _ in now}:
            held = self.kept.get(name, {})
            recurs = any(index.shift for einsum, _ in now if einsum.name == name for index in einsum.output.indices)
            for key in [key for key in held if key is not None]:
                if (recurs and key <= place) or (not recurs and name not in later):
                    del held[key]

    def between(self, stages: list[Stage], number: int) -> None:
        """What runs after a whole pass: over tiles only, or over none."""
        for einsum, stage in zip(self.cascade.einsums, stages):
            if not stage.streams and stage.complete == number:
                for place in range(len(self.bounds)) if stage.grain == "tiles" else [None]:
                    self.run(einsum, place)

    def run(self, einsum: Einsum, place: int | None) -> None:
        extents = {rank: self._extent(rank, place) for rank in einsum.ranks}
        value = self._evaluate(einsum, place, extents)
        lead = math.prod(self.lead or ())
        volume = lead * math.prod(
            extent for rank, extent in extents.items() if rank != self.outer or self.inner == self.outer
        )
        for kind, count in einsum.operations.items():
            self.trace.operations[einsum.name][kind] += count * volume
        held = self.kept.setdefault(einsum.name, {})
        key = self._key(einsum.output, place)
        if key is None and place is not None and einsum.reduce is not None and None in held:
            value = held[None] + value if einsum.reduce == "sum" else torch.maximum(held[None], value)
        held[key] = value
        self.trace.live_peak = max(self.trace.live_peak, self._alive())
        if self.watch is not None:
            self.watch(einsum.name, value)

    def _alive(self) -> int:
        outputs = set(self.cascade.outputs)
        return sum(x.numel() for name, held in self.kept.items() if name not in outputs for x in held.values())

    def _extent(self, rank: str, place: int | None) -> int:
        if rank == self.inner and place is not None:
            lo, hi = self.bounds[place]
            return hi - lo
        return 1 if rank == self.outer else self.extents[rank]

    def _key(self, ref: Ref, place: int | None) -> int | None:
        """Where the part of a tensor that belongs to a tile is kept: by tile, or as a whole."""
        for index in ref.indices:
            if index.rank == self.outer:
                return self._place(index, place)
        return None

    def _place(self, index: Index, place: int | None) -> int | None:
        if index.at is not None:
            return 0 if index.at == "start" else len(self.bounds)
        return None if place is None else place + index.shift

    def _value(self, ref: Ref, place: int | None) -> tuple[Tensor, tuple[str, ...]]:
        """The part of a tensor that a tile sees, and the ranks of its last axes."""
        ranks = tuple(index.rank for index in ref.indices if index.at is None and not self._is_tile(index.rank))
        if ref.name in self.given:
            tensor = self.given[ref.name]
            whole = self._whole(ref.ranks)
            if self.rank in whole and place is not None:
                axis = whole.index(self.rank) - len(whole)
                lo, hi = self.bounds[place]
                tensor = tensor.narrow(axis, lo, hi - lo)
            return tensor, ranks
        return self.kept[ref.name][self._key(ref, place)], ranks

    def _is_tile(self, rank: str) -> bool:
        return rank == self.outer and self.outer != self.inner

    def _evaluate(self, einsum: Einsum, place: int | None, extents: dict[str, int]) -> Tensor:
        out = tuple(rank for rank in einsum.output.ranks if not self._is_tile(rank))
        ranks = (*out, *(rank for rank in einsum.reduced if not self._is_tile(rank)))
        product = self._product(einsum.expression) if einsum.reduce == "sum" else None
        if product is not None:
            letters = dict(zip(ranks, string.ascii_letters))
            values = [self._value(ref, place) for ref in product]
            sides = ",".join("..." + "".join(letters[rank] for rank in own) for _, own in values)
            return torch.einsum(
                f"{sides}->...{''.join(letters[rank] for rank in out)}", *(value for value, _ in values)
            )
        value = self._aligned(einsum.expression, place, ranks)
        shape = (*(self.lead or ()), *(extents[rank] for rank in ranks))
        value = torch.broadcast_to(value, shape)
        axes = tuple(range(-(len(ranks) - len(out)), 0))
        if axes:
            value = value.sum(axes) if einsum.reduce == "sum" else value.amax(axes)
        return value.clone() if einsum.reduce is None else value

    def _product(self, expression: Expression) -> list[Ref] | None:
        """The factors of a plain product of two tensors."""
        if not isinstance(expression, Operation) or expression.kind != "mul":
            return None
        refs = [part for part in expression.arguments if isinstance(part, Ref)]
        return refs if len(refs) == 2 else None

    def _aligned(self, expression: Expression, place: int | None, ranks: tuple[str, ...]) -> Tensor:
        """An expression's value with one axis for each of `ranks`, of length 1 where it does not vary."""
        if isinstance(expression, Number):
            like = next(iter(self.given.values()))
            return torch.tensor(expression.value, dtype=like.dtype, device=like.device)
        if isinstance(expression, Ref):
            value, own = self._value(expression, place)
            lead = value.dim() - len(own)
            kept = [rank for rank in ranks if rank in own]
            value = value.permute([*range(lead), *(lead + own.index(rank) for rank in kept)])
            shape = iter(value.shape[lead:])
            return value.reshape([*value.shape[:lead], *(next(shape) if rank in own else 1 for rank in ranks)])
        parts = [self._aligned(argument, place, ranks) for argument in expression.arguments]
        return _FUNCTIONS[expression.kind](*parts)

    def result(self, name: str) -> Tensor:
        """An output as a whole, tiles of the rank side by side."""
        held = self.kept[name]
        if None in held:
            return held[None]
        einsum = next(einsum for einsum in self.cascade.einsums if einsum.name == name)
        ranks = tuple(rank for rank in einsum.output.ranks if not self._is_tile(rank))
        parts = [held[key] for key in sorted(key for key in held if key is not None)]
        if self.inner in ranks:
            return torch.cat(parts, dim=ranks.index(self.inner) - len(ranks))
        return torch.stack(parts, dim=-1 - len(ranks))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "exp": torch.exp,
    "max": torch.maximum,
    "neg": torch.neg,
}
