"""Other ways to balance attention: cut one document evenly (the release's `equal_flops`), or pack whole documents by workload."""

from __future__ import annotations

from collections.abc import Sequence

from .._checks import require_int
from .placement import check_documents, place_whole
from .tasks import Piece, count_pairs


def water_filling(batches: Sequence[Sequence[int]]) -> list[Piece]:
    """Take the longest document of the most loaded rank and pour it over all ranks, lowest first, until it is used up.

    As in the authors' `equal_flops.plan_relocation`, called once: its own rank is filled first, every rank gets a head and a tail piece of
    whole row pairs, and rows that are left over go to their neighbours.

    Args:
        batches: lengths of the documents on each rank.
            There are as many ranks as the last that holds a document.
    Returns:
        Pieces, those of the poured document with one span each, last.
    """
    pieces = place_whole(batches)
    ranks = max(piece.server for piece in pieces) + 1
    load = _loads(pieces, ranks)
    fullest = load.index(max(load))
    poured = max((piece for piece in pieces if piece.server == fullest), key=lambda piece: piece.pairs)
    pieces.remove(poured)
    load = _loads(pieces, ranks)
    amounts = _pour([max(load) - own for own in load], poured.pairs)
    spans: list[tuple[int, int, int]] = []  # (q_len, kv_len, rank)
    length, placed = poured.doc_len, 0
    for rank in [poured.server, *(rank for rank in range(ranks) if rank != poured.server)]:
        rows = -int(-amounts[rank] // 1) // (length + 1)
        rows = min(rows, length // 2 - placed)  # amounts are rounded up: the last rank may be left with less
        if rows > 0:
            spans += [(rows, placed + rows, rank), (rows, length - placed, rank)]
            placed += rows
    if not spans:  # no rank's share is as much as one pair of rows
        return [*pieces, poured]
    done = 0
    for _, kv, rank in sorted(spans, key=lambda span: span[1]):
        pieces.append(Piece(poured.doc, length, poured.home, rank, ((kv - done, kv),), original=False))
        done = kv
    return pieces


def _loads(pieces: Sequence[Piece], ranks: int) -> list[int]:
    load = [0] * ranks
    for piece in pieces:
        load[piece.server] += piece.pairs
    return load


def _pour(lack: list[float], amount: float) -> list[float]:
    """`amount` over ranks that lack so much each: the level rises evenly from the lowest on; what is left over is shared alike."""
    lack, ranks = list(lack), len(lack)
    given = [0.0] * ranks
    for count in range(2, ranks + 1):
        lowest = sorted(range(ranks), key=lambda rank: -lack[rank])[:count]
        level, below = lack[lowest[-1]], lowest[:-1]
        need = sum(lack[rank] - level for rank in below)
        if amount >= need:
            steps = {rank: lack[rank] - level for rank in below}
            amount -= need
        else:
            steps = dict.fromkeys(below, amount / len(below))
            amount = 0
        for rank, step in steps.items():
            given[rank] += step
            lack[rank] -= step
        if amount == 0:
            return given
    return [own + amount / ranks for own in given]


def pack_by_workload(
    doc_lens: Sequence[int], ranks: int, token_limit: int, *, breakpoint: int = 128 * 1024
) -> list[list[int]]:
    """Whole documents onto ranks, longest first, each to the rank with the least work that has room (WLB-LLM without deferring).

    Work of a document of n tokens is x^2 + x with x = n / breakpoint: attention and linear layers weigh alike at `breakpoint` tokens.
    Where the least loaded rank has no room, the one with the fewest tokens is tried; what fits nowhere goes to the least work at last.

    Args:
        token_limit: tokens a rank should hold (exceeded only by what fits nowhere).
    Returns:
        For each rank the numbers of its documents.
    """
    lengths = check_documents(doc_lens)
    for name, value in (("ranks", ranks), ("token_limit", token_limit), ("breakpoint", breakpoint)):
        require_int(name, value, 1)
    work, tokens = [0.0] * ranks, [0] * ranks
    placed: list[list[int]] = [[] for _ in range(ranks)]

    def put(doc: int, rank: int) -> None:
        x = lengths[doc] / breakpoint
        placed[rank].append(doc)
        work[rank] += x * x + x
        tokens[rank] += lengths[doc]

    left = []
    for doc in sorted(range(len(lengths)), key=lambda doc: -lengths[doc]):
        least, emptiest = work.index(min(work)), tokens.index(min(tokens))
        if tokens[least] + lengths[doc] <= token_limit:
            put(doc, least)
        elif tokens[emptiest] + lengths[doc] <= token_limit:
            put(doc, emptiest)
        else:
            left.append(doc)
    for doc in left:
        put(doc, work.index(min(work)))
    return placed


def pieces_of(placed: Sequence[Sequence[int]], doc_lens: Sequence[int]) -> list[Piece]:
    """Documents on the ranks that `pack_by_workload` chose, as pieces."""
    made = []
    for rank, docs in enumerate(placed):
        for doc in docs:
            length = int(doc_lens[doc])
            made.append(Piece(doc, length, rank, rank, ((length, length),)))
    return sorted(made, key=lambda piece: piece.doc)


def total_pairs(doc_lens: Sequence[int]) -> int:
    """Scores of all documents together."""
    return sum(count_pairs(int(n), int(n)) for n in doc_lens)
