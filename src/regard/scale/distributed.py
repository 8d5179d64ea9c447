"""A plan over `torch.distributed`: tokens travel to the ranks that compute their attention, outputs back, gradients the same ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import require
from .execute import attend, check_tensors
from .plan import Plan
from .tasks import AttentionTask


@dataclass(frozen=True)
class Route:
    """What one rank sends, receives and puts in order; row numbers are int64 tensors, counts are rows for each rank.

    Attributes:
        q_send: own rows, by server. q_send_counts, q_receive_counts.
        out_order: for each own row, its place among the outputs that come back.
        kv_send: own rows, by server (a row may go to several). kv_send_counts, kv_receive_counts.
        tasks: of this server, in the order in which their rows arrive. kv_rows: document -> received rows, in order of position.
    """

    q_send: Tensor
    q_send_counts: list[int]
    q_receive_counts: list[int]
    out_order: Tensor
    kv_send: Tensor
    kv_send_counts: list[int]
    kv_receive_counts: list[int]
    tasks: list[AttentionTask]
    kv_rows: dict[int, Tensor]

    @classmethod
    def of(cls, plan: Plan, rank: int) -> Route:
        local = torch.full((plan.starts[-1],), -1)
        local[plan.tokens[rank]] = torch.arange(len(plan.tokens[rank]))
        going: list[list[Tensor]] = [[] for _ in range(plan.ranks)]
        coming: list[list[AttentionTask]] = [[] for _ in range(plan.ranks)]
        for task in plan.tasks:
            if task.home == rank:
                first = plan.starts[task.doc] + task.q_start
                going[task.server].append(local[first : first + task.q_len])
            if task.server == rank:
                coming[task.home].append(task)
        q_send, q_counts = _joined(going)
        out_order = torch.empty_like(q_send)
        out_order[q_send] = torch.arange(len(q_send))
        kv_going = [[_held(plan, doc, need, rank, local) for doc, need in sorted(n.items())] for n in plan.kv_needs]
        kv_send, kv_counts = _joined(kv_going)
        needs, arrived = sorted(plan.kv_needs[rank].items()), 0
        places = {doc: torch.empty(need, dtype=torch.long) for doc, need in needs}
        kv_receive = []
        for source in range(plan.ranks):
            before = arrived
            for doc, need in needs:
                holder = plan.holders[plan.starts[doc] : plan.starts[doc] + need]
                at = (holder == source).nonzero()[:, 0]
                places[doc][at] = torch.arange(arrived, arrived + len(at))
                arrived += len(at)
            kv_receive.append(arrived - before)
        tasks = [task for own in coming for task in own]
        q_receive = [sum(task.q_len for task in own) for own in coming]
        return cls(q_send, q_counts, q_receive, out_order, kv_send, kv_counts, kv_receive, tasks, places)

    def to(self, device: torch.device) -> Route:
        moved = {name: getattr(self, name).to(device) for name in ("q_send", "out_order", "kv_send")}
        rows = {doc: index.to(device) for doc, index in self.kv_rows.items()}
        return Route(**{**self.__dict__, **moved, "kv_rows": rows})


def _held(plan: Plan, doc: int, need: int, rank: int, local: Tensor) -> Tensor:
    """Own rows of the first `need` tokens of a document, in order of position."""
    span = slice(plan.starts[doc], plan.starts[doc] + need)
    return local[span][plan.holders[span] == rank]


def _joined(lists: list[list[Tensor]]) -> tuple[Tensor, list[int]]:
    flat = [part for own in lists for part in own]
    joined = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.long)
    return joined, [sum(len(part) for part in own) for own in lists]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows, of several tensors in a fixed order, so that all ranks meet in the same collectives also in the backward."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, counts: Sequence[tuple[list[int], list[int]]], works: list | None, *rows: Tensor
    ) -> Any:  # type: ignore[override]
        ctx.group, ctx.counts = group, counts
        return tuple(_all_to_all(x, send, take, group, works) for x, (send, take) in zip(rows, counts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        back = [_all_to_all(g, take, send, ctx.group, None) for g, (send, take) in zip(grads, ctx.counts)]
        return (None, None, None, *back)


def _all_to_all(rows: Tensor, send: list[int], take: list[int], group: Any, works: list | None) -> Tensor:
    out = rows.new_empty(sum(take), *rows.shape[1:])
    work = dist.all_to_all_single(out, rows.contiguous(), take, send, group=group, async_op=works is not None)
    if works is not None:
        works.append((work, rows))  # what is sent stays alive until it is gone
    return out


def run_plans(
    batches: Sequence[tuple[Plan, Tensor, Tensor, Tensor]], *, group: Any = True, scale: float | None = None
) -> list[Tensor]:
    """Several plans at once, one after the other through the same ranks: while one is computed, the next one's tokens travel (DistCA's
    ping-pong has two half batches). Differentiable; every rank has to call it with the same plans, and to run backward.

    Args:
        batches: (plan, q, k, v) with the tokens `plan.tokens[rank]` of this rank: (B, H, t, D), (B, Hkv, t, D).
        group: a process group of `plan.ranks` ranks, or True for the default one.
    Returns:
        For each the outputs (B, H, t, Dv) of this rank's tokens.
    """
    group = None if group is True else group
    require(dist.is_initialized(), "group", "no process group", "torch.distributed.init_process_group first")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = []
    for plan, q, k, v in batches:
        require(plan.ranks == size, "plan", f"{plan.ranks} ranks", f"the group's {size}")
        check_tensors(plan, q, k, v, len(plan.tokens[rank]))
        route = Route.of(plan, rank).to(q.device)
        counts = (
            (route.q_send_counts, route.q_receive_counts),
            (route.kv_send_counts, route.kv_receive_counts),
        )
        works: list = []
        rows = _rows(q)[route.q_send], torch.cat((_rows(k), _rows(v)), -1)[route.kv_send]
        sent.append((route, counts, works, _Exchange.apply(group, counts, works, *rows)))
    returned = []
    for (route, counts, works, (q_rows, kv_rows)), (_, q, k, v) in zip(sent, batches):
        _wait(works)
        out = _compute(route, q_rows, kv_rows, q, k, v, scale)
        back: list = []
        returned.append((back, _Exchange.apply(group, ((counts[0][1], counts[0][0]),), back, out)[0]))
    outs = []
    for (back, rows), (route, *_), (_, q, _, v) in zip(returned, sent, batches):
        _wait(back)
        outs.append(_heads(rows[route.out_order], q.shape[0], q.shape[1], v.shape[3]))
    return outs


def _wait(works: list) -> None:
    for work, _ in works:
        work.wait()


def _rows(x: Tensor) -> Tensor:
    """(B, H, t, D) -> (t, B * H * D)."""
    return x.permute(2, 0, 1, 3).flatten(1)


def _heads(rows: Tensor, batch: int, heads: int, dim: int) -> Tensor:
    """(t, B * H * D) -> (B, H, t, D)."""
    return rows.unflatten(1, (batch, heads, dim)).permute(1, 2, 0, 3)


def _compute(
    route: Route, q_rows: Tensor, kv_rows: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> Tensor:
    """The outputs (rows received, B * H * Dv) of this server's tasks."""
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    width = batch * kv_heads * k.shape[3]
    queries = _heads(q_rows, batch, heads, q.shape[3])
    keys, values = (
        _heads(part, batch, kv_heads, x.shape[3]) for part, x in ((kv_rows[:, :width], k), (kv_rows[:, width:], v))
    )
    parts, at = [], 0
    for task in route.tasks:
        index = route.kv_rows[task.doc][: task.kv_len]
        mine = queries[:, :, at : at + task.q_len]
        parts.append(_rows(attend(mine, keys[:, :, index], values[:, :, index], scale)))
        at += task.q_len
    if not parts:  # nothing to compute: still part of the graph, so that the backward meets the others
        return q_rows[:, :0].new_zeros(0, batch * heads * v.shape[3]) + q_rows.sum() * 0 + kv_rows.sum() * 0
    return torch.cat(parts)
