"""Neighborhood attention on a map, beside dense SDPA with the same mask as a matrix and beside FlexAttention with the same mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import masks
from ..ops.neighborhood import neighborhood_attention, neighborhood_attention_backend
from .ops import Row, Say, Setting, flex_peer
from .timing import Ratio, interleaved, peak_bytes

FORWARD, BOTH = "forward", "forward+backward"
DENSE, FLEX = "dense SDPA, the mask a matrix", "FlexAttention"


def measure(setting: Setting, say: Say) -> list[Row]:
    """A square map: 64x64 tokens on the CPU, 128x128 on a GPU, windows of 13x13; 16x16 and 5x5 for settings of less than 4096 tokens."""
    on_cuda = setting.device.startswith("cuda")
    side, kernel = (16, 5) if setting.seq_len < 4096 else (128 if on_cuda else 64, 13)
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (4, 1, side, side, setting.num_heads, setting.head_dim)
    q, k, v, upstream = torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
    matrix = masks.neighborhood((side, side), kernel).materialize(side**2, side**2, device=setting.device)
    own = f"neighborhood {kernel}x{kernel}, {side}x{side} tokens"
    ways: dict[str, Callable[..., Tensor]] = {
        DENSE: lambda q, k, v: _heads_first(partial(F.scaled_dot_product_attention, attn_mask=matrix), q, k, v),
        own: lambda q, k, v: neighborhood_attention(q, k, v, kernel),
    }
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, way in ways.items():
        runs[name, FORWARD] = _no_grad(way, q, k, v)
        runs[name, BOTH] = _with_grad(way, upstream, q, k, v)
    flex: Callable[[], Any] | str = "not asked for"
    if setting.flex:
        say("compiling FlexAttention")
        flex = _flex(side, kernel, setting.device, q, k, v)
    if not isinstance(flex, str):
        runs[FLEX, FORWARD] = flex
    times = interleaved(runs, setting.rounds, device=setting.device, progress=say)
    rows = []
    for (name, which), seconds in times.items():
        row = Row(name, which, Ratio.of(seconds, [1.0] * len(seconds)).median)
        rows.append(row)
        if name == DENSE:
            continue
        row.beside, row.ideal = DENSE, side**2 / kernel**2
        row.ratio = Ratio.of(times[DENSE, which], seconds)
        row.share = Ratio.of(times[DENSE, which], seconds, 1 / row.ideal)
        if name == own:
            row.backend = neighborhood_attention_backend(q, k, v, kernel)
            peak, kept = peak_bytes(runs[name, which], setting.device)
            row.extra_bytes = peak - kept
            if which == FORWARD:
                row.target_ratio = None if on_cuda else 5.0
                row.peers = {FLEX: flex if isinstance(flex, str) else Ratio.of(times[FLEX, FORWARD], seconds)}
                row.peer_target = 1.0 if on_cuda else None
    return rows


def _heads_first(op: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    grid = inputs[0].shape[1:3]
    return op(*(x.flatten(1, 2).transpose(1, 2) for x in inputs)).transpose(1, 2).unflatten(1, grid)


def _no_grad(way: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return way(*inputs)

    return run


def _with_grad(way: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(way(*leaves), leaves, upstream)


def _flex(side: int, kernel: int, device: str, *inputs: Tensor) -> Callable[[], Any] | str:
    """FlexAttention over row-major tokens."""
    left = kernel // 2
    right = kernel - 1 - left

    def sees(query: Tensor, key: Tensor) -> Tensor:
        first = query.clamp(left, side - 1 - right) - left
        return (first <= key) & (key < first + kernel)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return sees(q_idx // side, kv_idx // side) & sees(q_idx % side, kv_idx % side)

    return flex_peer(mask_mod, side**2, device, lambda op: _no_grad(partial(_heads_first, op), *inputs))
