"""Mixers side by side: the same small model at equal parameters, on recall and on text, and what each must carry while decoding.

Recall is multi-query associative recall (`regard.testbeds.tasks.mqar`): one training on a mixture of key counts, then accuracy for each.
Text is bytes. What is done is kept, training by training and within each, so that a stopped run goes on.
"""

from __future__ import annotations

import io
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name
from .._files import require_writable, write_whole
from ..models.small_lm import SmallLM
from ..nn.mixers import mixer_names
from ..testbeds import tasks
from ..testbeds.texts import ByteText
from ..testbeds.training import train
from .claims.claim import machine

__all__ = ["ROSTER", "Entry", "Settings", "build", "frontier", "measure", "picture"]

Report = dict[str, Any]
WAYS = ("recall", "text")


@dataclass(frozen=True)
class Entry:
    """What stands in one row: a mixer (or several, for a hybrid) with its options."""

    mixer: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


# Windows and budgets that are smaller than the sequences of this test, and widths that leave room for MLPs.
_OPTIONS: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 16},
    "dynamic_mask": {"keep": 16},
    "routing": {"num_clusters": 4, "window": 16, "block": 16},
    "combiner": {"segment": 8},
    "long_short": {"chunk": 8, "window": 16, "memory": 16},
    "qlstm": {"expansion": 1.0},
    "titans_lmm": {"depth": 1},
    "titans_mac": {"depth": 1, "segment": 16},
    "titans_mag": {"depth": 1, "window": 16},
    "titans_mal": {"depth": 1, "window": 16},
}
_EXTRA: dict[str, Entry] = {
    "sliding_window, 8": Entry(("sliding_window",), {"window": 8}),
    "linear, keys half": Entry(("linear",), {"key_dim": 0.5}),
    "linear, keys double": Entry(("linear",), {"key_dim": 2}),
    "linear + window": Entry(("linear", "sliding_window"), {"sliding_window": {"window": 16}}),
}


# Its estimator alone has more parameters than the whole model here, and is taught by a trained attention.
_LEFT_OUT = {"sparse_linear"}


def _roster() -> dict[str, Entry]:
    plain = {name: Entry((name,), _OPTIONS.get(name, {})) for name in mixer_names(True) if name not in _LEFT_OUT}
    return {**plain, **_EXTRA}


ROSTER: dict[str, Entry] = _roster()
"""Label -> what is measured: every causal mixer of the registry, and some more state sizes and hybrids."""


@dataclass(frozen=True)
class Settings:
    """What all rows share. Sizes of the model, of the two tasks, and how long is trained."""

    dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    mlp_ratio: float = 3.0
    short_conv: int = 3
    length: int = 64
    pairs: tuple[int, ...] = (4, 8, 16)
    vocab_size: int = 256
    batch: int = 32
    steps: int = 1500
    text_length: int = 128
    text_batch: int = 8
    text_steps: int = 600
    tests: int = 256
    lr: float = 3e-3

    @classmethod
    def quick(cls) -> Settings:
        """Seconds in all: shows that it runs, says nothing."""
        return cls(
            dim=16,
            length=32,
            pairs=(2, 4),
            vocab_size=32,
            batch=4,
            steps=2,
            text_length=32,
            text_batch=2,
            text_steps=2,
            tests=4,
        )


def build(entry: Entry, settings: Settings, vocab_size: int, seed: int = 0) -> SmallLM:
    """The model of a row: MLPs as wide as needed for the parameters that softmax attention has with `mlp_ratio`.

    A mixer that has more than that by itself keeps them, with MLPs of one unit.
    """

    def made(mixer: tuple[str, ...], options: Mapping[str, Any], hidden: float) -> SmallLM:
        options = {key: round(v * settings.dim) if key == "key_dim" else v for key, v in options.items()}
        torch.manual_seed(seed)
        return SmallLM(
            vocab_size, settings.dim, settings.num_layers, settings.num_heads, mixer, mixer_options=options or None,
            mlp_ratio=hidden / settings.dim, short_conv=settings.short_conv, max_len=max(settings.length, settings.text_length),
        )  # fmt: skip

    budget = _count(made(("softmax",), {}, settings.mlp_ratio * settings.dim))
    thin, wider = (_count(made(entry.mixer, entry.options, hidden)) for hidden in (1, 2))
    hidden = max(1, 1 + round((budget - thin) / (wider - thin)))
    return made(entry.mixer, entry.options, hidden)


def _count(model: SmallLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure(
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    seeds: int = 1,
    path: str | Path | None = None,
    on_row: Callable[[str, int, int], None] | None = None,
    progress: bool = False,
) -> Report:
    """Train and measure; {"settings", "machine", "results": {label: {"parameters", "state_bytes", "holds_all", "recall", "text", ...}}}.

    names: labels of `ROSTER` (default all). seeds: trainings of each, the same data for every row.
    path: a JSON file, rewritten after every training; one with the same settings is gone on with. Beside it, `<path>.work/` holds the
        training in hand. on_row: told (what is trained, which of, how many) when a training begins.

    "recall": {pairs: [accuracy a seed]}; "text": [bits a byte, a seed]. "state_bytes": after `length` tokens of one sequence; a mixer
    without a state is counted with the inputs of its layers, all of which it must keep ("holds_all"). A row that could not be trained
    has "error" in place of figures.
    """
    settings = settings or Settings()
    require_int("seeds", seeds, 1)
    labels = list(ROSTER) if names is None else [require_name("names", name, ROSTER) for name in names]
    require(bool(labels), "names", names, "at least one label")
    asked = json.loads(json.dumps(asdict(settings)))
    report: Report = {"settings": asked, "machine": machine(), "results": {}}
    if path is not None:
        path = require_writable(path)
        report = _earlier(path, asked) if path.exists() else report
    wanted = [(seed, label, way) for seed in range(seeds) for label in labels for way in WAYS]
    for number, (seed, label, way) in enumerate(wanted):
        row = report["results"].setdefault(label, {})
        if "error" in row or _done(row, way) > seed:
            continue
        if on_row is not None:
            on_row(f"{label}, {way}", number, len(wanted))
        work = (
            None if path is None else path.with_name(path.name + ".work") / f"{seed}-{way}-{_plain(label)}.safetensors"
        )
        try:
            _train_row(row, ROSTER[label], way, seed, settings, work, progress)
        except (ArithmeticError, RuntimeError, ValueError, TypeError) as error:
            row["error"] = f"{type(error).__name__}: {error}"
        if path is not None:
            write_whole(path, json.dumps(report, indent=1) + "\n")
        if work is not None:
            for file in (work, work.with_name(work.name + ".state")):
                file.unlink(missing_ok=True)
    return report


def _plain(label: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "-" for c in label)


def _done(row: Mapping[str, Any], way: str) -> int:
    return len(row.get("text", []) if way == "text" else next(iter(row.get("recall", {}).values()), []))


def _earlier(path: Path, settings: Mapping[str, Any]) -> Report:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        same = report["settings"] == settings and isinstance(report["results"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise bad_value("path", str(path), "a file that this command wrote, or none") from error
    require(same, "path", str(path), f"a report with the same settings ({settings}), or another file")
    return report


def _train_row(
    row: dict[str, Any], entry: Entry, way: str, seed: int, settings: Settings, work: Path | None, progress: bool
) -> None:
    began = time.perf_counter()
    text = ByteText() if way == "text" else None
    model = build(entry, settings, 256 if text is not None else settings.vocab_size, seed)
    if text is not None:
        made = text.batches(settings.text_batch, settings.text_length, seed)
    else:
        made = _recall_batches(settings, seed)
    steps = settings.steps if text is None else settings.text_steps
    train(model, made, steps=steps, lr=settings.lr, out=work, save_every=300, seed=seed, progress=progress, label=way)
    model.eval()
    if text is not None:
        row.setdefault("text", []).append(_bits(model, text, settings))
    else:
        for pairs in settings.pairs:
            row.setdefault("recall", {}).setdefault(str(pairs), []).append(_recalled(model, pairs, settings))
        held = model.state_nbytes(settings.length)
        row["parameters"], row["holds_all"] = _count(model), held is None
        # without a state: the whole input of every layer, to be read again
        row["state_bytes"] = settings.num_layers * settings.length * settings.dim * 4 if held is None else held
    row.setdefault("seconds", {}).setdefault(way, []).append(round(time.perf_counter() - began, 1))


def _recall_batches(settings: Settings, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of the key counts in turn."""
    makes = [
        tasks.batches(tasks.mqar, settings.batch, settings.length, pairs, settings.vocab_size, seed=seed)
        for pairs in settings.pairs
    ]
    return lambda number: makes[number % len(makes)](number)


@torch.no_grad()
def _recalled(model: SmallLM, pairs: int, settings: Settings) -> float:
    drawn = torch.Generator().manual_seed(2**40 + pairs)  # no training batch has such a seed
    found = []
    for _ in range(max(1, settings.tests // 64)):
        ids, labels = tasks.mqar(min(64, settings.tests), settings.length, pairs, settings.vocab_size, generator=drawn)
        found.append(tasks.accuracy(model(ids), labels))
    return statistics.fmean(found)


@torch.no_grad()
def _bits(model: SmallLM, text: ByteText, settings: Settings) -> float:
    losses = []
    for ids in text.held_out(max(2, settings.tests // 4), settings.text_length + 1).split(16):
        losses.append(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean()) / math.log(2)


def recall_of(row: Mapping[str, Any]) -> float:
    """Mean over key counts and seeds; NaN where nothing was measured."""
    values = [value for found in row.get("recall", {}).values() for value in found]
    return statistics.fmean(values) if values else math.nan


def frontier(report: Report) -> list[str]:
    """Labels that no other betters in recall without carrying more, by rising state bytes."""
    rows = [
        (row["state_bytes"], -recall_of(row), label)
        for label, row in report["results"].items()
        if "state_bytes" in row and math.isfinite(recall_of(row))
    ]
    best, front = -math.inf, []
    for _, lost, label in sorted(rows):
        if -lost > best:
            best = -lost
            front.append(label)
    return front


def _write_labels(axis: Any, places: Mapping[str, tuple[float, float]], size: float = 7.0) -> None:
    """Each label beside its point, as far down as it must so that no two lie on one another."""
    taken: list[tuple[float, float, float]] = []
    scale = 72 / axis.figure.dpi
    for label, place in sorted(places.items(), key=lambda item: (-item[1][1], item[1][0])):
        if not math.isfinite(place[1]):
            continue
        x, y = (float(value) * scale for value in axis.transData.transform(place))
        width, drop, right = 0.58 * size * len(label), 0, True
        while True:
            left = x + 4 if right else x - 4 - width
            base = y + 3 - drop
            if not any(left < end and begin < left + width and abs(base - line) < size for begin, end, line in taken):
                break
            drop, right = (drop, False) if right else (drop + 1, True)  # to the left of the point before further down
        taken.append((left, left + width, base))
        side = {"xytext": (4, 3 - drop), "ha": "left"} if right else {"xytext": (-4, 3 - drop), "ha": "right"}
        axis.annotate(label, place, textcoords="offset points", fontsize=size, **side)


def picture(report: Report) -> bytes:
    """Recall against state bytes as PNG: hollow points keep every token, the line joins those that no other betters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    rows = {label: row for label, row in report["results"].items() if "state_bytes" in row}
    for row in rows.values():
        color = "C1" if row["holds_all"] else "C0"
        hollow = "none" if row["holds_all"] else color
        axis.scatter(row["state_bytes"], recall_of(row), s=28, facecolors=hollow, edgecolors=color, zorder=2)
    front = [rows[label] for label in frontier(report)]
    axis.plot(
        [r["state_bytes"] for r in front], [recall_of(r) for r in front], drawstyle="steps-post", color="0.7", zorder=1
    )
    length = report["settings"]["length"]
    axis.set(
        xscale="log",
        xlabel=f"bytes carried while decoding, after {length} tokens",
        ylabel="recall, mean over key counts",
    )
    axis.grid(alpha=0.25)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()
    _write_labels(axis, {label: (row["state_bytes"], recall_of(row)) for label, row in rows.items()})
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
