"""Chunk form of causal linear attention: quadratic inside a chunk, a state between chunks.

Two ways to the same numbers:

- `chunk_fixed`: no decay, or one fixed decay per head. A custom autograd function whose backward is written out from
  the same tiles (two sweeps, one per direction), so that neither direction keeps more than one chunk beside its
  inputs and outputs.
- `chunk_learned`: a decay per token or per channel, or one that needs a gradient. Plain differentiable PyTorch.

Source of the tiling: Qin et al., Lightning Attention-2 (2024, arXiv 2401.04658). The authors' kernels shift the decay
bookkeeping by one token (their running product is not the state at the end of a chunk); here the state is the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .decay import cumulative_decay
from .tensors import accumulate_dtype, expand_heads, no_autocast


def default_chunk_size(rows: int, channel_decay: bool = False) -> int:
    """Chunk length that ran fastest on a CPU for `rows` = batch x query heads: few heads want longer chunks, because
    then the calls cost more than the arithmetic. With a decay per channel a chunk costs C x C x D memory: 16."""
    if channel_decay:
        return 16
    return 64 if rows >= 4 else 128


class _Tiles:
    """The chunks of x (B, Hkv, N, D) as (B * H, C, D) tiles in the accumulation dtype, made one at a time."""

    def __init__(self, x: Tensor, groups: int, chunk: int, dtype: torch.dtype):
        self.groups, self.dtype = groups, dtype
        self.rows = x.shape[0] * x.shape[1] * groups
        # a view wherever the layout allows it, then a tile costs nothing
        if groups == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
            self.parts = x.flatten(0, 1).split(chunk, dim=1)
            self.ready = x.dtype == dtype
        else:
            self.parts = x.split(chunk, dim=2)
            self.ready = False

    def __getitem__(self, i: int) -> Tensor:
        part = self.parts[i]
        if self.ready:
            return part
        if part.dim() == 4:
            part = expand_heads(part, self.groups).reshape(self.rows, *part.shape[2:])
        return part.to(self.dtype)


class _Weights:
    """Decay factors of a chunk of m tokens, expanded to full tiles (a broadcast operand would halve the speed).

    mask (R, m, m): exp(g (a - b)) for a >= b, else 0.  query (R, m, 1): exp(g (a + 1)), how much of the incoming state
    row a still sees.  key (R, m, 1): exp(g (m - 1 - b)), what is left of row b at the end of the chunk.
    block (R, 1, 1): exp(g m). R = B * H rows, g = log_decay <= 0. Without decay all factors but the mask are None.
    """

    def __init__(
        self, log_decay: Tensor | None, rows: int, m: int, like: Tensor, dtype: torch.dtype, dim: int, value_dim: int
    ):
        steps = torch.arange(m, device=like.device, dtype=torch.float32 if like.device.type == "mps" else torch.float64)
        distance = steps[:, None] - steps[None, :]
        self.query = self.key = self.block = self.query_v = self.key_v = None
        if log_decay is None:
            self.mask = (distance >= 0).to(dtype).expand(rows, m, m).contiguous()
            return
        rate = log_decay.detach().to(steps.dtype)[:, None]  # exponents in float64: exact for any chunk length
        repeat = rows // log_decay.shape[0]

        def full(exponent: Tensor, *shape: int) -> Tensor:
            return exponent.exp().to(dtype).repeat(repeat, *(1 for _ in shape)).reshape(rows, *shape)

        self.mask = full((rate[..., None] * distance.clamp(min=0)).masked_fill(distance < 0, float("-inf")), m, m)
        query, key = full(rate * (steps + 1), m)[..., None], full(rate * (m - 1 - steps), m)[..., None]
        self.query, self.key = query.expand(-1, -1, dim).contiguous(), key.expand(-1, -1, dim).contiguous()
        self.query_v, self.key_v = (
            query.expand(-1, -1, value_dim).contiguous(),
            key.expand(-1, -1, value_dim).contiguous(),
        )
        self.block = full(rate * m, 1)[..., None].expand(-1, dim, value_dim).contiguous()


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _Plan:
    """Chunk boundaries of one call and the factors of its full and of its last, shorter chunk."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int):
        self.batch, self.heads, self.length, self.dim = q.shape
        self.value_dim, self.kv_heads = v.shape[-1], k.shape[1]
        self.groups = self.heads // self.kv_heads
        self.rows = self.batch * self.heads
        self.dtype = accumulate_dtype(q.dtype)
        self.chunk = max(1, min(chunk, self.length))
        self.count = -(-self.length // self.chunk)

        def weights(m: int) -> _Weights:
            return _Weights(log_decay, self.rows, m, q, self.dtype, self.dim, self.value_dim)

        tail = self.length - (self.count - 1) * self.chunk if self.count else 0
        self.full = weights(self.chunk) if self.count > 1 or tail == self.chunk else None
        self.tail = self.full if tail == self.chunk or not self.count else weights(tail)

    def tiles(self, x: Tensor) -> _Tiles:
        return _Tiles(x, self.heads // x.shape[1], self.chunk, self.dtype)

    def sweep(self, backwards: bool = False) -> Iterator[tuple[int, Any]]:
        order = range(self.count - 1, -1, -1) if backwards else range(self.count)
        for i in order:
            yield i, (self.tail if i == self.count - 1 else self.full)

    def start(self, state: Tensor | None, like: Tensor) -> Tensor:
        """A private copy of the running state, (R, D, Dv)."""
        if state is None:
            return torch.zeros(self.rows, self.dim, self.value_dim, dtype=self.dtype, device=like.device)
        return state.to(self.dtype).reshape(self.rows, self.dim, self.value_dim).clone()


def _advance(state: Tensor, left: Tensor, right: Tensor, block: Tensor | None) -> None:
    """state <- block * state + left^T right, in place."""
    if block is not None:
        state.mul_(block)
    state.baddbmm_(left.transpose(1, 2), right)


class _ChunkFixed(torch.autograd.Function):
    """Forward and backward of the chunk form with no decay or one fixed decay per head (see the card of paper 124)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        plan = _Plan(q, k, v, log_decay, chunk)
        out = torch.empty(plan.rows, plan.length, plan.value_dim, dtype=dtype, device=q.device)
        running = plan.start(state, q)
        qs, ks, vs, outs = plan.tiles(q), plan.tiles(k), plan.tiles(v), out.split(plan.chunk, dim=1)
        for i, w in plan.sweep():
            qc, kc, vc = qs[i], ks[i], vs[i]
            scores = torch.bmm(qc, kc.transpose(1, 2)).mul_(w.mask)
            tile = torch.bmm(scores, vc)
            tile.baddbmm_(_scaled(qc, w.query), running)
            outs[i].copy_(tile)  # a product written straight into a strided slice would leave the batched kernel
            _advance(running, _scaled(kc, w.key), vc, w.block)
        ctx.save_for_backward(q, k, v, log_decay, state)
        ctx.chunk = chunk
        shape = (plan.batch, plan.heads)
        return out.unflatten(0, shape), running.unflatten(0, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, state = ctx.saved_tensors
        plan = _Plan(q, k, v, log_decay, ctx.chunk)
        need_q, need_k, need_v, _, need_state = ctx.needs_input_grad[:5]
        with no_autocast(q.device):
            tiles = [plan.tiles(x) for x in (q, k, v, grad_out)]
            dq = _sweep_right(plan, tiles, state, q) if need_q else None
            dk, dv, dstate = (
                _sweep_left(plan, tiles, grad_state, k, v) if need_k or need_v or need_state else (None,) * 3
            )
        return dq, dk, dv, None, dstate if need_state else None, None, None


def _sweep_right(plan: _Plan, tiles: list[_Tiles], state: Tensor | None, q: Tensor) -> Tensor:
    """dQ, left to right: the states are made again on the way, so none is kept."""
    _, ks, vs, gs = tiles
    dq = torch.empty(plan.rows, plan.length, plan.dim, dtype=q.dtype, device=q.device)
    outs = dq.split(plan.chunk, dim=1)
    running = plan.start(state, q)
    for i, w in plan.sweep():
        kc, vc, gc = ks[i], vs[i], gs[i]
        tile = torch.bmm(torch.bmm(gc, vc.transpose(1, 2)).mul_(w.mask), kc)
        tile.baddbmm_(_scaled(gc, w.query_v), running.transpose(1, 2))
        outs[i].copy_(tile)
        if i + 1 < plan.count:
            _advance(running, _scaled(kc, w.key), vc, w.block)
    return dq.unflatten(0, (plan.batch, plan.heads))


def _sweep_left(
    plan: _Plan, tiles: list[_Tiles], grad_state: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dK, dV and the gradient of the incoming state, right to left along the gradient of the state."""
    qs, ks, vs, gs = tiles
    dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dks, dvs = dk.split(plan.chunk, dim=2), dv.split(plan.chunk, dim=2)
    running = plan.start(grad_state, k)
    for i, w in plan.sweep(backwards=True):
        qc, kc, vc, gc = qs[i], ks[i], vs[i], gs[i]
        back = torch.bmm(vc, gc.transpose(1, 2)).mul_(w.mask.transpose(1, 2))
        tile_k = torch.bmm(back, qc).baddbmm_(_scaled(vc, w.key_v), running.transpose(1, 2))
        scores = torch.bmm(kc, qc.transpose(1, 2)).mul_(w.mask.transpose(1, 2))
        tile_v = torch.bmm(scores, gc).baddbmm_(_scaled(kc, w.key), running)
        for target, tile in ((dks[i], tile_k), (dvs[i], tile_v)):
            tile = tile.unflatten(0, (plan.batch, plan.kv_heads, plan.groups))
            target.copy_(tile.squeeze(2) if plan.groups == 1 else tile.sum(2))
        _advance(running, _scaled(qc, w.query), gc, w.block)
    return dk, dv, running.unflatten(0, (plan.batch, plan.heads))


def chunk_fixed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, Dv) in `dtype` and the state after the last token (B, H, D, Dv) in the accumulation dtype.

    log_decay: None or (H,), constant. state: None or (B, H, D, Dv). No gradient for log_decay, and no second derivative.
    """
    return _ChunkFixed.apply(q, k, v, log_decay, state, chunk_size, dtype)  # type: ignore[no-any-return]


def chunk_learned(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `chunk_fixed`, for log_decay (B, H, N) or (B, H, N, D), differentiable in everything by autograd."""
    batch, heads, _, dim = q.shape
    groups = heads // k.shape[1]
    acc = accumulate_dtype(q.dtype)
    running = q.new_zeros(batch, heads, dim, v.shape[-1], dtype=acc) if state is None else state.to(acc)
    per_channel = log_decay.dim() == 4
    outs = []
    for qc, kc, vc, gc in zip(*(x.split(chunk_size, dim=2) for x in (q, k, v, log_decay))):
        qc, kc, vc = qc.to(acc), expand_heads(kc, groups).to(acc), expand_heads(vc, groups).to(acc)
        total = cumulative_decay(gc)  # (B, H, m[, D]), float64
        past = torch.ones(qc.shape[2], qc.shape[2], dtype=torch.bool, device=q.device).tril()
        if per_channel:
            between = (total[:, :, :, None] - total[:, :, None, :]).masked_fill(~past[..., None], float("-inf"))
            scores = (qc[:, :, :, None] * between.exp().to(acc) * kc[:, :, None, :]).sum(-1)
        else:
            total = total[..., None]
            between = (total - total.transpose(-1, -2)).masked_fill(~past, float("-inf"))
            scores = (qc @ kc.transpose(-1, -2)) * between.exp().to(acc)
        outs.append((scores @ vc + (qc * total.exp().to(acc)) @ running).to(dtype))
        end = total[:, :, -1:]
        left = (kc * (end - total).exp().to(acc)).transpose(-1, -2)
        running = end.exp().to(acc).transpose(-1, -2) * running + left @ vc
    out = torch.cat(outs, dim=2) if outs else q.new_zeros(batch, heads, 0, v.shape[-1], dtype=dtype)
    return out, running
