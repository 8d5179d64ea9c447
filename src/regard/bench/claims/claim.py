"""What every measured claim is made of: figures, checks of them against what the paper says, and the file they are kept in."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..._checks import bad_value, require
from ..._files import write_whole

HOLDS, FAILS, PARTLY = "holds", "does not hold", "holds in part"


@dataclass
class Row:
    """One figure of one thing measured.

    Attributes:
        label: what was measured ("dense", "half the heads streaming"). figure: which figure of it. unit: of the values.
        values: one a repeat (a prompt, a layer, a round of timing: `Outcome.repeats` says what).
        against: label of the baseline, measured in the same run. ratios: to it, repeat by repeat.
    """

    label: str
    figure: str
    unit: str
    values: list[float]
    against: str | None = None
    ratios: list[float] | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def ratio(self) -> float | None:
        return statistics.fmean(self.ratios) if self.ratios else None

    @property
    def spread(self) -> float | None:
        """Half the range of the ratios over the repeats."""
        return (max(self.ratios) - min(self.ratios)) / 2 if self.ratios else None


@dataclass
class Check:
    """One statement of the paper as a number with a bound: it holds or it does not."""

    what: str
    value: float
    need: str
    holds: bool
    spread: float | None = None
    digits: int = 2

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {number(self.spread, self.digits)}"
        return f"{self.what} {number(self.value, self.digits)}{spread} ({'' if self.holds else 'NOT '}{self.need})"


@dataclass
class Outcome:
    """What a claim's `measure` gives back.

    Attributes:
        setting: in a few words, on what it was measured. repeats: what one value of a row is.
        rows, checks: see there. note: what else a reader should know of this measurement.
    """

    setting: str
    repeats: str = "round"
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    note: str = ""

    def add(
        self, label: str, figure: str, unit: str, values: Sequence[float] | float, against: str | None = None
    ) -> Row:
        """Add a row; with `against`, its ratios to the row of that label with the same figure, which must be there."""
        listed = [float(value) for value in ([values] if isinstance(values, (int, float)) else values)]
        require(bool(listed), "values", values, "at least one number")
        row = Row(label, figure, unit, listed, against)
        if against is not None:
            base = self.row(against, figure).values
            require(
                len(base) == len(listed), "values", f"{len(listed)} values", f"{len(base)} like those of {against!r}"
            )
            row.ratios = [value / other for value, other in zip(listed, base)] if all(base) else None
        self.rows.append(row)
        return row

    def row(self, label: str, figure: str) -> Row:
        for row in self.rows:
            if (row.label, row.figure) == (label, figure):
                return row
        raise bad_value("label", f"{label} / {figure}", f"one of {[(row.label, row.figure) for row in self.rows]}")

    def check(
        self,
        what: str,
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        spread: float | None = None,
        digits: int = 2,
    ) -> Check:
        """Hold `value` to a bound; exactly one of `at_most`, `at_least`."""
        if (at_most is None) == (at_least is None):
            raise bad_value("at_most, at_least", (at_most, at_least), "exactly one of them")
        bound, sign = (at_most, "≤") if at_most is not None else (at_least, "≥")
        assert bound is not None
        holds = value <= bound if at_most is not None else value >= bound  # false for NaN either way
        made = Check(what, float(value), f"{sign} {number(bound, digits)}", bool(holds), spread, digits)
        self.checks.append(made)
        return made

    @property
    def verdict(self) -> str:
        """Follows from the checks alone."""
        require(bool(self.checks), "checks", "none", "at least one")
        held = sum(check.holds for check in self.checks)
        return HOLDS if held == len(self.checks) else FAILS if held == 0 else PARTLY


def number(value: float, digits: int = 2) -> str:
    """`digits` decimals, and as many significant ones where the number is smaller than that."""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10.0**-digits else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and how it is measured here.

    Attributes:
        paper: the three-digit id. slug: for the file name. says: what the paper claims, in our words.
        measure: makes the measurement. module: the file it is in.
    """

    paper: str
    slug: str
    says: str
    measure: Callable[[Scale], Outcome]

    def file_name(self, quick: bool = False) -> str:
        return f"{self.paper}-{self.slug}{'.quick' if quick else ''}.json"


class Scale:
    """How large to measure, and the language model to measure on (loaded at most once, when first asked for).

    Args:
        quick: seconds instead of minutes; shows that everything runs, and says nothing about a paper.
        model: a name for `regard.load`. loaded: a (model, tokenizer) pair in its place.
    """

    def __init__(self, quick: bool = False, model: str = "smollm2-135m", loaded: tuple[Any, Any] | None = None) -> None:
        self.quick, self.model_name, self._loaded = quick, model, loaded

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def language_model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from ...integrations.hub import load

            self._loaded = load(self.model_name)
        return self._loaded


def run(claim: Claim, scale: Scale, command: str) -> dict[str, Any]:
    """Measure a claim; what is kept of it, as plain data (see `save`)."""
    before, began = _load_average(), time.perf_counter()
    outcome = claim.measure(scale)
    seconds = time.perf_counter() - began
    rows = [{**asdict(row), "mean": row.mean, "ratio": row.ratio, "spread": row.spread} for row in outcome.rows]
    record = {
        "paper": claim.paper,
        "claim": claim.says,
        "setting": outcome.setting,
        "verdict": outcome.verdict,
        "checks": [asdict(check) for check in outcome.checks],
        "repeats": outcome.repeats,
        "rows": rows,
        "note": outcome.note,
        "quick": scale.quick,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "machine": {**machine(), "load average before": before, "load average after": _load_average()},
    }
    return record | {"measured": measured_line(record)}


def save(record: dict[str, Any], claim: Claim, folder: Path) -> Path:
    """Write the record to `folder`, whole or not at all."""
    return write_whole(
        folder / claim.file_name(record["quick"]), json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    )


def measured_line(record: dict[str, Any]) -> str:
    """One or two lines for the catalog: what the paper claims and what came out, from the record alone."""
    checks = "; ".join(str(Check(**check)) for check in record["checks"])
    verdict = record["verdict"]
    found = f"The claim {verdict} at this scale" if verdict != PARTLY else f"{_of(record)} checks hold at this scale"
    note = f" {record['note']}" if record["note"] else ""
    facts = record["machine"]
    where = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {record['date']}{busy(facts)}"
    return f"{record['claim']} Measured on {record['setting']}: {checks}. {found}.{note} ({where})"


def _of(record: dict[str, Any]) -> str:
    held = sum(check["holds"] for check in record["checks"])
    return f"{held} of {len(record['checks'])}"


def busy(facts: dict[str, str]) -> str:
    """A warning where others were at work on the machine: more waiting than it has cores."""
    load, cores = facts["load average before"], facts["cores"]
    if load == "unknown" or float(load) <= float(cores):
        return ""
    return f"; others at work, load {load} on {cores} cores: times are rough"


def machine() -> dict[str, str]:
    """What the figures were measured on; the CPU by its own name."""
    import torch
    import transformers

    from ... import __version__

    return {
        "device": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "regard": __version__,
        "system": platform.platform(terse=True),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU {line.partition(':')[2].strip()}"
    except OSError:
        pass
    return f"CPU {platform.processor() or platform.machine()}"


def _load_average() -> str:
    """Of the last minute: above the number of cores, times are not worth much."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
