"""049 Titans: needles found in texts four times as long as those trained on, beside attention, a window of it, and RAT at equal size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...testbeds import tasks
from ...testbeds.training import train
from ..mixers import Entry, Settings, build
from .claim import Outcome, Scale

PAPER, SLUG = "049", "titans"
SAYS = (
    "Titans: with a memory that learns at test time, needles are found in texts far longer than those trained on, more often than by "
    "Transformers and linear recurrent models, at a state that does not grow."
)
SOFTMAX, WINDOW, RAT, SHORT, MAC, MAG = (
    "softmax",
    "sliding window",
    "RAT",
    "RAT, chunks of 2",
    "Titans (MAC)",
    "Titans (MAG)",
)
WORDS, NOISE, PAIRS = 64, 32, 4


def needles(batch: int, length: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Four keys with their values at the start, noise of other words, and each key asked for once, anywhere behind."""
    ids, labels = tasks.mqar(batch, length, PAIRS, WORDS, power=1.0, generator=generator)
    noise = torch.randint(WORDS, WORDS + NOISE, ids.shape, generator=generator)
    return torch.where(ids == 0, noise, ids), labels


def measure(scale: Scale) -> Outcome:
    length, near, steps, dim = scale.pick((32, 8, 700, 64), (16, 4, 2, 16))
    out = Outcome(
        f"two layers of width {dim}, about equal in parameters, trained here for {steps} steps to find {PAIRS} needles in {length} words; "
        f"windows, segments and chunks of {near}",
        "a test batch",
    )
    settings = Settings(
        dim=dim, num_heads=2, mlp_ratio=5.0, short_conv=3, length=4 * length, text_length=4 * length, batch=32, lr=4e-3
    )
    memory: dict[str, Any] = {"depth": 1, "chunk_size": near}
    entries = {
        SOFTMAX: Entry(("softmax",)),
        WINDOW: Entry(("sliding_window",), {"window": near}),
        RAT: Entry(("rat",), {"chunk_size": near}),
        SHORT: Entry(("rat",), {"chunk_size": 2}),
        MAC: Entry(("titans_mac",), {"segment": near, **memory}),
        MAG: Entry(("titans_mag",), {"window": near, **memory}),
    }
    sizes = {f"{times} times the length": times * length for times in (1, 2, 4)}
    for label, entry in entries.items():
        model = build(entry, settings, WORDS + NOISE)
        train(
            model, tasks.batches(needles, settings.batch, length, seed=1), steps=steps, lr=settings.lr, progress=False
        )
        model.eval()
        against = None if label == SOFTMAX else SOFTMAX
        for figure, size in sizes.items():
            out.add(label, f"needles found, {figure}", "share", _found(model, size, scale.pick(4, 1)), against=against)
        out.add(label, "bytes kept, 4 times the length", "", model.state_nbytes(4 * length) or 0, against=against)
        out.add(label, "parameters", "", sum(one.numel() for one in model.parameters()), against=against)

    def found(label: str, times: int) -> float:
        return out.row(label, f"needles found, {times} times the length").mean

    far = "needles found at 4 times the length"
    for label in (MAC, MAG):
        out.check(f"{far}, {label}: of those at 1 time", found(label, 4) / max(found(label, 1), 1e-9), at_least=0.8)
        out.check(f"{far}, {label}: above a sliding window", found(label, 4) - found(WINDOW, 4), at_least=0.2)
        out.check(f"{far}, {label}: above softmax attention", found(label, 4) - found(SOFTMAX, 4), at_least=0.0)
    for label in (RAT, SHORT):
        out.check(f"{far}, {label}: above a sliding window", found(label, 4) - found(WINDOW, 4), at_least=0.2)
    out.note = (
        "One training each; softmax attention and RAT have rotary positions, Titans' memory has none. The four needles stand side by "
        "side: RAT's chunk of 8 keeps them in one state, chunks of 2 were added after that was seen."
    )
    return out


@torch.no_grad()
def _found(model: torch.nn.Module, size: int, batches: int) -> list[float]:
    found = []
    for number in range(batches):
        ids, labels = needles(64, size, torch.Generator().manual_seed(10**9 + number))
        found.append(tasks.accuracy(model(ids), labels))
    return found
