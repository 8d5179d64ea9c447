"""What total, path and direct effects share: going through nodes and prompts, keeping the values, writing them as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name
from .._console import console
from .._files import require_writable, write_whole
from .head_scores import Head, HeadScores
from .logit_metrics import Metric
from .patching import Patcher, padded_ids

__all__ = ["Answer", "Inputs", "PatchWork", "ids_and_mask", "some_rows"]

RELATIVE = ("gap", "base", "none")
Inputs = Tensor | Mapping[str, Tensor]
Answer = Callable[[Patcher, Sequence[Head]], Tensor]
"""Logits (nodes, B, V) for some nodes."""


class PatchWork:
    """Goes through nodes and prompts, keeps the values, writes them as they come."""

    def __init__(
        self, model: Any, base: Inputs, donor: Inputs, metric: Metric, position: Any, parts: Sequence[str], tokens: int, keep: Any,
        out: str | Path | None, resume: bool, progress: bool,
    ) -> None:  # fmt: skip
        self.model, self.metric, self.position, self.parts, self.keep = model, metric, position, parts, keep
        self.tokens, self.resume, self.progress = require_int("tokens", tokens, 1), resume, progress
        self.out = None if out is None else require_writable(out)
        self.base, self.donor = (ids_and_mask(name, given) for name, given in (("clean", base), ("corrupted", donor)))
        same = self.base["input_ids"].shape == self.donor["input_ids"].shape
        got = f"shapes {tuple(self.base['input_ids'].shape)} and {tuple(self.donor['input_ids'].shape)}"
        require(same, "clean, corrupted", got, "pairs of prompts of the same length")
        self.prompts, self.length = self.base["input_ids"].shape
        config = model.config.get_text_config(decoder=True)
        self.num_layers, self.num_heads = config.num_hidden_layers, config.num_attention_heads

    def measure(
        self, answer: Answer, of: str, relative: str, nodes: Iterable[Head] | None, settings: dict[str, Any], columns: bool = False,
        first: Callable[[Sequence[Head]], int] | None = None,
    ) -> HeadScores:  # fmt: skip
        require_name("relative", relative, RELATIVE)
        width = self.length if columns else self.num_heads if of == "head" else 1
        wanted = _nodes(nodes, self.num_layers, width)
        values = torch.full((self.num_layers, width, self.prompts), torch.nan, dtype=torch.float64)
        base, donor = torch.full((2, self.prompts), torch.nan, dtype=torch.float64)
        key = self._key(settings)
        if self.out is not None and self.resume and self.out.exists():
            values, base, donor = self._load(key)
        at_once = max(1, min(self.prompts, self.tokens // self.length))
        with _bar(self.progress, f"{settings['effect']} effects of {of}", len(wanted) * self.prompts) as step:
            for begin in range(0, self.prompts, at_once):
                rows = torch.arange(begin, min(begin + at_once, self.prompts))
                todo = [node for node in wanted if bool(values[node][rows].isnan().any())]
                step((len(wanted) - len(todo)) * len(rows))
                if not todo:
                    continue
                patcher = Patcher(
                    self.model,
                    some_rows(self.base, rows),
                    some_rows(self.donor, rows),
                    positions=self.position,
                    parts=self.parts,
                    keep=self.keep,
                )
                patcher.notes["base"] = patcher.run([[]], first=0)  # by the same road as what it is compared with
                base[rows] = self._metric(patcher.notes["base"], rows)[0]
                donor[rows] = self._metric(patcher.donor_logits[None], rows)[0]
                most = patcher.most_copies(self.tokens)
                for start in range(0, len(todo), most):
                    chunk = todo[start : start + most]
                    found = self._metric(answer(patcher, chunk), rows)
                    for node, row in zip(chunk, found):
                        values[(*node, rows)] = row
                    self._save(values, base, donor, key)
                    step(len(chunk) * len(rows))
        return _scores(values, base, donor, relative, settings)

    def _metric(self, logits: Tensor, rows: Tensor) -> Tensor:
        """(nodes, B) float64 on the CPU."""
        found = self.metric(logits.flatten(0, 1), rows.repeat(len(logits)))
        shape = (len(logits) * len(rows),)
        require(
            tuple(found.shape) == shape,
            "metric",
            f"a result of shape {tuple(found.shape)}",
            f"one number a row, {shape}",
        )
        return found.unflatten(0, (len(logits), -1)).detach().double().cpu()

    def _key(self, settings: dict[str, Any]) -> str:
        marks = [
            hashlib.blake2b(t.cpu().numpy().tobytes(), digest_size=8).hexdigest()
            for m in (self.base, self.donor)
            for t in m.values()
        ]
        some = next(self.model.parameters())
        mark = [type(self.model).__name__, str(some.shape), float(some.detach().flatten()[:64].double().sum())]
        name = getattr(self.metric, "__name__", type(self.metric).__name__)
        return json.dumps([settings, marks, mark, name], sort_keys=True)

    def _save(self, values: Tensor, base: Tensor, donor: Tensor, key: str) -> None:
        if self.out is not None:
            from safetensors.torch import save

            write_whole(
                self.out, save({"values": values, "base": base.clone(), "donor": donor.clone()}, metadata={"key": key})
            )

    def _load(self, key: str) -> tuple[Tensor, Tensor, Tensor]:
        from safetensors import SafetensorError, safe_open

        assert self.out is not None
        try:
            with safe_open(self.out, framework="pt") as file:
                same = (file.metadata() or {}).get("key") == key
                require(same, "out", str(self.out), "a file of this very measurement (or resume=False to start again)")
                return file.get_tensor("values"), file.get_tensor("base"), file.get_tensor("donor")
        except SafetensorError as error:
            raise bad_value("out", str(self.out), f"a whole file of patching values ({error})") from None


def _scores(values: Tensor, base: Tensor, donor: Tensor, relative: str, settings: dict[str, Any]) -> HeadScores:
    change = values - base
    gap = float((donor - base).mean())
    if relative == "gap":
        if not abs(gap) > 1e-5 * max(1.0, float(base.abs().mean())):
            raise bad_value(
                "relative",
                "gap",
                f"runs that differ in the metric (both have {float(base.mean()):.4g}); or relative='none'",
            )
        change = change / gap
    elif relative == "base":
        change = change / base
    info = settings | {
        "relative": relative,
        "base": float(base.mean()),
        "donor": float(donor.mean()),
        "prompts": len(base),
    }
    runs = change.permute(2, 0, 1).contiguous()
    return HeadScores(runs.mean(0), runs, f"{settings['effect']} effect of {settings['of']}", info)


def _nodes(given: Iterable[Head] | None, layers: int, width: int) -> list[Head]:
    if given is None:
        return [(layer, head) for layer in range(layers) for head in range(width)]
    listed = sorted({(int(layer), int(head)) for layer, head in given})
    for layer, head in listed:
        fits = 0 <= layer < layers and 0 <= head < width
        require(fits, "nodes", (layer, head), f"layers in [0, {layers}), heads in [0, {width})")
    require(bool(listed), "nodes", "none", "at least one")
    return listed


def ids_and_mask(name: str, given: Inputs) -> dict[str, Tensor]:
    ids, mask = padded_ids(name, given)
    return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})


def some_rows(given: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows.to(value.device)] for key, value in given.items()}


@contextmanager
def _bar(progress: bool, label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    shown = console(stderr=True)
    if not progress or not shown.is_terminal:
        yield lambda count: None
        return
    with Progress(console=shown) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
