"""`fit_duo`: find out which kv heads need the whole past, by training one gate each beside a frozen model.

Xiao et al. 2024 (ICLR 2025), arXiv 2410.10819; numbers from mit-han-lab/duo-attention @ fe93c31 (MIT), `duo_attn/train.py` and
`patch/llama.py`. The student's heads mix full and streaming attention by their gates; its last hidden states are held to the dense
model's where passkeys are asked for; a penalty pulls gates to zero. What the text calls full attention of the student is, in their
code, the DENSE model's own attention output, from its own hidden states: `full_branch="teacher"`.

Differs: teacher and student run one after the other instead of as halves of one batch, with the same numbers; sequence parallelism
and activation checkpointing are left to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_name, require_tensor
from .._files import write_whole
from ..integrations.transformers import attach
from ..methods.call import AttentionCall, Method, UnsupportedModelError
from .duo_gates import duo_distillation_loss, duo_gate_penalty, duo_lr_factor, duo_mixed_attention
from .passkeys import Passkeys
from .runner import Fitted, fit


class DuoGates(nn.Module):
    """One gate for each layer and kv head, (layers, Hkv), in [0, 1]: 1 = needs everything, 0 = sinks and recent tokens are enough."""

    def __init__(self, num_layers: int, num_kv_heads: int, initial: float = 1.0) -> None:
        super().__init__()
        require_int("num_layers", num_layers, 1)
        require_int("num_kv_heads", num_kv_heads, 1)
        require(0.0 <= initial <= 1.0, "initial", initial, "a number in [0, 1]")
        self.gates = nn.Parameter(torch.full((num_layers, num_kv_heads), float(initial)))
        self.fitted: Fitted | None = None

    @torch.no_grad()
    def clamp(self) -> None:
        self.gates.clamp_(0, 1)

    def save_tsv(self, path: str | Path) -> Path:
        """Write them as the authors publish theirs, one layer a line; `regard.DuoAttention.from_tsv(path)` reads them."""
        rows = self.gates.detach().double().cpu().tolist()
        return write_whole(path, "".join("\t".join(repr(cell) for cell in row) + "\n" for row in rows))


def fit_duo(
    model: nn.Module,
    tokenizer: Any = None,
    data: Any = None,
    *,
    sink: int = 128,
    recent: int = 256,
    steps: int = 2000,
    lr: float = 0.02,
    l1: float = 0.05,
    initial: float = 1.0,
    full_branch: str = "teacher",
    gates: DuoGates | None = None,
    **options: Any,
) -> DuoGates:
    """Train the gates of DuoAttention; the model stays as it is, bit by bit.

    Args:
        model: a causal transformers model that `attach` can join, with a plain KV cache.
        tokenizer: its tokenizer, for passkeys in a book; not needed where `data` is given.
        data: batches as `fit` takes them, each a mapping with `input_ids` (B, N) and `labels` (B, N), -100 where the hidden
            states do not count. None: `Passkeys(tokenizer)` (prompts of 1000 to 32000 tokens, so give shorter ones for small models).
        sink, recent: what streaming attention sees. steps, lr, l1: as in the authors' runs; AdamW without weight decay, the
            rate rising over the first fifth and falling over the last. initial: of all gates.
        full_branch: "teacher" (default, as released): the dense model's attention output is mixed in, without a gradient; "student":
            full attention of the student's own hidden states, as the paper writes.
        gates: to go on with; None: fresh ones.
        options: of `fit` (`out`, `save_every`, `accumulate`, `seed`, `progress`, ...): with `out` the run can be killed and resumed.

    Returns:
        `DuoGates`; `.fitted` is what `fit` returned. Use: `regard.DuoAttention(budget=0.5, gates=found.gates.detach(), sink=sink,
        recent=recent)`. Memory: the activations of one forward, and with "teacher" the attention outputs of all layers.

    Raises:
        UnsupportedModelError: a model without causal self-attention layers of one shape. ValueError: batches without labels that count.
    """
    require_int("sink", sink, 0)
    require_int("recent", recent, 1)
    require(l1 >= 0, "l1", l1, "a number >= 0")
    require_name("full_branch", full_branch, ("teacher", "student"))
    shape = _shape(model)
    gates = DuoGates(*shape, initial=initial).to(_device(model)) if gates is None else gates
    found = tuple(gates.gates.shape)
    require(found == shape, "gates", f"shape {found}", f"(layers, kv heads) = {shape}")
    if data is None:
        if tokenizer is None:
            raise bad_type("tokenizer", tokenizer, "the model's tokenizer, or `data`")
        data = Passkeys(tokenizer)

    def loss_of_batch(batch: Any) -> Tensor:
        ids, labels, mask = _batch(batch, _device(model))
        teacher = _Teacher()
        with attach(model, teacher), torch.no_grad():
            wanted = _hidden(model, ids, mask)
        full = teacher.outputs if full_branch == "teacher" else {}
        with attach(model, _Student(gates.gates, sink, recent, full)):
            got = _hidden(model, ids, mask)
        return duo_distillation_loss(wanted, got, labels) + l1 * duo_gate_penalty(gates.gates)

    gates.clamp()
    gates.fitted = fit(
        gates,
        loss_of_batch,
        data,
        steps=steps,
        lr=lr,
        schedule=lambda step, total: duo_lr_factor(step, total),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        after_step=gates.clamp,
        frozen=model,
        metadata={"sink": str(sink), "recent": str(recent), "full_branch": full_branch, "l1": str(l1)},
        **{"label": "duo gates", **options},
    )
    return gates


@dataclass
class _Teacher(Method):
    """The dense model; its attention outputs are kept."""

    outputs: dict[int, Tensor] = field(default_factory=dict)

    def edit(self, call: AttentionCall) -> None:
        def keep(out: Tensor) -> Tensor:
            self.outputs[call.layer] = out
            return out

        call.on_output(keep)


@dataclass
class _Student(Method):
    """Full and streaming attention, mixed by the gates."""

    gates: Tensor | None = None
    sink: int = 128
    recent: int = 256
    full: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        assert self.gates is not None
        if call.soft_cap is not None or (call.mask is not None and bool(call.start.any())):
            what = "left-padded rows" if call.soft_cap is None else "a model with a soft cap on its scores"
            raise ValueError(f"data: got {what}, need rows that begin at the first column and plain softmax attention")
        return duo_mixed_attention(
            call.q,
            call.k,
            call.v,
            self.gates[call.layer].to(call.q.dtype),
            sink=self.sink,
            recent=self.recent,
            full=self.full.pop(call.layer, None),
            scale=call.scale,
        )


def _hidden(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The last hidden states (B, N, C), after the last norm and before the vocabulary."""
    given = {} if mask is None else {"attention_mask": mask}
    return model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state


def _batch(batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        raise bad_type("data", batch, "batches that are mappings with input_ids and labels")
    ids = require_tensor("input_ids", batch["input_ids"], dims=2).to(device)
    labels = require_tensor("labels", batch["labels"], dims=2).to(device)
    require(labels.shape == ids.shape, "labels", f"shape {tuple(labels.shape)}", f"{tuple(ids.shape)}, like input_ids")
    mask = batch.get("attention_mask")
    return ids, labels, None if mask is None or bool(mask.all()) else mask.to(device)


def _shape(model: Any) -> tuple[int, int]:
    """(layers, kv heads) of the text decoder."""
    from ..methods.caches.decoder import decoder_config, kv_heads

    config = decoder_config(model, "fit_duo")
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        raise UnsupportedModelError(f"fit_duo: {type(model).__name__} has no causal self-attention")
    return config.num_hidden_layers, kv_heads(config)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
