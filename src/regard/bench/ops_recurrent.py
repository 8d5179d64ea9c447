"""Recurrences beside softmax attention: a decoding step behind a long context, and attention across chunks of a recurrence (RAT)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.mixers import state_bytes
from ..ops.chunk_recurrence import chunk_recurrent_attention
from ..ops.state import alibi_slopes, linear_attention, linear_attention_decode
from .ops import Row, Say, Setting
from .timing import Ratio, interleaved

CHUNK = 16
_LAYERS = 4  # each with a cache of its own, as in a model: one just read would still lie near the processor


@torch.no_grad()
def measure(setting: Setting, say: Say) -> list[Row]:
    """Decoding behind 32k tokens, a forward over 16k, where other parts take 8k (four times and twice `setting.seq_len`)."""
    return _decoding(setting, 4 * setting.seq_len, say) + _forward(setting, 2 * setting.seq_len, say)


def _drawn(setting: Setting, length: int, count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (1, setting.num_heads, length, setting.head_dim)
    return tuple(torch.randn(shape, generator=generator).to(setting.device, setting.dtype) for _ in range(count))


def _decoding(setting: Setting, context: int, say: Say) -> list[Row]:
    q, k, v, gate = _drawn(setting, context, 4)
    gate = gate.sigmoid()
    one = [t[:, :, -1:].contiguous() for t in (q, k, v, gate)]
    decay = -alibi_slopes(setting.num_heads).to(setting.device)
    dense_name = "dense SDPA, one query"
    caches = [(k.clone(), v.clone()) for _ in range(_LAYERS)]

    def dense() -> None:
        for keys, values in caches:
            F.scaled_dot_product_attention(one[0], keys, values)

    runs: dict[str, Callable[[], Any]] = {dense_name: dense}
    holds: dict[str, Any] = {dense_name: caches[0]}
    for name, options in (
        ("linear attention", {"feature_map": "elu+1", "normalize": True}),
        ("linear attention, decay per head", {"log_decay": decay}),
    ):
        _, state = linear_attention(q, k, v, **options, return_state=True)  # type: ignore[arg-type]
        step = partial(linear_attention_decode, *one[:3], state, **options)  # type: ignore[arg-type]
        runs[name], holds[name] = _times(step), state
    past = context - CHUNK // 2 - 1  # in the middle of a chunk
    begun = [t[:, :, :past] for t in (q, k, v, gate)]
    _, state = chunk_recurrent_attention(*begun, CHUNK, return_state=True)  # type: ignore[misc, arg-type, call-arg]
    name = f"RAT, chunks of {CHUNK}"
    runs[name] = _times(partial(chunk_recurrent_attention, *one, CHUNK, state=state, return_state=True))  # type: ignore[arg-type, call-arg]
    holds[name] = state
    times = interleaved(runs, setting.rounds, device=setting.device, calls=50, progress=say)
    rows = []
    for name, found in times.items():
        seconds = [second / _LAYERS for second in found]
        row = Row(name, "forward", Ratio.of(seconds, [1.0] * len(seconds)).median, extra_bytes=state_bytes(holds[name]))
        row.note = f"a decoding step behind {context} tokens; bytes are those of the state"
        if name != dense_name:
            row.beside, row.ratio = dense_name, Ratio.of(times[dense_name], found)
            row.target_ratio = 20.0 if name.startswith("linear") and not setting.device.startswith("cuda") else None
        rows.append(row)
    return rows


def _times(step: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_LAYERS):
            step()

    return run


def _forward(setting: Setting, length: int, say: Say) -> list[Row]:
    q, k, v, gate = _drawn(setting, length, 4)
    gate = gate.sigmoid()
    base, name = "dense causal SDPA", f"RAT, chunks of {CHUNK}"
    runs: dict[str, Callable[[], Any]] = {
        base: partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        name: partial(chunk_recurrent_attention, q, k, v, gate, CHUNK),
    }
    times = interleaved(runs, setting.rounds, device=setting.device, progress=say)
    ones = [1.0] * setting.rounds
    note = f"{length} tokens"
    row = Row(name, "forward", Ratio.of(times[name], ones).median, base, Ratio.of(times[base], times[name]), note=note)
    row.target_ratio = None if setting.device.startswith("cuda") else 5.0
    return [Row(base, "forward", Ratio.of(times[base], ones).median, note=note), row]
