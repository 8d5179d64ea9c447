"""The unit of work: some rows of a document's causal attention, with every key up to the last of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


def count_pairs(q_len: int, kv_len: int) -> int:
    """Scores of `q_len` queries, the last of which sees `kv_len` keys, each one less than the next."""
    return q_len * kv_len - q_len * (q_len - 1) // 2


@dataclass(frozen=True)
class AttentionTask:
    """Rows `[q_start, q_start + q_len)` of document `doc`, causal, with the keys `[0, q_start + q_len)`: complete, nothing to merge.

    Attributes:
        doc: number of the document. q_start, q_len: its rows. home: rank that holds these rows. server: rank that computes them.
    """

    doc: int
    q_start: int
    q_len: int
    home: int
    server: int

    @property
    def kv_len(self) -> int:
        return self.q_start + self.q_len

    @property
    def pairs(self) -> int:
        return count_pairs(self.q_len, self.kv_len)


@dataclass
class Piece:
    """What the planner moves: a whole document, or a head and a tail piece of one, that weigh about the same together wherever they lie.

    Attributes:
        doc, doc_len: which document, and its tokens. home: rank that holds the tokens. server: rank that computes.
        spans: (q_len, kv_len), one for a whole document, or (head, tail). original: it is where it was placed, whole.
    """

    doc: int
    doc_len: int
    home: int
    server: int
    spans: tuple[tuple[int, int], ...]
    original: bool = True

    def __post_init__(self) -> None:
        self.pairs = sum(count_pairs(q, kv) for q, kv in self.spans)

    def tasks(self) -> list[AttentionTask]:
        """Its rows as tasks; empty spans are left out."""
        return [AttentionTask(self.doc, kv - q, q, self.home, self.server) for q, kv in self.spans if q > 0]

    def move(self, pairs: float, server: int) -> tuple[Piece | None, int]:
        """Give up to `pairs` scores of work to `server`: (what was cut off, or None; how much was moved).

        All of it where that is no more than `pairs`. Else `pairs // (doc_len + 1)` rows from the end of the head and as many from the
        beginning of the tail: row i and row L + 1 - i cost L + 1 together, so that in a document of even length exactly that is moved.
        """
        if pairs >= self.pairs:
            self.server, self.original = server, False
            return None, self.pairs
        head, tail = self.spans if len(self.spans) == 2 else self._halves()
        rows = min(int(pairs / (self.doc_len + 1)), head[0], tail[0])
        if rows <= 0:
            return None, 0
        head, tail = (head[0] - rows, head[1] - rows), (tail[0] - rows, tail[1])
        cut = ((rows, head[1] + rows), (rows, tail[1] - tail[0]))
        self.spans = (head, tail)
        self.__post_init__()
        made = Piece(self.doc, self.doc_len, self.home, server, cut, original=False)
        return made, made.pairs

    def _halves(self) -> tuple[tuple[int, int], tuple[int, int]]:
        (q, kv) = self.spans[0]
        first = (q + 1) // 2
        return (first, first), (q // 2, kv)


def tasks_of(pieces: Iterable[Piece]) -> list[AttentionTask]:
    """All tasks, by document and row."""
    made = [task for piece in pieces for task in piece.tasks()]
    return sorted(made, key=lambda task: (task.doc, task.q_start))
