"""Tuning a sliver: train the q, k, v, o slices of chosen attention heads (and whole MLPs of chosen layers) and nothing else.

`HeadSlices` holds trainable copies of the slices alone; the model's own weights are replaced by "frozen weight with these slices
put in" while it trains (a parametrization), so that an optimizer with momentum or weight decay cannot touch what is outside.
`merge` writes the slices into the weights; everything else keeps its bits, which `tune_heads` asserts.

Used by Zhang et al. 2024, "Interpreting and Improving Large Language Models in Arithmetic Calculation" (ICML 2024, arXiv
2409.01659; no code published) as precise supervised fine-tuning, here `precise_sft`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._checks import require, require_name
from ..integrations.anatomy import blocks, head_slices
from ..methods.call import UnsupportedModelError
from .masked_lm import MaskedCollator, masked_lm_loss
from .runner import Fitted, fingerprint, fit

__all__ = ["HeadTuner", "Tuned", "precise_sft", "tune_heads"]

Head = tuple[int, int]
ROLES = ("q", "k", "v", "o")
GROUPED = ("whole", "shared")


class _Slice(nn.Module):
    """The parametrization of one tensor: itself, frozen, with trainable rows (or columns) put in."""

    def __init__(self, value: Tensor, index: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", index, persistent=False)
        self.part = nn.Parameter(value.detach().index_select(axis, index).clone())

    index: Tensor

    def forward(self, value: Tensor) -> Tensor:
        return value.index_copy(self.axis, self.index, self.part)


class HeadTuner(nn.Module):
    """Trainable copies of slices of a model's weights. `with tuner.applied():` the model computes with them; `merge()` writes them in.

    Args:
        model: a decoder-only transformers model. heads: (layer, head) pairs. mlps: layers whose feed-forward part is trained whole.
        roles: which projections: any of "q", "k", "v", "o" ("o": the columns that read the head).
        grouped: with grouped attention several query heads share a key and value head. "whole": train k and v only where all
            query heads of a group are chosen. "shared": where any of them is, which changes the others of its group too.

    Raises:
        ValueError: heads or layers out of range, nothing to train. UnsupportedModelError: projections that are not plain weights,
            or shared between layers.
    """

    def __init__(
        self,
        model: Any,
        heads: Iterable[Head] = (),
        mlps: Iterable[int] = (),
        roles: Iterable[str] = ROLES,
        grouped: str = "whole",
    ) -> None:
        super().__init__()
        roles = list(roles)
        for role in roles:
            require_name("roles", role, ROLES)
        require_name("grouped", grouped, GROUPED)
        found = blocks(model)
        config = model.config.get_text_config(decoder=True)
        num_heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        chosen: dict[int, set[int]] = {}
        for layer, head in heads:
            fits = 0 <= layer < len(found) and 0 <= head < num_heads
            require(fits, "heads", (layer, head), f"layers in [0, {len(found)}), heads in [0, {num_heads})")
            chosen.setdefault(int(layer), set()).add(int(head))
        layers = sorted({int(layer) for layer in mlps})
        require(all(0 <= layer < len(found) for layer in layers), "mlps", layers, f"layers in [0, {len(found)})")
        self._sites: list[tuple[nn.Module, str]] = []
        parts: list[_Slice] = []
        for layer, mine in sorted(chosen.items()):
            attention = found[layer].attention
            slices = head_slices(attention, num_heads, kv_heads, head_dim)
            wanted: dict[tuple[str, str, int], list[Tensor]] = {}  # GPT-2 keeps q, k and v in one matrix
            for role in roles:
                one = slices[role]
                picked = mine if role in "qo" else _groups(mine, num_heads // kv_heads, grouped)
                rows = [one.index[head] for head in sorted(picked)]
                if rows:
                    wanted.setdefault((one.name, "weight", one.axis), []).extend(rows)
                    if one.bias is not None and one.bias_index is not None:
                        wanted.setdefault((one.name, "bias", 0), []).extend(
                            one.bias_index[head] for head in sorted(picked)
                        )
            for (name, kind, axis), rows in wanted.items():
                module = attention.get_submodule(name)
                parts.append(_Slice(getattr(module, kind), torch.cat(rows).unique(), axis))
                self._sites.append((module, kind))
        for layer in layers:
            part = found[layer].feed_forward
            if part is None:
                raise UnsupportedModelError(
                    f"model: found no feed-forward module in layer {layer} of {type(model).__name__}"
                )
            for module in part.modules():
                for name, value in module.named_parameters(recurse=False):
                    parts.append(_Slice(value, torch.arange(len(value), device=value.device), 0))
                    self._sites.append((module, name))
        require(bool(parts), "heads", "nothing to train", "at least one head or MLP")
        self.parts = nn.ModuleList(parts)
        self.heads, self.mlps = sorted((layer, head) for layer, some in chosen.items() for head in some), layers
        self.total = sum(value.numel() for value in model.parameters())

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(part.numel() for part in self.parameters())

    def forward(self) -> None:
        raise NotImplementedError("a HeadTuner is used by applied() and merge()")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the slices as they are, and they get gradients; afterwards it is as before."""
        put: list[tuple[nn.Module, str]] = []
        try:
            for (module, name), part in zip(self._sites, self.parts):
                parametrize.register_parametrization(module, name, part, unsafe=True)
                put.append((module, name))
            yield
        finally:
            for module, name in reversed(put):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the slices into the model's weights, for good."""
        for (module, name), part in zip(self._sites, self.parts):
            getattr(module, name).index_copy_(part.axis, part.index, part.part)  # type: ignore[arg-type, call-overload, operator]

    def untouched(self) -> list[tuple[nn.Module, str, Tensor]]:
        """What of the tuned tensors must stay: (module, name, bool mask)."""
        kept = []
        for (module, name), part in zip(self._sites, self.parts):
            mask = torch.ones_like(getattr(module, name), dtype=torch.bool)
            mask.index_fill_(part.axis, part.index, False)  # type: ignore[arg-type, call-overload]
            kept.append((module, name, mask))
        return kept


@dataclass(eq=False)
class Tuned:
    """What came of it. tuner: its slices are in the model now. fitted: of `fit`. count: numbers trained. share: of all parameters."""

    tuner: HeadTuner
    fitted: Fitted
    count: int
    share: float


def tune_heads(
    model: Any,
    loss_of_batch: Callable[[Any], Tensor],
    batches: Any,
    heads: Iterable[Head] = (),
    *,
    mlps: Iterable[int] = (),
    roles: Iterable[str] = ROLES,
    grouped: str = "whole",
    lr: float = 2e-5,
    merge: bool = True,
    **options: Any,
) -> Tuned:
    """Train slices of a model, and hold everything else to its bits.

    Args:
        loss_of_batch: batch -> scalar loss of the model. batches, options: of `fit` (steps, schedule, weight_decay, out, ...).
        merge: write what was learned into the model's weights; False leaves the model as it was (`tuner.applied()`,
            `tuner.merge()` later).
        Others as in `HeadTuner`.

    Raises:
        RuntimeError: something that was not to be trained has changed (a loss that changes weights by itself, say).
    """
    tuner = HeadTuner(model, heads, mlps, roles, grouped)
    before = fingerprint(model)
    sites = {(id(module), name) for module, name in tuner._sites}
    tuned = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if (id(module), name) in sites
    }
    kept = [(module, name, mask, getattr(module, name)[mask].clone()) for module, name, mask in tuner.untouched()]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        model.eval()  # no dropout: what is tuned is a sliver of a finished model
        with tuner.applied():
            fitted = fit({"head_slices": tuner}, loss_of_batch, batches, lr=lr, **{"label": "head slices", **options})
    finally:
        for parameter, state in wanted.items():
            parameter.requires_grad_(state)
        for module, state in training.items():
            module.training = state
    if merge:
        tuner.merge()
    after = fingerprint(model)
    changed = [name for name in before if after.get(name) != before[name] and not (merge and name in tuned)]
    changed += [name for module, name, mask, values in kept if not torch.equal(getattr(module, name)[mask], values)]
    if changed:
        raise RuntimeError(f"model: {', '.join(changed[:4])} changed while only slices of heads were to be trained")
    return Tuned(tuner, fitted, tuner.count, tuner.count / tuner.total)


def precise_sft(
    model: Any,
    tokenizer: Any,
    samples: Iterable[tuple[str, str]],
    heads: Iterable[Head],
    *,
    mlps: Iterable[int] = (),
    steps: int | None = None,
    batch_size: int = 8,
    lr: float = 2e-5,
    seed: int = 0,
    **options: Any,
) -> Tuned:
    """Precise supervised fine-tuning: prompts and answers, only the answers learned, only the chosen heads tuned.

        effect = regard.lens.arithmetic_heads(model, batch)
        precise_sft(model, tokenizer, [("3 + 4 = ", "7"), ...], heads=effect.top(32, largest=False))

    Args:
        samples: (prompt, answer) texts. heads: (layer, head) pairs; the paper tunes 32 of 1024 (how many is not said in so many words).
        steps: optimizer steps; None: once through the samples. Others as in `tune_heads`. `HeadTuner` says what happens in
            grouped attention.
    """
    listed = list(samples)
    require(bool(listed), "samples", "none", "at least one (prompt, answer)")
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(seed)).tolist()
    collate = MaskedCollator(tokenizer)
    cut = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    batches = [collate([[(listed[i][0], 0.0), (listed[i][1], 1.0)] for i in some]) for some in cut]
    device = next(model.parameters()).device

    def loss_of_batch(batch: dict[str, Tensor]) -> Tensor:
        return masked_lm_loss(model, {name: value.to(device) for name, value in batch.items()})

    return tune_heads(model, loss_of_batch, batches, heads, mlps=mlps, lr=lr, steps=steps, seed=seed, **options)


def _groups(mine: set[int], group: int, grouped: str) -> set[int]:
    """Heads whose key and value rows are trained."""
    if grouped == "shared":
        return mine
    return {
        head
        for head in mine
        if all(other in mine for other in range(head // group * group, head // group * group + group))
    }
