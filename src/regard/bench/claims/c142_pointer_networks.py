"""142 Pointer Networks: pointing at the input beats naming positions from a fixed list, and goes on working at other lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...models.pointer_network import NOTHING, PointerNetwork
from ...testbeds.geometry import convex_hull, shortest_tour, tour_length
from .claim import Outcome, Scale

PAPER, SLUG = "142", "pointer-networks"
SAYS = (
    "Pointer networks find convex hulls that sequence-to-sequence models of equal size do not, with one model for all lengths, "
    "also beyond those of training, and tours near the shortest ones."
)
EXACT = "hulls exactly right"
POOL = 300  # batches to train on, again and again


class _Fixed(PointerNetwork):
    """The same two LSTMs with a softmax over `most` fixed names in place of the pointer: plain sequence to sequence."""

    def __init__(self, dim: int, most: int) -> None:
        super().__init__(2, dim)
        self.names = nn.Linear(dim, most + 1)
        self.head = _Names(self.names)  # type: ignore[assignment]


class _Names(nn.Module):
    def __init__(self, names: nn.Linear) -> None:
        super().__init__()
        self.names = names

    def forward(self, states: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.names(states)[..., : places.shape[1]]
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def measure(scale: Scale) -> Outcome:
    dim, steps, most = scale.pick((64, 2000, 7), (8, 3, 5))
    longer, tours, batch = scale.pick(10, 6), scale.pick(5, 4), scale.pick(64, 8)
    out = Outcome(
        f"points uniform in a square, LSTMs of {dim} trained here for {steps} steps of {batch}; hulls of 5 to {most} points, then of "
        f"{longer}; shortest tours of {tours} points",
        "a batch of test points",
    )
    for label, net in (("pointer", PointerNetwork(2, dim)), ("fixed names", _Fixed(dim, longer))):
        _train(net, steps, batch, convex_hull, (5, most))
        out.add(label, EXACT, "share", [_exact(net, 5, seed) for seed in range(4)])
        if label == "pointer":
            out.add(f"{label}, {longer} points", EXACT, "share", [_exact(net, longer, seed) for seed in range(4)])
    lead = out.row("pointer", EXACT).mean - out.row("fixed names", EXACT).mean
    out.check("hulls exactly right, pointer above fixed names", lead, at_least=0.05)
    out.check("hulls exactly right with 5 points", out.row("pointer", EXACT).mean, at_least=0.5)
    beyond = out.row(f"pointer, {longer} points", EXACT).mean
    out.check(f"hulls exactly right with {longer} points, more than in training", beyond, at_least=0.05)

    net = PointerNetwork(2, dim)
    _train(net, steps, batch, shortest_tour, (tours, tours))
    points = _points(64, tours, 10**6)
    best = tour_length(points, shortest_tour(points))
    found = tour_length(points, net.decode(points, 4, "tour")[0])
    random = tour_length(points, torch.arange(tours).expand(len(points), -1))
    out.add("shortest", "tour length", "", best.mean().item())
    for label, length in (("pointer, beam of valid tours", found), ("in the order given", random)):
        out.add(label, "tour length", "", length.mean().item(), against="shortest")
    ratio = out.row("pointer, beam of valid tours", "tour length").ratio
    out.check("tour length, of the shortest", ratio or float("nan"), at_most=1.1)
    return out


def _points(batch: int, count: int, seed: int) -> Tensor:
    return torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(seed))


def _train(
    net: PointerNetwork, steps: int, batch: int, task: Callable[[Tensor], Tensor], counts: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    for weight in net.parameters():
        nn.init.uniform_(weight, -0.08, 0.08)
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(steps):
        count = counts[0] + step % (counts[1] - counts[0] + 1)
        if step % POOL not in made:  # exact answers are slow to make
            points = _points(batch, count, step)
            made[step % POOL] = points, task(points)
        loss = net.loss(*made[step % POOL])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimiser.step()


def _exact(net: PointerNetwork, count: int, seed: int) -> float:
    points = _points(64, count, 10**6 + seed)
    wanted, found = convex_hull(points), net.decode(points, 2)[0]
    most = max(wanted.shape[1], found.shape[1])
    wanted, found = (nn.functional.pad(t, (0, most - t.shape[1]), value=NOTHING) for t in (wanted, found))
    return float((wanted == found).all(1).float().mean())
