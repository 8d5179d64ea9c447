"""What balancing attention would buy on up to hundreds of devices, by the cost model: one transformer layer, forward."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import require, require_int
from ..bench.cost import Device, ModelShape
from .baselines import pack_by_workload
from .placement import check_documents, place_documents
from .plan import Plan
from .planner import balance
from .tasks import Piece, count_pairs

if TYPE_CHECKING:
    from rich.table import Table

TOLERANCES = (0.2, 0.1, 0.05, 0.0)


@dataclass(frozen=True)
class Outcome:
    """One way of dividing the work.

    Attributes:
        way: which. imbalance: largest attention load over the mean. token_imbalance: most tokens on a rank over the mean.
        attention, linear: seconds of the slowest rank. travel: of the rank that sends or receives most; mean_travel: of the mean one.
        seconds: of the layer; travel hides behind the computation of the other half batch where `overlap` (ping-pong), else it adds.
        moved: bytes that travel in all. ideal: seconds with everything divided evenly and no travel. tasks: how many.
    """

    way: str
    imbalance: float
    token_imbalance: float
    attention: float
    linear: float
    travel: float
    mean_travel: float
    seconds: float
    moved: float
    ideal: float
    tasks: int

    @property
    def efficiency(self) -> float:
        """Ideal over actual time, at most 1."""
        return self.ideal / self.seconds


def sample_documents(tokens: int, longest: int, *, median: int = 2048, sigma: float = 1.6, seed: int = 0) -> list[int]:
    """Document lengths with a long tail: log-normal, even, at most `longest`, that fill `tokens` (the last is cut to fit).

    Args:
        tokens: of all documents, even. longest: at most. median, sigma: of the log-normal.
    """
    for name, value in (("tokens", tokens), ("longest", longest)):
        require_int(name, value, 2)
        require(value % 2 == 0, name, value, "an even number")
    drawn, out, left = random.Random(seed), [], tokens
    while left:
        length = 2 * round(drawn.lognormvariate(math.log(median), sigma) / 2)
        out.append(min(max(2, length), longest, left))
        left -= out[-1]
    return out


def simulate(
    doc_lens: Sequence[int],
    ranks: int,
    token_budget: int,
    *,
    shape: ModelShape,
    device: Device,
    tolerances: Sequence[float] = TOLERANCES,
    element_bytes: int = 2,
    overlap: bool = True,
    attention_efficiency: float = 0.6,
    linear_efficiency: float = 0.6,
) -> list[Outcome]:
    """Ways of dividing a batch among `ranks` devices, and what one layer's forward takes with each.

    "in order": documents fill one rank after the other, long ones cut zig-zag, attention where the tokens are. "packed": whole documents
    by workload onto groups of ranks that share each document evenly (WLB-LLM with context parallelism), groups of the size that serves
    best; tokens are then uneven. "released": tokens in order, attention moved by the planner. "both bounds": likewise, with its
    variant "paper", for each tolerance.

    Args:
        doc_lens: even lengths serve the planner best. token_budget: tokens a rank holds.
        shape: the model (linear layers: its parameters over its layers). device: peak FLOP/s and link.
        overlap: whether travel hides behind computation. attention_efficiency, linear_efficiency: share of the peak that is reached.
    """
    lengths = check_documents(doc_lens)
    for name, value in (("attention_efficiency", attention_efficiency), ("linear_efficiency", linear_efficiency)):
        require(0 < value <= 1, name, value, "a share in (0, 1]")
    sizes = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    placed = place_documents(lengths, ranks, token_budget)
    ways: list[tuple[str, list[Piece]]] = [("in order", placed)]
    for variant, name in (("released", "released"), ("paper", "both bounds")):
        for tolerance in tolerances:
            moved = balance(placed, ranks, tolerance=tolerance, variant=variant, **sizes)
            ways.append((f"{name}, {tolerance:g}", moved))
    pair = 4.0 * shape.num_heads * shape.head_dim / (device.flops * attention_efficiency)
    token = 2.0 * shape.params / shape.num_layers / (device.flops * linear_efficiency)
    outcomes = []
    for way, computed in ways:
        plan = Plan.of(placed, computed, ranks, **sizes)
        tokens = [len(own) for own in plan.tokens]
        sent = plan.traffic.double() * element_bytes
        travel, mean_travel = _travel(sent, device)
        # attention is a step of its own: all wait for the slowest server, and for the fullest rank
        busy = max(plan.loads) * pair + max(tokens) * token
        outcomes.append(
            Outcome(
                way,
                plan.imbalance,
                max(tokens) * ranks / sum(tokens),
                max(plan.loads) * pair,
                max(tokens) * token,
                travel,
                mean_travel,
                max(busy, travel) if overlap else busy + travel,
                float(sent.sum()),
                (sum(plan.loads) * pair + sum(tokens) * token) / ranks,
                len(plan.tasks),
            )
        )
    sizes_of_groups = [2**e for e in range(ranks.bit_length()) if ranks % 2**e == 0]
    given = (lengths, ranks, token_budget, shape, device, pair, token, element_bytes, overlap)
    outcomes.insert(1, min((_packed(size, *given) for size in sizes_of_groups), key=lambda out: out.seconds))
    return outcomes


def _travel(sent: Tensor, device: Device) -> tuple[float, float]:
    """Seconds of the rank that sends or receives longest, and of the mean rank; `sent` (ranks, ranks) bytes. Neighbours share machines."""
    machine = torch.arange(len(sent)) // device.near
    same = machine[:, None] == machine
    seconds = torch.where(same, sent / device.near_link, sent / device.link)
    return float(max(seconds.sum(0).max(), seconds.sum(1).max())), float(seconds.sum() / len(sent))


def _packed(
    size: int,
    lengths: list[int],
    ranks: int,
    token_budget: int,
    shape: ModelShape,
    device: Device,
    pair: float,
    token: float,
    element_bytes: int,
    overlap: bool,
) -> Outcome:
    """Documents by workload onto groups of ranks; in a group every rank computes its share of every document and gathers all keys."""
    groups = ranks // size
    placed = pack_by_workload(lengths, groups, 2 * size * token_budget, breakpoint=_breakpoint(shape))
    loads = [sum(count_pairs(lengths[doc], lengths[doc]) for doc in docs) / size for docs in placed]
    tokens = [sum(lengths[doc] for doc in docs) / size for docs in placed]
    row = 2 * shape.num_kv_heads * shape.head_dim * element_bytes
    near = min(size, device.near)
    gathered = [count * (size - 1) * row for count in tokens]
    travels = [count * row * ((near - 1) / device.near_link + (size - near) / device.link) for count in tokens]
    busy = [load * pair + count * token for load, count in zip(loads, tokens)]
    times = [max(b, t) if overlap else b + t for b, t in zip(busy, travels)]
    return Outcome(
        f"packed, groups of {size}",
        max(loads) * groups / sum(loads),
        max(tokens) * groups / sum(tokens),
        max(loads) * pair,
        max(tokens) * token,
        max(travels),
        sum(travels) / groups,
        max(times),
        sum(gathered) * size,
        sum(busy) / groups,
        len(lengths) * size * (2 if size > 1 else 1),
    )


def _breakpoint(shape: ModelShape) -> int:
    """Tokens at which a document's attention (causal) costs as much as its linear layers."""
    return max(1, round(shape.params / shape.num_layers / (shape.num_heads * shape.head_dim)))


def table(outcomes: Sequence[Outcome], title: str = "") -> Table:
    """Outcomes for the screen; times beside those of the first."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("way", no_wrap=True)
    for name in (
        "pairs\nmax/mean",
        "tokens\nmax/mean",
        "pairs\nms",
        "linear\nms",
        "travel ms\nmax (mean)",
        "layer\nms",
    ):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("×\nfirst", "of\nideal", "moved\nGB", "tasks"):
        made.add_column(name, justify="right", no_wrap=True)
    for out in outcomes:
        made.add_row(
            out.way,
            f"{out.imbalance:.3f}",
            f"{out.token_imbalance:.3f}",
            f"{out.attention * 1e3:.2f}",
            f"{out.linear * 1e3:.2f}",
            f"{out.travel * 1e3:.2f} ({out.mean_travel * 1e3:.1f})",
            f"{out.seconds * 1e3:.2f}",
            f"{outcomes[0].seconds / out.seconds:.2f}",
            f"{out.efficiency:.0%}",
            f"{out.moved / 1e9:.2f}",
            str(out.tasks),
        )
    return made
