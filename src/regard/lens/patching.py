"""The patching engine: two runs of a causal language model, and forwards in which parts of one are put into the other.

`Patcher` runs a base prompt and a donor prompt once and keeps what their parts wrote. `run` then answers many questions of the form "what
would the model say if this head had seen the other prompt" in one forward each few dozen: the batch holds the base prompts as
many times as there are questions, each copy with its own change. Layers below the first change are not computed again, nor are
positions before it.

The parts: "head" (a head's output before the output projection), "attn" and "mlp" (what these modules write), "resid" (the
residual stream as it enters a block), "q", "k", "v" (after rotary embedding; keys and values as one query head reads them).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_value, require, require_int, require_name, require_tensor
from ..integrations.anatomy import Block, blocks
from ..integrations.transformers import attach
from ..methods.call import AttentionCall, Method, UnsupportedModelError

__all__ = ["PARTS", "Change", "Patcher", "head_outputs", "padded_ids"]

PARTS = ("head", "attn", "mlp", "resid", "q", "k", "v")
_HEADED = ("head", "q", "k", "v")


@dataclass(frozen=True, eq=False)
class Change:
    """One part of one copy of the base prompts is given other values.

    Attributes:
        copy: number of the copy. part: one of `PARTS`. layer, head: where (head 0 for parts without heads).
        values: (B, P, width) at the patcher's positions.
    """

    copy: int
    part: str
    layer: int
    head: int
    values: Tensor


@dataclass(eq=False)
class _Run:
    """What one forward is to do, and what it is to bring back."""

    copies: int
    changes: dict[tuple[str, int], list[Change]] = field(default_factory=dict)
    freeze_heads: bool = False
    freeze_mlps: bool = False
    record: set[tuple[str, int]] = field(default_factory=set)
    found: dict[tuple[str, int], Tensor] = field(default_factory=dict)


@dataclass
class _Edit(Method):
    """The engine's method: records and replaces head outputs, queries, keys and values."""

    patcher: Any = None
    run: Any = None

    def edit(self, call: AttentionCall) -> None:
        run, patcher = self.run, self.patcher
        at, group = patcher.rows.to(call.q.device), call.num_heads // call.num_kv_heads
        for part in "qkv":
            key = (part, call.layer)
            if key not in run.record and key not in run.changes:
                continue
            whole = getattr(call, part)
            if part != "q":  # as each query head reads it
                whole = whole.repeat_interleave(group, 1)
            columns = at if part == "q" else at + (call.kv_len - call.q_len)
            if key in run.record:
                run.found[key] = whole[:, :, columns].clone()
            if key in run.changes:
                setattr(call, part, patcher.changed(whole.clone(), run.changes[key], columns, run.copies))
        if any(part in "kv" and layer == call.layer for part, layer in run.changes):
            for part in "kv":  # one of them may still be grouped
                if getattr(call, part).shape[1] != call.num_heads:
                    setattr(call, part, getattr(call, part).repeat_interleave(group, 1))
        call.on_output(lambda out: self._output(out, call.layer, at))

    def _output(self, out: Tensor, layer: int, at: Tensor) -> Tensor:
        run, key = self.run, ("head", layer)
        if key in run.record:
            run.found[key] = out[:, :, at].clone()
        if not run.freeze_heads and key not in run.changes:
            return out
        out = out.clone()
        if run.freeze_heads:
            kept = self.patcher.base[key].to(out)
            out.view(run.copies, -1, *out.shape[1:]).index_copy_(3, at, kept.expand(run.copies, *kept.shape))
        return self.patcher.changed(out, run.changes.get(key, []), at, run.copies)


class Patcher:
    """Base and donor runs of one batch of prompt pairs.

        patcher = Patcher(model, clean_ids, corrupted_ids)
        logits = patcher.run([[patcher.from_donor("head", 5, 3)], [patcher.from_donor("mlp", 7)]])   # (2, B, V)

    Args:
        model: a decoder-only transformers model that `regard.attach` can join.
        base, donor: ids (B, T), or mappings with `input_ids` and `attention_mask`, of the same shape and the same padding (on the
            left). The base is what is run with changes, the donor is where their values come from.
        positions: columns that are changed, negative from the end; None: all.
        parts: what of both runs is kept. keep: device where it is kept; None: the model's own (give "cpu" where the GPU is small).

    Raises:
        ValueError: pairs of different length, padding on the right, positions out of range. UnsupportedModelError: a part was not found.
    """

    def __init__(
        self,
        model: Any,
        base: Tensor | Mapping[str, Tensor],
        donor: Tensor | Mapping[str, Tensor],
        *,
        positions: int | Sequence[int] | None = None,
        parts: Sequence[str] = ("head",),
        keep: str | torch.device | None = None,
    ) -> None:
        self.model = model
        self.ids, self.mask = padded_ids("base", base)
        donor_ids, donor_mask = padded_ids("donor", donor)
        same = donor_ids.shape == self.ids.shape and _same_mask(self.mask, donor_mask)
        require(
            same,
            "donor",
            f"shape {tuple(donor_ids.shape)}",
            f"prompts as long as the base's, {tuple(self.ids.shape)}, padded alike",
        )
        for part in parts:
            require_name("parts", part, PARTS)
        self.blocks: list[Block] = blocks(model)
        if "mlp" in parts:
            _require_mlps(self.blocks, model)
        self.num_layers = len(self.blocks)
        if [block.layer for block in self.blocks] != list(range(self.num_layers)):
            raise UnsupportedModelError(
                f"model: {type(model).__name__} has blocks without attention in between, which patching cannot follow"
            )
        self.batch, self.length = self.ids.shape
        self.positions = _positions(positions, self.length)
        self.device = _device(model)
        self.keep = self.device if keep is None else torch.device(keep)
        self._arguments = inspect.signature(model.forward).parameters
        self._prefix: list[tuple[Tensor, Tensor]] | None = None
        self.start = 0
        self._widths: dict[int, int] = {}
        self.notes: dict[str, Any] = {}  # what those who ask keep beside it
        self.num_heads = 0
        wanted = {(part, layer) for part in {*parts, "head"} for layer in range(self.num_layers)}
        if "resid" in parts:  # and what leaves the last block
            wanted.add(("resid", self.num_layers))
        self._read_prefix(self.positions[0])
        self.rows = torch.tensor(self.positions) - self.start
        entering = {("resid", layer) for layer in range(self.num_layers)}
        self._entering: dict[int, Tensor] = {}
        base_run = _Run(1, record=wanted | entering)
        self.base_logits = self._forward(base_run, self.ids, keep_entering=True)[0]
        self.base = self._kept(base_run, wanted)
        donor_run = _Run(1, record=set(wanted))
        prefix, start, rows = self._prefix, self.start, self.rows
        self._prefix, self.start, self.rows = None, 0, torch.tensor(self.positions)  # its past is another one
        self.donor_logits = self._forward(donor_run, donor_ids)[0]
        self._prefix, self.start, self.rows = prefix, start, rows
        self.donor = self._kept(donor_run, wanted)

    # Questions

    def from_donor(self, part: str, layer: int, head: int = 0, copy: int = 0) -> Change:
        """A change that puts what a part wrote in the donor run into a copy of the base."""
        require_name("part", part, PARTS)
        self.check(layer, head if part in _HEADED else None)
        values = self.donor[part, layer]
        return Change(copy, part, layer, head, values[:, head] if part in _HEADED else values)

    def check(self, layer: int, head: int | None = None) -> None:
        """Raise a `ValueError` if there is no such layer or head."""
        require(0 <= layer < self.num_layers, "layer", layer, f"a layer in [0, {self.num_layers})")
        if head is not None:
            require(0 <= head < self.num_heads, "head", head, f"a head in [0, {self.num_heads})")

    def run(
        self,
        questions: Sequence[Sequence[Change]],
        *,
        freeze_heads: bool = False,
        freeze_mlps: bool = False,
        record: Sequence[tuple[str, int]] = (),
        first: int | None = None,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """One forward for several questions.

        Args:
            questions: for each, its changes (none: the base as it is).
            freeze_heads, freeze_mlps: hold every head, every feed-forward part, that is not changed to what it wrote in the base
                run, at the patcher's positions.
            record: (part, layer) pairs to bring back, each (questions, B, H, P, D) or (questions, B, P, C), taken before any freezing.
            first: first layer to compute; None: that of the first change. last: the last; the logits mean nothing then.

        Returns:
            logits (questions, B, V) of the last position, float32 (float64 stays); with `record`, these and what was recorded.
        """
        require(bool(questions), "questions", "none", "at least one")
        run = _Run(len(questions), freeze_heads=freeze_heads, freeze_mlps=freeze_mlps, record=set(record))
        layers = [change.layer for changes in questions for change in changes]
        for number, changes in enumerate(questions):
            for change in changes:
                placed = Change(number, change.part, change.layer, change.head, change.values)
                run.changes.setdefault((change.part, change.layer), []).append(placed)
        first = min(layers, default=0) if first is None else first
        logits = self._forward(run, self.ids, first=first, last=last)
        if not record:
            return logits
        return logits, {key: value.unflatten(0, (run.copies, -1)) for key, value in run.found.items()}

    def most_copies(self, tokens: int) -> int:
        """How many questions fit into one forward of about `tokens` new tokens."""
        require_int("tokens", tokens, 1)
        return max(
            1, min(tokens // (self.batch * (self.length - self.start)), 4 * tokens // (self.batch * self.length))
        )

    def changed(self, out: Tensor, changes: Sequence[Change], at: Tensor, copies: int) -> Tensor:
        """Write changes into `out`, (copies * B, H, N, D) or (copies * B, N, C), in place."""
        view = out.view(copies, -1, *out.shape[1:])
        for change in changes:
            place = view[change.copy, :, change.head] if out.dim() == 4 else view[change.copy]
            place.index_copy_(1, at, change.values.to(out))
        return out

    # Forwards

    @torch.no_grad()
    def _forward(
        self, run: _Run, ids: Tensor, first: int = 0, last: int | None = None, keep_entering: bool = False
    ) -> Tensor:
        given: dict[str, Any] = {"input_ids": ids[:, self.start :].repeat(run.copies, 1).to(self.device)}
        if self.mask is not None:
            given["attention_mask"] = self.mask.repeat(run.copies, 1).to(self.device)
            if "position_ids" in self._arguments:
                position = (self.mask.cumsum(1) - 1).clamp(min=0)[:, self.start :]
                given["position_ids"] = position.repeat(run.copies, 1).to(self.device)
        if "logits_to_keep" in self._arguments:
            given["logits_to_keep"] = 1
        if self._prefix is not None:
            given |= {"past_key_values": self._past(run.copies), "use_cache": True}
        else:
            given["use_cache"] = False
        training = self.model.training
        self.model.eval()
        try:
            with self._joined(run, first, last, keep_entering):
                logits = self.model(**given).logits[:, -1]
        finally:
            self.model.train(training)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.unflatten(0, (run.copies, -1))

    @contextmanager
    def _joined(self, run: _Run, first: int, last: int | None, keep_entering: bool) -> Iterator[None]:
        with attach(self.model, _Edit(patcher=self, run=run)) as session:
            last = self.num_layers - 1 if last is None else last
            for block in self.blocks:
                if block.layer < first or block.layer > last:
                    session.override(block.module, "forward", self._skip(block.layer, first, run.copies))
                    continue
                wants = {key for key in (*run.record, *run.changes) if key[1] == block.layer}
                if keep_entering or ("resid", block.layer) in wants:
                    hook = self._entering_hook(run, block.layer, keep_entering)
                    session.on_detach(block.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                for part, module in (("attn", block.attention), ("mlp", block.feed_forward)):
                    frozen = part == "mlp" and run.freeze_mlps
                    if module is not None and ((part, block.layer) in wants or frozen):
                        hook = self._written_hook(run, part, block.layer, frozen)
                        session.on_detach(module.register_forward_hook(hook).remove)
                if keep_entering:
                    session.on_detach(block.module.register_forward_hook(self._width_hook(block.layer)).remove)
                if ("resid", block.layer + 1) in run.record and block.layer + 1 == self.num_layers:
                    session.on_detach(block.module.register_forward_hook(self._leaving_hook(run)).remove)
            yield

    def _skip(self, layer: int, first: int, copies: int) -> Any:
        """In place of a block that need not be computed: the first one hands out what the base run had further up."""

        def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == 0 and first > 0:
                hidden = self._entering[first].to(hidden).repeat(copies, 1, 1)
            width = self._widths.get(layer, 0)
            return hidden if width == 0 else (hidden, *[None] * (width - 1))

        return forward

    def _entering_hook(self, run: _Run, layer: int, keep: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if keep:
                self._entering[layer] = hidden.to(self.keep)
            key, at = ("resid", layer), self.rows.to(hidden.device)
            if key in run.record:
                run.found[key] = hidden[:, at].clone()
            if key not in run.changes:
                return None
            hidden = self.changed(hidden.clone(), run.changes[key], at, run.copies)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    def _written_hook(self, run: _Run, part: str, layer: int, frozen: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            out = output[0] if isinstance(output, tuple) else output
            key, at = (part, layer), self.rows.to(out.device)
            shape = out.shape
            if out.dim() == 2:  # OPT joins batch and tokens
                out = out.view(run.copies * self.batch, -1, shape[-1])
            if key in run.record:
                run.found[key] = out[:, at].clone()
            if key not in run.changes and not frozen:
                return None
            out = out.clone()
            if frozen:
                kept = self.base[key].to(out)
                out.view(run.copies, -1, *out.shape[1:]).index_copy_(2, at, kept.expand(run.copies, *kept.shape))
            out = self.changed(out, run.changes.get(key, []), at, run.copies).view(shape)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    def _leaving_hook(self, run: _Run) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            run.found["resid", self.num_layers] = out[:, self.rows.to(out.device)].clone()

        return hook

    def _width_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._widths[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    # What is kept

    def _kept(self, run: _Run, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        missing = wanted - set(run.found)
        if missing:
            raise UnsupportedModelError(f"model: {type(self.model).__name__} gave nothing for {sorted(missing)[:3]}")
        self.num_heads = run.found["head", 0].shape[1]
        return {key: run.found[key].to(self.keep) for key in wanted}

    @torch.no_grad()
    def _read_prefix(self, start: int) -> None:
        """Keys and values of the base before the first change, where the model's cache is a plain one."""
        if start == 0:
            return
        few = {"logits_to_keep": 1} if "logits_to_keep" in self._arguments else {}
        mask = {}
        if self.mask is not None:
            mask["attention_mask"] = self.mask[:, :start].to(self.device)
            if "position_ids" in self._arguments:
                mask["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, :start].to(self.device)
            if not bool(self.mask[:, :start].any(1).all()):  # a row whose real tokens all come later
                return
        with attach(self.model):
            out = self.model(self.ids[:, :start].to(self.device), use_cache=True, **few, **mask)
        past = getattr(out, "past_key_values", None)
        layers = getattr(past, "layers", None)
        if (
            not layers
            or len(layers) != self.num_layers
            or any(type(layer).__name__ != "DynamicLayer" for layer in layers)
        ):
            return
        self._prefix = [(layer.keys.to(self.keep), layer.values.to(self.keep)) for layer in layers]
        self.start = start

    def _past(self, copies: int) -> Any:
        from transformers import DynamicCache

        assert self._prefix is not None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._prefix):
            cache.update(
                keys.to(self.device).repeat(copies, 1, 1, 1), values.to(self.device).repeat(copies, 1, 1, 1), layer
            )
        return cache


def head_outputs(
    model: Any, inputs: Tensor | Mapping[str, Tensor], positions: int | Sequence[int] | None = None
) -> Tensor:
    """What every head gives to its output projection, (L, B, H, P, Dv), at some tokens of the prompts (None: all)."""
    patcher = Patcher(model, inputs, inputs, positions=positions)
    return torch.stack([patcher.donor["head", layer] for layer in range(patcher.num_layers)])


def padded_ids(name: str, given: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T) and their mask (None: no padding), checked: int64, padding on the left alone."""
    mask = None
    if isinstance(given, Mapping):
        require("input_ids" in given, name, sorted(given), "a mapping with 'input_ids'")
        mask, given = given.get("attention_mask"), given["input_ids"]
    require_tensor(name, given, dims=2)
    require(
        given.dtype == torch.int64 and given.numel() > 0,
        name,
        f"{given.dtype} of shape {tuple(given.shape)}",
        "int64 ids (B, T)",
    )
    if mask is not None:
        require(mask.shape == given.shape, name, f"a mask of shape {tuple(mask.shape)}", f"shape {tuple(given.shape)}")
        mask = mask.long()
        left = bool((mask[:, -1] == 1).all()) and bool((mask.diff(dim=1) >= 0).all())
        require(left, name, "padding on the right or in the middle", "padding on the left")
        mask = None if bool(mask.all()) else mask
    return given, mask


def _same_mask(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool((first == second).all())


def _positions(given: int | Sequence[int] | None, length: int) -> list[int]:
    if given is None:
        return list(range(length))
    listed = [given] if isinstance(given, int) else [int(position) for position in given]
    if not listed or not all(-length <= position < length for position in listed):
        raise bad_value("positions", given, f"positions in [{-length}, {length})")
    return sorted({position % length for position in listed})


def _require_mlps(found: Sequence[Block], model: nn.Module) -> None:
    bare = [block.layer for block in found if block.feed_forward is None]
    if bare:
        raise UnsupportedModelError(
            f"model: found no feed-forward module in layers {bare[:4]} of {type(model).__name__}"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
