"""089 DistCA: attention as tasks is even where documents are not, at the price of traffic; two servers measured, 512 ranks simulated.

In this room because claims may not import upwards; `regard.bench.claims` names it by its path.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bench.claims.claim import Outcome, Scale
from ..bench.claims.timing import times
from ..bench.cost import DEVICES, MODELS
from .execute import run_plan
from .placement import place_documents
from .plan import Plan
from .planner import balance
from .servers import AttentionServers
from .simulate import sample_documents, simulate

PAPER, SLUG = "089", "distca"
SAYS = (
    "DistCA: attention without parameters can be cut into tasks by tokens and computed anywhere, so that its load is even over devices "
    "whatever the documents' lengths, at a communication that hides behind computation (up to 1.35 times the training throughput)."
)
ONE = "disaggregated, one task at a time"
IMBALANCE, TIME = "largest load over the mean", "attention of a batch, forward"
SIZES: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}


def measure(scale: Scale) -> Outcome:
    out = Outcome(
        "lengths with a long tail: 8 ranks, 512 simulated devices; two server processes of one thread each", "a round"
    )
    _balance(out)
    _simulated(out, scale)
    _measured(out, scale)
    return out


def _balance(out: Outcome) -> None:
    """Eight ranks, documents up to 64k tokens: load and traffic for tolerances."""
    ranks, budget = 8, 32768
    lengths = sample_documents(ranks * budget, 65536, seed=0)
    placed = place_documents(lengths, ranks, budget)
    before = Plan.of(placed, placed, ranks, **SIZES)
    out.add("8 ranks, in order", IMBALANCE, "", before.imbalance)
    for tolerance in (0.2, 0.1, 0.0):
        plan = Plan.of(placed, balance(placed, ranks, tolerance=tolerance, **SIZES), ranks, **SIZES)
        label = f"8 ranks, tolerance {tolerance:g}"
        out.add(label, IMBALANCE, "", plan.imbalance, against="8 ranks, in order")
        out.add(label, "elements that travel", "1e6", float(plan.traffic.sum()) / 1e6)
    out.check("8 ranks, tolerance 0: largest load over the mean", plan.imbalance, at_most=1.01)


def _simulated(out: Outcome, scale: Scale) -> None:
    """512 devices, eight of which share every layer (tensor parallel) and are one rank, as in the paper's runs."""
    devices, tokens = scale.pick((512, 16384), (128, 8192))
    ranks, budget = devices // 8, tokens * 8
    lengths = sample_documents(ranks * budget, 524288, seed=0)
    device = DEVICES["h100"].together(8)
    found = simulate(lengths, ranks, budget, shape=MODELS["llama-3-8b"], device=device, tolerances=(0.1,))
    order, packed, released, both = found
    first = f"{devices} devices, in order"
    for one in found:
        label = f"{devices} devices, {one.way}"
        out.add(label, IMBALANCE, "", one.imbalance)
        out.add(label, "a layer, simulated", "ms", one.seconds * 1e3, against=None if one is order else first)
    out.check(
        f"{devices} simulated devices: time of a layer over in order", released.seconds / order.seconds, at_most=0.74
    )
    out.check("bytes that travel over packing by workload", released.moved / packed.moved, at_most=1.0)
    busy = released.attention + released.linear
    out.check("travel of the busiest rank over computation", released.travel / busy, at_most=1.0)
    out.note = (
        f"Simulated by the cost model. Largest load {order.imbalance:.2f} of the mean in order, {released.imbalance:.2f} with the released "
        f"planner at tolerance 0.1 (it only fills what is lacking), {both.imbalance:.2f} bounded on both sides. Without tensor parallelism "
        "travel does not hide: `regard scale simulate --shared 1`."
    )


def _measured(out: Outcome, scale: Scale) -> None:
    """Two servers: the slowest decides, so that the wall time follows the largest load; the result is the same."""
    lengths = scale.pick([4096, 512, 512, 512, 512, 512, 512, 512, 512], [256, 64, 64, 64, 64])
    ranks, budget = 2, sum(lengths) // 2
    placed = place_documents(lengths, ranks, budget)
    plans = {
        "attention where the tokens are": Plan.of(placed, placed, ranks, **SIZES),
        "attention disaggregated": Plan.of(placed, balance(placed, ranks, tolerance=0.0, **SIZES), ranks, **SIZES),
    }
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 64, generator=generator) for heads in (8, 2, 2))
    first, second = plans
    with AttentionServers(2, timeout=60.0) as pool:

        def run(plan: Plan, ahead: int = 2) -> Tensor:
            pool.ahead = ahead  # tasks that a server has been sent before it answers the first
            return run_plan(plan, q, k, v, servers=pool)

        apart = float((run(plans[first]) - run(plans[second])).abs().max())
        runs = {label: partial(run, plan) for label, plan in plans.items()}
        runs[ONE] = partial(run, plans[second], 1)
        took = times(runs, scale.pick(5, 1), scale.pick(3, 1))
    for label, plan in plans.items():
        out.add(f"two servers, {label}", IMBALANCE, "", plan.imbalance)
        against = None if label == first else f"two servers, {first}"
        out.add(f"two servers, {label}", TIME, "s", took[label], against=against)
    alone = out.add(f"two servers, {ONE}", TIME, "s", took[ONE], against=f"two servers, {second}")
    row = out.row(f"two servers, {second}", TIME)
    promised = plans[second].imbalance / plans[first].imbalance
    out.check(
        f"two servers: time disaggregated over in place (by the loads alone {promised:.2f})",
        row.ratio or 0.0,
        at_most=0.9,
        spread=row.spread,
    )
    out.check(
        "two servers: time without overlap over that with it (a task's successor travels while it is computed)",
        alone.ratio or 0.0,
        at_least=1.0,
        spread=alone.spread,
    )
    out.check("largest difference of the two results", apart, at_most=1e-5)
