"""007 Consciousness prior: a bottleneck of few elements names what can be predicted; sparse factors find what belongs together."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...losses.consciousness import factor_contrast, key_usage_entropy, named_prediction
from ...nn.sequence.conscious_bottleneck import ConsciousBottleneck, ConsciousState, SparseFactorEnergy
from .claim import Outcome, Scale

PAPER, SLUG = "007", "consciousness"
SAYS = (
    "Consciousness prior (no experiments in the paper): predicting a future value that a low-dimensional attended state names makes "
    "attention pick predictable variables; without a diversity term it would settle on constant ones; the joint of high-level "
    "variables is a sparse factor graph."
)
WITH, WITHOUT = "with the usage entropy", "without it"
SPARSE, SOFT = "slots with an entropy penalty", "slots without"


def measure(scale: Scale) -> Outcome:
    count, k, steps, seeds = 12, 2, scale.pick(600, 4), scale.pick(3, 1)
    out = Outcome(
        f"{count} elements of which half are noise, {k} of them named at a time, {steps} steps; 12 binary variables with 4 pairs "
        "that agree nine times of ten",
        "a seed",
    )
    for label, weight in ((WITH, 1.0), (WITHOUT, 0.0)):
        found = [_naming(count, k, steps, weight, seed) for seed in range(seeds)]
        for figure, values in zip(("named elements that can be predicted", "entropy of what is named"), zip(*found)):
            out.add(label, figure, "share", list(values), against=WITH if label == WITHOUT else None)
    fits = scale.pick(600, 4)
    for label, weight in ((SPARSE, 0.1), (SOFT, 0.0)):
        found = [_factors(fits, weight, seed) for seed in range(seeds)]
        for figure, values in zip(("F1 of the pairs found", "entropy of a slot"), zip(*found)):
            out.add(label, figure, "", list(values), against=SPARSE if label == SOFT else None)

    def mean(label: str, figure: str) -> float:
        return out.row(label, figure).mean

    share, spread = "named elements that can be predicted", "entropy of what is named"
    out.check("named elements that can be predicted (chance 0.5)", mean(WITH, share), at_least=0.8)
    out.check("entropy of what is named, with the term (all predictable alike: 0.72)", mean(WITH, spread), at_least=0.5)
    out.check("entropy of what is named, without the term", mean(WITHOUT, spread), at_most=0.4)
    out.check("F1 of the pairs found, with the penalty", mean(SPARSE, "F1 of the pairs found"), at_least=0.8)
    gain = mean(SPARSE, "F1 of the pairs found") - mean(SOFT, "F1 of the pairs found")
    out.check("F1 of the pairs found, what the penalty adds", gain, at_least=0.1)
    return out


class _Thinker(nn.Module):
    """Elements (value, which one) -> a thought of k of them, and for each element a guess of its next value."""

    def __init__(self, count: int, k: int, dim: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(1 + count, dim)
        self.bottleneck = ConsciousBottleneck(dim, k)
        self.guess = nn.Sequential(nn.Linear(dim, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, values: Tensor) -> tuple[ConsciousState, Tensor]:
        which = torch.eye(values.shape[1]).expand(len(values), -1, -1)
        state = self.bottleneck(self.embed(torch.cat((values[..., None], which), dim=-1)))
        guesses = self.guess(state.values)[..., 0]  # of what is conscious alone
        return state, torch.zeros_like(values).scatter(1, state.indices, guesses)


def _world(count: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Values now and next: the first half turns its sign and shrinks or grows by a law of its own, the rest is drawn anew."""
    now = torch.randn(batch, count, generator=generator)
    law = -torch.linspace(0.6, 1.4, count)
    later = torch.where(torch.arange(count) < count // 2, law * now, torch.randn(batch, count, generator=generator))
    return now, later


def _naming(count: int, k: int, steps: int, weight: float, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = _Thinker(count, k)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        now, later = _world(count, 128, draw)
        state, guess = model(now)
        gates = state.gates()
        loss = named_prediction(guess, later, gates, std=0.5) - weight * key_usage_entropy(gates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # still in training mode: which one is named depends on the noise
        now, _ = _world(count, 2048, draw)
        gates = model(now)[0].gates()
        return float(gates[:, : count // 2].sum(1).mean()), float(key_usage_entropy(gates))


def _factors(steps: int, weight: float, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    count, pairs = 12, 4
    order = torch.randperm(count)
    truth = {frozenset((int(a), int(b))) for a, b in zip(order[:pairs], order[pairs : 2 * pairs])}
    energy = SparseFactorEnergy(count, 2 * pairs, 2, hidden=8)
    optimizer = torch.optim.Adam(energy.parameters(), lr=0.02)
    for step in range(steps):
        values = torch.randint(2, (256, count)) * 2.0 - 1.0
        agree = (torch.rand(256, pairs) < 0.9) * 2.0 - 1.0
        values[:, order[pairs : 2 * pairs]] = values[:, order[:pairs]] * agree
        loss = factor_contrast(energy, values) + weight * step / steps * energy.slot_entropy()  # grows: search first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = set(energy.scopes())
    right = len(found & truth)
    entropy = float(energy.slot_entropy().detach()) / math.log(count)
    return 2 * right / (len(found) + len(truth)), entropy
