"""Where the tokens of documents live: placement onto ranks, in order, with a budget of tokens for each."""

from __future__ import annotations

from collections.abc import Sequence

from .._checks import bad_value, require, require_int
from .tasks import Piece


def check_documents(doc_lens: Sequence[int]) -> list[int]:
    lengths = [int(length) for length in doc_lens]
    require(bool(lengths), "doc_lens", doc_lens, "at least one document")
    require(min(lengths) >= 1, "doc_lens", min(lengths), "lengths >= 1")
    return lengths


def place_documents(doc_lens: Sequence[int], ranks: int, token_budget: int) -> list[Piece]:
    """Documents onto ranks in order, each rank filled before the next one.

    A document that does not fit is cut zig-zag: each rank takes rows from the front and the back of what is not yet placed of it, half of
    each, so that what it takes weighs about the same wherever it lies (context parallelism).

    Args:
        doc_lens: tokens of each document. ranks: how many. token_budget: tokens that a rank holds.
    Raises:
        ValueError: there are more tokens than room.
    """
    lengths = check_documents(doc_lens)
    require_int("ranks", ranks, 1)
    require_int("token_budget", token_budget, 1)
    need = f"at least the {sum(lengths)} tokens of all documents"
    require(ranks * token_budget >= sum(lengths), "ranks * token_budget", ranks * token_budget, need)
    pieces, rank, room = [], 0, token_budget
    for doc, length in enumerate(lengths):
        front, back = 0, length  # rows not yet placed
        while front < back:
            if room == 0:
                rank, room = rank + 1, token_budget
            size = min(back - front, room)
            if size == length:
                pieces.append(Piece(doc, length, rank, rank, ((length, length),)))
                front = back
            else:
                head = size // 2
                tail = size - head
                spans = ((head, front + head), (tail, back))
                pieces.append(Piece(doc, length, rank, rank, spans, original=front == 0))
                front, back = front + head, back - tail
            room -= size
    return pieces


def place_whole(batches: Sequence[Sequence[int]]) -> list[Piece]:
    """Whole documents on the ranks that they are listed for: `batches[r]` are the lengths on rank r (data parallelism)."""
    if not any(len(batch) for batch in batches):
        raise bad_value("batches", batches, "at least one document")
    pieces: list[Piece] = []
    for rank, batch in enumerate(batches):
        for length in check_documents(batch) if len(batch) else []:
            pieces.append(Piece(len(pieces), length, rank, rank, ((length, length),)))
    return pieces
