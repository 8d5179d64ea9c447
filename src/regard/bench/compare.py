"""`regard compare`: methods attached in turn to one model, on the same prompts, in one run, beside dense attention."""

from __future__ import annotations

import json
import math
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._checks import require, require_int, require_name
from .._files import require_writable, write_whole
from ..integrations.transformers import attach
from ..methods.call import Method
from .prompts import ASKED, English, Words, prompts_for
from .tasks import Reading, divergence, loss_by_position, read

TASKS = ("ppl", "needle", "agreement", "positions", "chat", *ASKED)
DEFAULT_TASKS = ("ppl", "needle", "agreement")
DEPTHS = (0.1, 0.5, 0.9)
PARTS = 4  # the `positions` task tells the perplexity of each quarter of the prompt

COLUMNS: dict[str, tuple[str, str, bool]] = {
    "prompt_ppl": ("perplexity of the prompt (its second half)", "ppl", False),
    "decode_ppl": ("perplexity of the decoded continuation", "ppl", False),
    "needle": ("log-probability of the hidden needle, mean over depths", "nats", True),
    "chat": ("needle in a user's message under the chat template: log-probability, mean over depths", "nats", True),
    "recall": ("several keys asked for after the prompt: log-probability of an answer", "nats", True),
    "tracking": (
        "value at the end of a chain of assignments, asked for after the prompt: log-probability",
        "nats",
        True,
    ),
    "aggregation": (
        "most frequent words of a list, asked for after the prompt: log-probability of a token",
        "nats",
        True,
    ),
    "hits": ("share of the answers' tokens of these tasks that are the most probable ones", "", True),
    "kl": ("KL divergence from dense, next token while decoding", "nats", False),
    "prefill_seconds": ("prefill time", "s", False),
    "decode_tokens_per_second": ("decoding speed", "tokens/s", True),
    "kv_bytes": ("peak KV cache", "bytes", False),
}
"""Measured figure -> (what it is, unit, whether more is better)."""


@dataclass
class Settings:
    """What is compared on what; two runs with equal settings may be joined by `--resume`."""

    model: str
    context: int = 1024
    decode: int = 32
    repeats: int = 2
    tasks: tuple[str, ...] = DEFAULT_TASKS
    budget: int | float | tuple[int | float, ...] = 0.25
    depths: tuple[float, ...] = DEPTHS

    def __post_init__(self) -> None:
        require_int("context", self.context, 64)
        require_int("decode", self.decode, 2)
        require_int("repeats", self.repeats, 1)
        require(len(self.tasks) > 0, "tasks", self.tasks, f"some of {', '.join(TASKS)}")
        for task in self.tasks:
            require_name("task", task, TASKS)
        require(len(self.budgets) > 0, "budget", self.budget, "at least one budget")
        for budget in self.budgets:
            fits = budget >= 1 if isinstance(budget, int) else 0.0 < budget <= 1.0
            require(fits, "budget", budget, "tokens (int >= 1) or a fraction (float in (0, 1])")

    @property
    def budgets(self) -> tuple[int | float, ...]:
        return tuple(self.budget) if isinstance(self.budget, (tuple, list)) else (self.budget,)


@dataclass
class Comparison:
    """Everything measured so far. `units` are single measurements, keyed "label/task/repeat"; `skipped` says why a method is out."""

    settings: dict[str, Any]
    machine: dict[str, str]
    labels: list[str]
    descriptions: dict[str, str] = field(default_factory=dict)
    units: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # what a method warned of
    finished: bool = False

    # Figures

    def values(self, label: str, figure: str) -> list[float]:
        """One value a repeat, in order of repeats."""
        found = [u[figure] for k, u in sorted(self.units.items()) if k.rsplit("/", 2)[0] == label and figure in u]
        return [value for value in found if not math.isnan(value)]

    def mean(self, label: str, figure: str) -> float | None:
        values = self.values(label, figure)
        return statistics.fmean(values) if values else None

    def ratio(self, label: str, figure: str) -> tuple[float, float] | None:
        """Mean and spread (half the range over the repeats) of the ratio to dense, repeat by repeat."""
        pairs = list(zip(self.values(label, figure), self.values("dense", figure)))
        if not pairs or any(dense == 0 for _, dense in pairs):
            return None
        ratios = [value / dense for value, dense in pairs]
        return statistics.fmean(ratios), (max(ratios) - min(ratios)) / 2

    def as_json(self) -> str:
        table = {
            label: {
                figure: {
                    "mean": mean,
                    "values": self.values(label, figure),
                    "ratio": ratio[0] if ratio else None,
                    "spread": ratio[1] if ratio else None,
                }
                for figure in COLUMNS
                if (mean := self.mean(label, figure)) is not None
                for ratio in [self.ratio(label, figure)]
            }
            for label in self.labels
            if label not in self.skipped
        }
        return json.dumps({**asdict(self), "table": table}, indent=1)

    def save(self, path: Path) -> None:
        write_whole(path, self.as_json())

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """A comparison that `save` wrote. A file that is none gives a `ValueError` naming it."""
        try:
            data = json.loads(path.read_text())
            data.pop("table")
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"resume: {str(path)!r} is not a comparison that `regard compare` wrote ({error})"
            ) from None


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    import transformers

    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def compare(
    model: Any,
    tokenizer: Any,
    methods: list[tuple[str, Method]],
    settings: Settings,
    *,
    path: Path | None = None,
    resume: bool = False,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Comparison:
    """Measure `methods`, dense first, and return what came out.

    Args:
        model, tokenizer: a causal language model of transformers.
        methods: (label, method) pairs; a pair labelled "dense" is put first, and added when missing.
        settings: what to measure on.
        path: where to keep the result as JSON, rewritten whole after every measurement, so that nothing measured is ever lost.
        resume: go on from what `path` holds; its settings must be equal.
        progress: called with (label, done, total).
    """
    from ..methods import Dense

    methods = [("dense", Dense())] + [(label, method) for label, method in methods if label != "dense"]
    labels = [label for label, _ in methods]
    prompts = prompts_for(tokenizer)
    for task in settings.tasks:
        require_name("task", task, prompts.tasks)
    require(len(set(labels)) == len(labels), "methods", labels, "each at most once (give variants different options)")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        need = f"context + decode <= {limit}, the model's positions"
        require(settings.context + settings.decode <= limit, "context", settings.context, need)
    result = Comparison(json.loads(json.dumps(asdict(settings))), machine(), labels, {k: repr(m) for k, m in methods})
    if path is not None:
        require_writable(path)
        result = _resumed(result, path) if resume else result
        if not resume and path.is_file():
            path.replace(path.with_suffix(path.suffix + ".old"))
    jobs = list(_jobs(methods, settings))
    dense: dict[int, torch.Tensor] = {}
    for number, (label, method, task, repeat) in enumerate(jobs):
        key = f"{label}/{task}/{repeat}"
        progress(label, number, len(jobs))
        if label in result.skipped or (key in result.units and not (label == "dense" and task == "text")):
            continue
        try:
            with warnings.catch_warnings(record=True) as warned:
                unit, reading = _measure(model, prompts, method, settings, task, repeat)
            for warning in warned:
                if warning.category is UserWarning:
                    result.notes.setdefault(label, str(warning.message))
        except (ValueError, TypeError) as error:
            if label == "dense":
                raise
            result.skipped[label] = str(error)
            unit, reading = None, None
        if unit is not None:
            if task == "text" and reading is not None and "agreement" in settings.tasks:
                if label == "dense":
                    dense[repeat] = reading.log_probs
                unit["kl"] = divergence(dense[repeat], reading.log_probs) if repeat in dense else math.nan
            result.units.setdefault(key, unit)
        if path is not None:
            result.save(path)
    result.finished = True
    progress("", len(jobs), len(jobs))
    if path is not None:
        result.save(path)
    return result


def _resumed(fresh: Comparison, path: Path) -> Comparison:
    old = Comparison.load(path)
    for name in ("settings", "descriptions"):
        was, now = getattr(old, name), getattr(fresh, name)
        changed = [key for key in now if key in was and was[key] != now[key]] + [
            key for key in now if key not in was and name == "settings"
        ]
        if changed:
            raise ValueError(
                f"resume: {path} was measured with {changed[0]}={was.get(changed[0])!r}, this run has {now[changed[0]]!r}"
            )
    fresh.units = old.units
    return fresh


def _jobs(methods: list[tuple[str, Method]], settings: Settings) -> Iterator[tuple[str, Method, str, int]]:
    """Round-robin over the methods within each repeat, so that a machine that drifts drifts for all of them."""
    for repeat in range(settings.repeats):
        for task in ("text", *(task for task in settings.tasks if task in ("needle", "positions", "chat", *ASKED))):
            for label, method in methods:
                yield label, method, task, repeat


def _measure(
    model: Any, prompts: English | Words, method: Method, settings: Settings, task: str, repeat: int
) -> tuple[dict[str, float], Reading | None]:
    unit: dict[str, float]
    whole = {"user": torch.ones(1, settings.context, dtype=torch.bool)}  # what is not chat is all the user's words
    with attach(model, method, spans=whole) as session:
        if task == "chat":
            unit = {}
            for depth in settings.depths:
                talk = prompts.chat(settings.context, depth, repeat)
                session.spans = dict(talk.spans)
                unit[f"chat@{depth:g}"] = read(model, talk.prompt, talk.answer).answer_log_prob
            unit["chat"] = statistics.fmean(unit.values())
            return unit, None
        if task == "needle":
            unit = {}
            for depth in settings.depths:
                prompt, answer = prompts.needle(settings.context, depth, repeat)
                unit[f"needle@{depth:g}"] = read(model, prompt, answer).answer_log_prob
            unit["needle"] = statistics.fmean(unit.values())
            return unit, None
        if task in ASKED:
            return _asked(model, prompts, settings, task, repeat), None
        if task == "positions":
            window = prompts.windows(settings.context, settings.repeats)[repeat]
            losses = loss_by_position(model, window, PARTS)
            return {f"ppl@{part + 1}/{PARTS}": math.exp(loss) for part, loss in enumerate(losses)}, None
        window = prompts.windows(settings.context + settings.decode, settings.repeats)[repeat]
        if repeat == 0:  # the first call of a kernel pays for its set-up
            read(model, window[:64], window[64:67])
        reading = read(model, window[: settings.context], window[settings.context :])
    unit = {
        "prefill_seconds": reading.prefill_seconds,
        "decode_tokens_per_second": 1.0 / reading.decode_seconds,
        "kv_bytes": float(reading.kv_bytes),
    }
    if "ppl" in settings.tasks:
        unit |= {"prompt_ppl": math.exp(reading.prompt_nll), "decode_ppl": math.exp(reading.decode_nll)}
    return unit, reading


def _asked(model: Any, prompts: English | Words, settings: Settings, task: str, repeat: int) -> dict[str, float]:
    given = prompts.asked(task, settings.context, repeat)
    log_probs = read(model, given.prompt, given.continuation).log_probs
    told = torch.tensor(given.answers)
    token = torch.tensor(given.continuation)
    own = log_probs.gather(1, token[:, None])[told, 0]
    hits = (log_probs.argmax(-1) == token)[told].float().mean()
    return {task: float(own.mean()), f"{task} hits": float(hits), "hits": float(hits)}
