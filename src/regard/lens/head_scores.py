"""`HeadScores`: one number for every head, [layers, heads], and what one does with such a table.

Probes give one (retrieval heads, head profiling), methods take heads out of one (`MaskHeads(scores.top(30))`). It is as good for
experts of a mixture, [layers, experts].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import bad_value, require, require_tensor, resolve_budget

__all__ = ["HeadScores"]

Head = tuple[int, int]


@dataclass(eq=False)
class HeadScores:
    """Scores of the heads of a model.

    Attributes:
        scores: (L, H), floating. NaN: no score.
        runs: (R, L, H), one table for each run that `scores` is the mean of; None where there is no such thing.
        name: what was measured ("retrieval", ...). info: how (model, settings, number of samples), JSON values.
        unit: what a column is: "head", or "expert" for the experts of a mixture (then H is their number).
    """

    scores: Tensor
    runs: Tensor | None = None
    name: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    unit: str = "head"

    def __post_init__(self) -> None:
        require_tensor("scores", self.scores, dims=2, floating=True)
        if self.runs is not None:
            require_tensor("runs", self.runs, dims=3, floating=True)
            shape = (self.num_layers, self.num_heads)
            require(
                self.runs.shape[1:] == shape, "runs", f"shape {tuple(self.runs.shape)}", f"(R, L, H), (L, H) = {shape}"
            )

    @classmethod
    def from_runs(
        cls, runs: Tensor | Sequence[Tensor], name: str = "", info: dict[str, Any] | None = None
    ) -> HeadScores:
        """The mean over runs, (R, L, H), in float64; a NaN in a run counts as not measured."""
        require(len(runs) > 0, "runs", "none", "at least one run")
        table = runs if isinstance(runs, Tensor) else torch.stack(list(runs))
        require_tensor("runs", table, dims=3, floating=True)
        # float64, and summed head by head as numpy does for a list: means that are equal on paper then rank as the authors' do
        columns = np.ascontiguousarray(table.detach().cpu().double().flatten(1).T.numpy())
        means = [
            float(np.mean(column[~np.isnan(column)])) if (~np.isnan(column)).any() else float("nan")
            for column in columns
        ]
        mean = torch.tensor(means, dtype=torch.float64).view(table.shape[1:])
        return cls(mean, table, name, dict(info or {}))

    @property
    def num_layers(self) -> int:
        return self.scores.shape[0]

    @property
    def num_heads(self) -> int:
        return self.scores.shape[1]

    @property
    def num_runs(self) -> int:
        return 0 if self.runs is None else len(self.runs)

    def __getitem__(self, head: Head) -> float:
        return float(self.scores[head])

    def __repr__(self) -> str:
        best = ", ".join(f"{layer}-{head} {self[layer, head]:.2f}" for layer, head in self.ranking()[:3])
        size = f"{self.num_layers} layers x {self.num_heads} {self.unit}s, {self.num_runs} runs"
        return f"<HeadScores {self.name or 'unnamed'}: {size}; top: {best or 'none'}>"

    # Which heads

    def ranking(self, largest: bool = True) -> list[Head]:
        """All heads that have a score, best first; of equals, the earlier layer and head first."""
        flat = self.scores.flatten()
        worst = float("-inf") if largest else float("inf")
        order = torch.where(flat.isnan(), worst, flat).sort(descending=largest, stable=True).indices
        return [divmod(int(i), self.num_heads) for i in order if not bool(flat[i].isnan())]

    def top(self, count: int | float, largest: bool = True) -> list[Head]:
        """The best heads as (layer, head): an int says how many, a float in (0, 1] which share of all heads."""
        return self.ranking(largest)[: resolve_budget("count", count, self.scores.numel())]

    def above(self, threshold: float) -> list[Head]:
        """Heads with a score above `threshold`, best first."""
        return [head for head in self.ranking() if self[head] > threshold]

    def share_above(self, threshold: float) -> float:
        """Share of all heads with a score above `threshold`."""
        return len(self.above(threshold)) / max(1, self.scores.numel())

    def active(self) -> Tensor:
        """Share of runs in which a head's score is above 0, (L, H) (the paper's activation frequency)."""
        if self.runs is None:
            raise bad_value("runs", None, "scores that were kept run by run")
        measured = ~self.runs.isnan()
        return ((self.runs > 0) & measured).sum(0) / measured.sum(0)

    def random(
        self, count: int | float, exclude: int | float | Iterable[Head] | None = None, seed: int = 0
    ) -> list[Head]:
        """A control: heads drawn at random, none of them among the excluded ones.

        Args:
            count: how many, or which share of all heads.
            exclude: heads never to draw: the best so many (int), the best share (float), or these (layer, head) pairs. None: the best
                100 as in the paper, of a small model at most the better half.
            seed: of the draw.

        Raises:
            ValueError: fewer heads are left than are to be drawn.
        """
        wanted = resolve_budget("count", count, self.scores.numel())
        if exclude is None:
            exclude = min(100, self.scores.numel() // 2)
        if isinstance(exclude, (int, float)):
            banned = set(self.top(exclude)) if exclude else set()
        else:
            banned = {(int(layer), int(head)) for layer, head in exclude}
        free = [divmod(i, self.num_heads) for i in range(self.scores.numel())]
        if not bool(self.scores.isnan().all()):  # a place without a score may be no head at all
            free = [head for head in free if self[head] == self[head]]
        free = [head for head in free if head not in banned]
        require(
            wanted <= len(free), "count", wanted, f"at most {len(free)} heads, which is what exclude={exclude!r} leaves"
        )
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
        return [free[int(i)] for i in order[:wanted]]

    def mask(self, heads: Iterable[Head]) -> Tensor:
        """The heads as a bool table (L, H)."""
        table = torch.zeros_like(self.scores, dtype=torch.bool)
        for layer, head in heads:
            table[layer, head] = True
        return table

    # Two tables

    def correlation(self, other: HeadScores) -> float:
        """Spearman's rank correlation with another table of the same model shape; equal scores share their mean rank."""
        self._same_shape(other)
        both = ~(self.scores.isnan() | other.scores.isnan())
        first, second = _ranks(self.scores[both]), _ranks(other.scores[both])
        first, second = first - first.mean(), second - second.mean()
        norm = (first.square().sum() * second.square().sum()).sqrt()
        return float((first * second).sum() / norm) if norm > 0 else float("nan")

    def overlap(self, other: HeadScores, count: int | float) -> float:
        """Share of the best `count` heads that are among the best `count` of the other table too."""
        self._same_shape(other)
        mine, theirs = set(self.top(count)), set(other.top(count))
        return len(mine & theirs) / max(1, len(mine))

    def _same_shape(self, other: HeadScores) -> None:
        require(
            other.scores.shape == self.scores.shape,
            "other",
            f"shape {tuple(other.scores.shape)}",
            f"shape {tuple(self.scores.shape)}",
        )

    # On paper

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Draw the table as a heat map (PNG, PDF or SVG, by the ending); see `plot_scores` for several in one picture."""
        from .head_plot import plot_scores

        return plot_scores({self.name or "score": self}, path, title=title)

    # On disk

    def save(self, path: str | Path) -> None:
        """Write to `path`: `.safetensors` (everything), or `.json` in the layout in which Wu et al. publish theirs,
        `{"layer-head": [score of each run]}` on one line (scores and runs alone)."""
        path = Path(path)
        if path.suffix == ".json":
            runs = self.scores[None] if self.runs is None else self.runs
            columns = runs.flatten(1).T.tolist()
            table = {
                "{}-{}".format(*divmod(i, self.num_heads)): [x for x in column if x == x]
                for i, column in enumerate(columns)
            }
            _write(path, json.dumps(table).encode())
        elif path.suffix == ".safetensors":
            from safetensors.torch import save

            tensors = {"scores": self.scores.contiguous()} | (
                {} if self.runs is None else {"runs": self.runs.contiguous()}
            )
            _write(path, save(tensors, metadata={"name": self.name, "info": json.dumps(self.info), "unit": self.unit}))
        else:
            raise bad_value("path", str(path), "a name that ends in .safetensors or .json")

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what `save` wrote, or a published `{"layer-head": [scores]}` JSON."""
        path = Path(path)
        if path.suffix == ".json":
            return cls._from_json(path)
        if path.suffix == ".safetensors":
            return cls._from_safetensors(path)
        raise bad_value("path", str(path), "a name that ends in .safetensors or .json")

    @classmethod
    def _from_json(cls, path: Path) -> HeadScores:
        need = 'a JSON object {"layer-head": [scores]}'
        try:
            table = json.loads(path.read_text())
            columns = {
                tuple(int(part) for part in key.split("-")): [float(x) for x in values] for key, values in table.items()
            }
            layers, heads = 1 + max(layer for layer, _ in columns), 1 + max(head for _, head in columns)
        except (ValueError, TypeError, AttributeError) as error:
            raise bad_value("path", str(path), f"{need} ({error})") from None
        runs = torch.full((max(map(len, columns.values())), layers, heads), torch.nan, dtype=torch.float64)
        for (layer, head), values in columns.items():
            runs[: len(values), layer, head] = torch.tensor(values, dtype=torch.float64)
        return cls.from_runs(runs, name=path.stem)

    @classmethod
    def _from_safetensors(cls, path: Path) -> HeadScores:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise bad_value("path", str(path), f"a whole safetensors file ({error})") from None
        require("scores" in tensors, "path", str(path), "a file that HeadScores.save wrote (it holds no 'scores')")
        info = json.loads(metadata.get("info", "{}"))
        name, unit = metadata.get("name", ""), metadata.get("unit", "head")
        return cls(tensors["scores"], tensors.get("runs"), name, info, unit)


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks, float64."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2.0)[inverse]


def _write(path: Path, data: bytes) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
