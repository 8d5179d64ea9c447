"""The greedy planner of DistCA: work moves from ranks with too much to ranks with too little, the cheapest to send first."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from .._checks import require, require_int, require_name
from .placement import place_documents
from .plan import Plan
from .tasks import Piece


def balance(
    pieces: Sequence[Piece],
    ranks: int,
    *,
    tolerance: float = 0.1,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    variant: str = "released",
) -> list[Piece]:
    """Move work until no rank lacks more than `tolerance` of the mean, or nothing can be moved.

    Ranks that lack most come first. Each takes, from ranks that have too much, the piece that costs the fewest elements to send for each
    score it brings: its queries, and keys and values of the whole document. A piece is cut where it is more than is wanted.

    Args:
        pieces: as placed; not changed. ranks: how many servers. tolerance: >= 0.
        num_heads, num_kv_heads, head_dim: of the attention, for what sending costs.
        variant: "released" stops there. What many ranks still lack a little of may then lie on one rank: with hundreds of ranks the
            largest load can be several times the mean. "paper" goes on until no rank has more than `tolerance` above the mean either.
    Returns:
        New pieces, cut ones after those they were cut from. Total work is the same. Lengths of documents may be odd (the authors'
        planner refuses these): then what is moved is counted exactly, a row's worth more or less.
    """
    require_int("ranks", ranks, 1)
    require(tolerance >= 0, "tolerance", tolerance, "a number >= 0")
    require_name("variant", variant, ("released", "paper"))
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        require_int(name, value, 1)
    pieces = [copy(piece) for piece in pieces]
    load = [0.0] * ranks
    for piece in pieces:
        require(0 <= piece.server < ranks, "pieces", f"server {piece.server}", f"servers below ranks = {ranks}")
        load[piece.server] += piece.pairs
    mean = sum(load) / ranks
    surplus = [own - mean for own in load]
    hidden, kv_width = num_heads * head_dim, 2 * num_kv_heads * head_dim

    def price(piece: Piece, pairs: float) -> float:
        length = piece.doc_len + 1
        return (pairs / length * hidden + length * kv_width) / pairs

    def take(taker: int, need: float, givers: float) -> int:
        """Give `taker` the cheapest piece of a rank with a surplus above `givers`; how much it was (0: there is none)."""
        best: tuple[float, Piece, float] | None = None
        for piece in pieces:
            if surplus[piece.server] > givers and piece.pairs > 0:
                most = min(need, piece.pairs, surplus[piece.server])
                cost = price(piece, most)
                if best is None or cost < best[0]:
                    best = cost, piece, most
        if best is None:
            return 0
        _, piece, most = best
        giver = piece.server
        cut, moved = piece.move(most, taker)
        if cut is not None:
            pieces.append(cut)
        surplus[giver] -= moved
        surplus[taker] += moved
        return moved

    order = sorted((rank for rank in range(ranks) if surplus[rank] < 0), key=lambda rank: surplus[rank])
    for taker in order:
        need = -surplus[taker]
        while need > mean * tolerance:
            moved = take(taker, need, 0.0)
            if moved == 0:
                break
            need -= moved
    if variant == "paper":
        lacking = [rank for rank in range(ranks) if surplus[rank] < 0]
        while lacking and max(surplus) > mean * tolerance:
            taker = min(lacking, key=lambda rank: surplus[rank])
            if surplus[taker] >= 0 or take(taker, -surplus[taker], mean * tolerance) == 0:
                lacking.remove(taker)
    return [piece for piece in pieces if piece.pairs > 0]


def plan_tasks(
    doc_lens: Sequence[int],
    ranks: int,
    token_budget: int | None = None,
    *,
    tolerance: float = 0.1,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    variant: str = "released",
) -> Plan:
    """Place documents and balance their attention: `place_documents`, then `balance`.

    Args:
        token_budget: tokens a rank holds; default: an equal share, rounded up.
    """
    require_int("ranks", ranks, 1)
    if token_budget is None:
        token_budget = -(-sum(int(length) for length in doc_lens) // ranks) or 1
    placed = place_documents(doc_lens, ranks, token_budget)
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return Plan.of(placed, balance(placed, ranks, tolerance=tolerance, variant=variant, **sizes), ranks, **sizes)
