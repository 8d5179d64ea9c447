"""179 PTR: answers learned with weaker thoughts before them, masked in the loss or not, over rounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...losses.masked_lm import MaskedCollator
from ...models.small_lm import SmallLM
from ...testbeds.training import masked_token_loss, train
from .claim import Outcome, Scale

PAPER, SLUG = "179", "ptr"
SAYS = (
    "PTR: fine-tuned on final answers with weaker thoughts before them, whose tokens the loss leaves out, a model's answers get better "
    "from round to round; plain fine-tuning on the same data does not do that."
)
ACCURACY = "right answers"
ROUNDS = 3
_MASKED, _PLAIN, _BASE = "thoughts masked", "thoughts learned", "answers alone, no thoughts"


def measure(scale: Scale) -> Outcome:
    base, steps, dim, seeds = scale.pick((11, 700, 64, 2), (5, 3, 16, 1))
    out = Outcome(
        f"sums of two numbers modulo {base}, with none to two thoughts each, of which the first is one too high 4 times in 5 and the "
        f"second every other time; two layers of width {dim} trained from nothing for {steps} steps",
        "seed",
    )
    found: dict[str, list[list[float]]] = {_PLAIN: [], _MASKED: [], _BASE: []}
    for seed in range(seeds):
        for label in found:
            found[label].append(_train(label, base, steps, dim, seed, scale.pick(1024, 32)))
    for number in range(ROUNDS):
        for label, runs in found.items():
            against = None if label == _PLAIN else _PLAIN
            out.add(f"{label}, round {number + 1}", ACCURACY, "share", [run[number] for run in runs], None)
            if against:
                gain = [run[number] - other[number] for run, other in zip(runs, found[_PLAIN])]
                out.add(f"{label}, round {number + 1}, above {_PLAIN}", "difference", "share", gain)
    mean = lambda label, number: out.row(f"{label}, round {number}", ACCURACY).mean  # noqa: E731
    out.check("first answers right, thoughts masked above learned", mean(_MASKED, 1) - mean(_PLAIN, 1), at_least=0.1)
    out.check("last answers right, thoughts masked above learned", mean(_MASKED, 3) - mean(_PLAIN, 3), at_least=0.0)
    out.check(
        "thoughts masked, last answers right above first", mean(_MASKED, 3) - mean(_MASKED, 1), at_least=0.0, digits=3
    )
    return out


def _records(base: int, label: str, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """Tokens: numbers, then "=" and "again". A thought and an answer follow "=", "again" leads to the next."""
    equals, again = base, base + 1
    collate = MaskedCollator(pad=equals)

    def make(number: int) -> dict[str, Tensor]:
        drawn = torch.Generator().manual_seed(seed * 1_000_003 + number)
        terms = torch.randint(base, (64, 2), generator=drawn)
        chance = torch.rand(64, 2, generator=drawn) < torch.tensor([0.8, 0.5])
        count = torch.randint(3, (64,), generator=drawn)
        samples = []
        for row in range(64):
            right = int(terms[row].sum()) % base
            parts: list[tuple[list[int], float]] = [([*terms[row].tolist(), equals], 0.0)]
            for place in range(0 if label == _BASE else int(count[row])):
                thought = (right + int(chance[row, place])) % base  # a weak writer errs in one way
                parts += [([thought], float(label == _PLAIN)), ([again, equals], 0.0)]
            samples.append([*parts, ([right], 1.0)])
        return collate(samples)

    return make


def _train(label: str, base: int, steps: int, dim: int, seed: int, tests: int) -> list[float]:
    torch.manual_seed(seed)
    model = SmallLM(base + 2, dim, 2, 4, "softmax", mlp_ratio=4)
    train(model, _records(base, label, seed), steps=steps, loss=masked_token_loss, lr=3e-3, progress=False, seed=seed)  # type: ignore[arg-type]
    model.eval()
    terms = torch.randint(base, (tests, 2), generator=torch.Generator().manual_seed(2**40 + seed))
    right, ids = terms.sum(1) % base, torch.cat([terms, torch.full((tests, 1), base)], 1)
    found = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            answer = model(ids)[:, -1, :base].argmax(-1)
            found.append(float((answer == right).float().mean()))
            ids = torch.cat([ids, answer[:, None], torch.tensor([[base + 1, base]]).expand(tests, -1)], 1)
    return found
