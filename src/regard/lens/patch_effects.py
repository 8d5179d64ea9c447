"""Which parts of a model an answer hangs on: total, direct and path effects of heads, attention layers, MLPs and the residual stream.

All compare a clean with a corrupted prompt of the same length. The total effect is what changes if a part writes what it wrote on
the other prompt (activation patching, Vig et al. 2020; Meng et al. 2022); the path effect lets that change reach chosen receivers
only, with all other heads held (path patching, Wang et al. 2022, arXiv 2211.00593, Goldowsky-Dill et al. 2023); the direct effect
counts what the part itself adds to the logits.

`path_effects` is that of Merullo et al. 2023, "Circuit Component Reuse Across Tasks in Transformer Language Models" (ICLR 2024,
arXiv 2310.08744; authors' code jmerullo/circuit_reuse, `patching_utils.py:path_patching`, MIT, read for numbers). What differs
from it: senders may be MLPs too; with component "z" a receiver is recorded before it is held to its clean value, where theirs
records it after and finds no effect of anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_name
from .head_scores import Head, HeadScores
from .logit_attribution import Unembedding, require_plain_stream, writes
from .logit_metrics import Metric
from .patch_work import Inputs, PatchWork
from .patching import Change, Patcher

__all__ = ["direct_effects", "path_effects", "total_effects"]

OF = ("head", "attn", "mlp", "resid")


def total_effects(
    model: Any,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    *,
    of: str = "head",
    position: int | Sequence[int] | None = None,
    direction: str = "corrupt",
    relative: str = "gap",
    nodes: Iterable[Head] | None = None,
    tokens: int = 2048,
    keep: Any = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> HeadScores:
    """Effect of each part on the answer, through everything that comes after it.

        effect = regard.lens.total_effects(model, clean, corrupted, LogitDifference(right, wrong))

    Args:
        model: a decoder-only transformers model. clean, corrupted: ids (P, T), or mappings with `input_ids` and a left-padded
            `attention_mask`; pairs of the same length.
        metric: what is measured, `(logits (n, V), rows (n,)) -> (n,)`; `regard.lens` has some.
        of: "head", "attn", "mlp" (whole modules), "resid" (the stream entering each block).
        position: where a part is patched, from the end where negative; None: everywhere ("resid": each position by itself, one
            column each).
        direction: "corrupt": the clean prompt is run with a part from the corrupted one; "restore": the other way round.
        relative: "gap": change of the metric as a share of the difference between both runs (0: no effect, 1: all of it), means
            over prompts before dividing; "base": change as a share of the unpatched metric, prompt by prompt; "none": the change
            itself.
        nodes: (layer, head) pairs to try; None: all. Others get NaN. (Head 0 for whole modules; for "resid" without position, the
            column.)
        tokens: about how many tokens one forward holds. keep: where activations are kept ("cpu" for a small GPU).
        out: file (safetensors) to which values are written as they come. resume: go on from there. progress: a bar on a terminal.

    Returns:
        `HeadScores` (L, H), (L, 1), or (L, T); `runs` holds each prompt's share, `info` the metric of both runs.

    Raises:
        ValueError: prompts of different length, nodes or positions out of range, no gap to measure by, `out` of another measurement.
    """
    require_name("of", of, OF)
    require_name("direction", direction, ("corrupt", "restore"))
    base, donor = (clean, corrupted) if direction == "corrupt" else (corrupted, clean)
    columns = of == "resid" and position is None

    def answer(patcher: Patcher, wanted: Sequence[Head]) -> Tensor:
        questions = []
        for layer, second in wanted:
            if columns:
                values = patcher.base["resid", layer].clone()
                values[:, second] = patcher.donor["resid", layer][:, second]
                questions.append([Change(0, "resid", layer, 0, values)])
            else:
                questions.append([patcher.from_donor(of, layer, second)])
        return patcher.run(questions)  # type: ignore[return-value]

    settings = {"effect": "total", "of": of, "position": position, "direction": direction}
    work = PatchWork(model, base, donor, metric, position, (of,), tokens, keep, out, resume, progress)
    return work.measure(answer, of, relative, nodes, settings, columns=columns)


def path_effects(
    model: Any,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    receivers: str | Iterable[Head | int] = "logits",
    *,
    component: str = "q",
    of: str = "head",
    position: int = -1,
    freeze_mlps: bool = False,
    truncate: bool = True,
    relative: str = "gap",
    nodes: Iterable[Head] | None = None,
    tokens: int = 2048,
    keep: Any = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> HeadScores:
    """Effect of each sender on the answer by way of the receivers alone, at one position.

    First the clean prompt runs with the sender as on the corrupted prompt and all other heads held, which tells what the
    receivers would get; then the clean prompt runs with the receivers so.

    Args:
        receivers: "logits"; or (layer, head) pairs, whose `component` receives; or layer numbers: the residual stream that enters
            this block (L, the number of layers: that which leaves the last one, the same as "logits").
        component: "q", "k", "v" or "z" (the head's output) of the receiving heads. In grouped attention the key or value as that
            head reads it.
        of: senders: "head" or "mlp". position: of sender and receiver. freeze_mlps: hold MLPs too; else paths run through them.
        truncate: try senders up to the lowest receiving head's layer only (the authors'); False: up to the highest. What is not
            tried has effect 0.
        Others as in `total_effects`.
    """
    require_name("component", component, ("q", "k", "v", "z"))
    require_name("of", of, ("head", "mlp"))
    require(isinstance(position, int), "position", position, "one position")
    work = PatchWork(model, clean, corrupted, metric, position, ("mlp",), tokens, keep, out, resume, progress)
    heads, streams = _receivers(receivers, work)
    part = "head" if component == "z" else component
    highest = max([layer for layer, _ in heads] + streams)
    lowest = min([layer for layer, _ in heads] + [work.num_layers]) if truncate else work.num_layers
    if work.num_layers in streams:
        require(position in (-1, work.length - 1), "position", position, "-1 where the logits receive")

    def answer(patcher: Patcher, wanted: Sequence[Head]) -> Tensor:
        tried = [i for i, (layer, head) in enumerate(wanted) if _may_reach(layer, head, heads, lowest, highest, of)]
        logits = patcher.notes["base"].expand(len(wanted), -1, -1).clone()
        if not tried:
            return logits
        senders = [[patcher.from_donor(of, *wanted[i])] for i in tried]
        spots = {(part, layer) for layer, _ in heads} | {
            ("resid", layer) for layer in streams if layer < work.num_layers
        }
        if streams == [work.num_layers] and not heads:
            said = patcher.run(senders, freeze_heads=True, freeze_mlps=freeze_mlps)
        else:
            if work.num_layers in streams:
                raise bad_value("receivers", receivers, "the logits alone, or heads and streams below them")
            _, found = patcher.run(
                senders, freeze_heads=True, freeze_mlps=freeze_mlps, record=sorted(spots), last=highest
            )
            questions = []
            for number in range(len(tried)):
                changes = [Change(0, part, layer, head, found[part, layer][number][:, head]) for layer, head in heads]
                changes += [Change(0, "resid", layer, 0, found["resid", layer][number]) for layer in streams]
                questions.append(changes)
            said = patcher.run(questions)
        logits[tried] = said
        return logits

    settings = {
        "effect": "path", "of": of, "position": position, "component": component, "freeze_mlps": freeze_mlps, "truncate": truncate,
        "receivers": [list(head) for head in heads] + streams,
    }  # fmt: skip
    return work.measure(answer, of, relative, nodes, settings, first=lambda chunk: min(chunk)[0])


def direct_effects(
    model: Any,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    *,
    of: str = "head",
    norm: str = "frozen",
    relative: str = "gap",
    nodes: Iterable[Head] | None = None,
    tokens: int = 2048,
    keep: Any = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> HeadScores:
    """Effect of what each part itself writes to the residual stream at the last position, past everything that comes after it.

    Args:
        of: "head", "attn" or "mlp". norm: the final norm's scale: "frozen" to that of the clean run (so that the effects of all
            parts and of the embedding add up to the change of the logits but for that scale), or "recomputed". Others as in
            `total_effects`.

    Raises `UnsupportedModelError` where the writes of the parts do not add up to the residual stream (models with a norm behind
    their modules).
    """
    require_name("of", of, ("head", "attn", "mlp"))
    require_name("norm", norm, ("frozen", "recomputed"))
    unembed = Unembedding(model)

    def answer(patcher: Patcher, wanted: Sequence[Head]) -> Tensor:
        if "writes" not in patcher.notes:
            require_plain_stream(patcher)
            patcher.notes["writes"] = tuple(writes(patcher, run, of) for run in (patcher.base, patcher.donor))
            patcher.notes["final"] = patcher.base["resid", patcher.num_layers]
        before, after = patcher.notes["writes"]
        change = torch.stack([after[node] - before[node] for node in wanted]).to(patcher.device)
        final = patcher.notes["final"][:, 0].to(patcher.device)
        return unembed.changed(final, change, patcher.base_logits, frozen=norm == "frozen")

    settings = {"effect": "direct", "of": of, "norm": norm}
    parts = ("head", "attn", "mlp", "resid")
    work = PatchWork(model, clean, corrupted, metric, -1, parts, tokens, keep, out, resume, progress)
    return work.measure(answer, of, relative, nodes, settings)


def _may_reach(layer: int, head: int, heads: Sequence[Head], lowest: int, highest: int, of: str) -> bool:
    if of == "head" and (layer, head) in heads:
        return False
    return layer <= lowest and layer < highest


def _receivers(given: str | Iterable[Head | int], work: PatchWork) -> tuple[list[Head], list[int]]:
    if isinstance(given, str):
        require_name("receivers", given, ("logits",))
        return [], [work.num_layers]
    heads: list[Head] = []
    streams: list[int] = []
    for entry in given:
        if isinstance(entry, int):
            require(0 <= entry <= work.num_layers, "receivers", entry, f"layers in [0, {work.num_layers}]")
            streams.append(entry)
        else:
            layer, head = int(entry[0]), int(entry[1])
            fits = 0 <= layer < work.num_layers and 0 <= head < work.num_heads
            require(
                fits, "receivers", (layer, head), f"layers in [0, {work.num_layers}), heads in [0, {work.num_heads})"
            )
            heads.append((layer, head))
    require(bool(heads or streams), "receivers", "none", "at least one")
    return heads, streams
