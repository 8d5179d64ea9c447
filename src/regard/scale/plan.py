"""`Plan`: who computes which rows, where tokens live, what has to travel, and how even the load is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import bad_value, require
from .tasks import AttentionTask, Piece, tasks_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """Tasks that cover every row of every document once.

    Attributes:
        doc_lens: tokens of each document. ranks: devices; each holds tokens and computes tasks.
        tasks: by document and row. homes: (doc, first row, one past the last, rank) of everything that a rank holds, in its order.
        num_heads, num_kv_heads, head_dim: of the attention, for what travels.
    """

    doc_lens: tuple[int, ...]
    ranks: int
    tasks: tuple[AttentionTask, ...]
    homes: tuple[tuple[int, int, int, int], ...] = field(repr=False, default=())
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @classmethod
    def of(
        cls,
        placed: Sequence[Piece],
        planned: Sequence[Piece],
        ranks: int,
        *,
        num_heads: int = 32,
        num_kv_heads: int = 8,
        head_dim: int = 128,
    ) -> Plan:
        """From pieces as they were placed (tokens live there) and as they are to be computed."""
        lengths = {piece.doc: piece.doc_len for piece in placed}
        require(sorted(lengths) == list(range(len(lengths))), "placed", sorted(lengths), "documents numbered from 0")
        homes = [(task.doc, task.q_start, task.kv_len, task.home) for piece in placed for task in piece.tasks()]
        homes.sort(key=lambda home: home[3])  # stable: a rank's spans stay in the order of placement
        sizes = tuple(lengths[doc] for doc in range(len(lengths)))
        plan = cls(sizes, ranks, tuple(tasks_of(planned)), tuple(homes), num_heads, num_kv_heads, head_dim)
        plan.check()
        return plan

    def check(self) -> None:
        """Raise a `ValueError` unless every row of every document is in exactly one task, and lives on the task's home."""
        at: dict[int, int] = defaultdict(int)
        for task in self.tasks:
            if task.q_start != at[task.doc] or not 0 <= task.server < self.ranks:
                raise bad_value(
                    "tasks", task, f"document {task.doc} to go on at row {at[task.doc]}, on a server below {self.ranks}"
                )
            at[task.doc] = task.kv_len
        for doc, length in enumerate(self.doc_lens):
            require(at[doc] == length, "tasks", f"{at[doc]} rows of document {doc}", f"all {length}")
        holder = self.holders
        for task in self.tasks:
            first = self.starts[task.doc] + task.q_start
            inside = holder[first : first + task.q_len] == task.home
            require(bool(inside.all()), "tasks", task, f"rows that rank {task.home} holds")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each document in the packed row of all."""
        out = [0]
        for length in self.doc_lens:
            out.append(out[-1] + length)
        return tuple(out)

    @cached_property
    def holders(self) -> Tensor:
        """Rank that holds each token of the packed row, int64 (tokens,)."""
        rank = torch.full((self.starts[-1],), -1)
        for doc, first, stop, home in self.homes:
            rank[self.starts[doc] + first : self.starts[doc] + stop] = home
        return rank

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        """For each rank, the numbers of its tokens in the packed row, in the order in which it holds them: int64 (tokens of rank,)."""
        spans: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for doc, first, stop, home in self.homes:
            spans[home].append(torch.arange(first, stop) + self.starts[doc])
        return tuple(torch.cat(own) if own else torch.zeros(0, dtype=torch.long) for own in spans)

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Scores that each rank computes."""
        load = [0] * self.ranks
        for task in self.tasks:
            load[task.server] += task.pairs
        return tuple(load)

    @property
    def imbalance(self) -> float:
        """Largest load over the mean: 1 is perfect, and the time of all is that of the slowest."""
        return max(self.loads) * self.ranks / max(1, sum(self.loads))

    @cached_property
    def kv_needs(self) -> tuple[dict[int, int], ...]:
        """For each server, document -> keys it needs from the start."""
        needs: list[dict[int, int]] = [{} for _ in range(self.ranks)]
        for task in self.tasks:
            own = needs[task.server]
            own[task.doc] = max(own.get(task.doc, 0), task.kv_len)
        return tuple(needs)

    @cached_property
    def traffic(self) -> Tensor:
        """Elements that travel for one layer's forward, int64 (ranks, ranks), row: from, column: to. Queries there, outputs back, keys and
        values once for each server and document; what stays on a rank is not counted."""
        moved = torch.zeros(self.ranks, self.ranks, dtype=torch.long)
        row, kv_row = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        for task in self.tasks:
            moved[task.home, task.server] += task.q_len * row
            moved[task.server, task.home] += task.q_len * row
        spans: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for doc, first, stop, home in self.homes:
            spans[doc].append((first, stop, home))
        for server, needs in enumerate(self.kv_needs):
            for doc, need in needs.items():
                for first, stop, home in spans[doc]:
                    moved[home, server] += max(0, min(stop, need) - first) * kv_row
        return moved.fill_diagonal_(0)

    def report(self) -> Table:
        """Load and traffic of each rank, for the screen."""
        from rich import box
        from rich.table import Table

        mean = sum(self.loads) / self.ranks
        made = Table(
            title=f"{len(self.doc_lens)} documents, {self.starts[-1]} tokens, {len(self.tasks)} tasks: "
            f"largest load {self.imbalance:.3f} of the mean",
            box=box.SIMPLE_HEAD,
        )
        for name in ("rank", "tokens", "tasks", "scores, 1e6", "of the mean", "sent, 1e6", "received, 1e6"):
            made.add_column(name, justify="right")
        sent, received = self.traffic.sum(1).tolist(), self.traffic.sum(0).tolist()
        for rank in range(self.ranks):
            tasks = sum(task.server == rank for task in self.tasks)
            cells = (
                rank,
                len(self.tokens[rank]),
                tasks,
                f"{self.loads[rank] / 1e6:.2f}",
                f"{self.loads[rank] / max(mean, 1):.3f}",
            )
            made.add_row(*map(str, cells), f"{sent[rank] / 1e6:.2f}", f"{received[rank] / 1e6:.2f}")
        return made
