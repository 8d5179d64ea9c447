"""Chunk form of causal linear attention: quadratic inside a chunk, a state between chunks.

Two ways to the same numbers:

- `chunk_fixed`: no decay, or one fixed decay per head. A custom autograd function whose backward is written out from
  the same tiles (two sweeps, one per direction), so that neither direction keeps more than a few chunks beside its
  inputs and outputs, whatever the length.
- `chunk_learned`: a decay per token or per channel, or one that needs a gradient. Plain differentiable PyTorch.

Source of the tiling: Qin et al., Lightning Attention-2 (2024, arXiv 2401.04658). The authors' kernels shift the decay
bookkeeping by one token (their running product is not the state at the end of a chunk); here the state is the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .decay import cumulative_decay
from .tensors import accumulate_dtype, expand_heads, no_autocast

CHUNK_SIZE = 64  # fastest on a CPU at head_dim 64; shorter saves arithmetic, longer saves calls
CHANNEL_CHUNK_SIZE = 16  # with a decay per channel a chunk costs C x C x D memory
_TILES_AT_ONCE = 64  # chunks x heads of one product, at most ...
_NUMBERS_AT_ONCE = 1 << 18  # ... and in all their states: 1 MB in float32, what a core's cache holds


def _chunks_at_once(rows: int, state_size: int) -> int:
    """How many chunks to take together: few large products cost less than many small ones while they stay in the cache.
    Less than four is not worth gathering them; more than sixteen costs more in combining their states."""
    tiles = min(_TILES_AT_ONCE, _NUMBERS_AT_ONCE // max(1, state_size))
    chunks = min(16, tiles // max(1, rows))
    return chunks if chunks >= 4 else 1


class _Piece(NamedTuple):
    """`chunks` chunks of `size` tokens, from token `start` to `stop`: what one step of a sweep works on."""

    start: int
    stop: int
    chunks: int
    size: int


class _Factors:
    """Decay factors of a piece, R = B * H rows, g = log_decay <= 0 (full tiles: a broadcast operand would halve the speed).

    mask (R, 1, m, m): exp(g (a - b)) for a >= b, else 0.  query, query_v (R, 1, m, D or Dv): exp(g (a + 1)), how much of
    the state before the chunk row a still sees.  key, key_v: exp(g (m - 1 - b)), what is left of row b after the chunk.
    Over the G chunks of a piece: before (R, G, G) gives the state before each chunk from what each adds, end (R, 1, G) the
    state after the piece, old (R, G + 1, 1) what is left there of the state before the piece.
    Without decay query and key are None: nothing to multiply.
    """

    def __init__(self, log_decay: Tensor | None, rows: int, piece: _Piece, like: Tensor, sizes: tuple[int, int]):
        m, chunks, dtype = piece.size, piece.chunks, accumulate_dtype(like.dtype)
        # exponents in float64, so that they are exact for chunks of any length
        wide = torch.float32 if like.device.type == "mps" else torch.float64
        steps = torch.arange(max(m, chunks + 1), device=like.device, dtype=wide)
        rate = steps.new_zeros(1) if log_decay is None else log_decay.detach().to(wide)
        rate = rate.repeat(rows // rate.shape[0])[:, None, None]

        def weight(distance: Tensor) -> Tensor:
            return (rate * distance.clamp(min=0)).masked_fill(distance < 0, float("-inf")).exp().to(dtype)

        tokens, blocks = steps[:m], steps[: chunks + 1]
        self.mask = weight(tokens[:, None] - tokens)[:, None]
        between = weight((blocks[:, None] - 1 - blocks[:chunks]) * m)  # (R, G + 1, G)
        self.before, self.end = between[:, :chunks].contiguous(), between[:, chunks:].contiguous()
        self.old = weight(blocks[:, None] * m)
        self.query = self.key = self.query_v = self.key_v = None
        if log_decay is not None:
            query, key = weight(tokens[:, None] + 1)[:, None], weight(m - 1 - tokens[:, None])[:, None]
            self.query, self.query_v = (query.expand(-1, 1, m, size).contiguous() for size in sizes)
            self.key, self.key_v = (key.expand(-1, 1, m, size).contiguous() for size in sizes)


class _Plan:
    """How a call is cut into pieces, and how tiles and states of a piece are made."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int):
        self.batch, self.heads, length, self.dim = q.shape
        self.value_dim, self.kv_heads = v.shape[-1], k.shape[1]
        self.groups = self.heads // self.kv_heads
        self.rows = self.batch * self.heads
        self.dtype = accumulate_dtype(q.dtype)
        chunk = max(1, min(chunk, length))
        together = _chunks_at_once(self.rows, self.dim * self.value_dim)
        full, tail = divmod(length, chunk)
        whole, rest = divmod(full, together)
        sizes = [(together, chunk)] * whole + [(rest, chunk)] * (rest > 0) + [(1, tail)] * (tail > 0)
        self.pieces, start = [], 0
        for count, size in sizes:
            self.pieces.append(_Piece(start, start + count * size, count, size))
            start += count * size
        shapes = {piece[2:]: piece for piece in self.pieces}
        self._factors = {
            shape: _Factors(log_decay, self.rows, piece, q, (self.dim, self.value_dim))
            for shape, piece in shapes.items()
        }

    def factors(self, piece: _Piece) -> _Factors:
        return self._factors[piece[2:]]

    def tiles(self, x: Tensor, piece: _Piece) -> Tensor:
        """The chunks of x (B, H or Hkv, N, D) in this piece, (R * G, m, D) in the accumulation dtype."""
        part = expand_heads(x[:, :, piece.start : piece.stop].to(self.dtype), self.heads // x.shape[1])
        return part.reshape(-1, piece.size, x.shape[-1])

    def put(self, target: Tensor, tiles: Tensor, piece: _Piece) -> None:
        """Write tiles into target (B, H or Hkv, N, D); the heads that read one kv head are summed."""
        part = tiles.view(self.batch, target.shape[1], -1, piece.stop - piece.start, tiles.shape[-1])
        target[:, :, piece.start : piece.stop] = part.squeeze(2) if part.shape[2] == 1 else part.sum(2)

    def scale(self, tiles: Tensor, factor: Tensor | None) -> Tensor:
        if factor is None:
            return tiles
        return (tiles.view(self.rows, -1, *tiles.shape[1:]) * factor).view(tiles.shape)

    def scores(self, left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
        """left right^T inside each chunk, times the decays."""
        scores = torch.bmm(left, right.transpose(1, 2))
        scores.view(self.rows, -1, *scores.shape[1:]).mul_(mask)
        return scores

    def walk(
        self, running: Tensor, left: Tensor, right: Tensor, w: _Factors, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """States before each chunk (R * G, D, Dv) when each adds left^T right, and the running state after all of them.

        Backwards, "before" means to the right: the same sums from the last chunk to the first.
        """
        added = torch.bmm(left.transpose(1, 2), right)
        chunks = w.before.shape[1]
        if chunks == 1:
            return running, torch.addcmul(added, running, w.old[:, 1:])
        between, end, old = w.before, w.end, w.old
        if backwards:
            between, end, old = between.flip(1, 2), end.flip(2), torch.cat([old[:, :-1].flip(1), old[:, -1:]], dim=1)
        added, start = added.view(self.rows, chunks, -1), running.view(self.rows, 1, -1)
        before = torch.baddbmm(old[:, :-1] * start, between, added)
        after = torch.baddbmm(old[:, -1:] * start, end, added)
        return before.view(-1, *running.shape[1:]), after.view(running.shape)

    def start(self, state: Tensor | None, like: Tensor) -> Tensor:
        """The running state (R, D, Dv)."""
        if state is None:
            return torch.zeros(self.rows, self.dim, self.value_dim, dtype=self.dtype, device=like.device)
        return state.to(self.dtype).reshape(self.rows, self.dim, self.value_dim)

    def finish(self, running: Tensor) -> Tensor:
        return running.unflatten(0, (self.batch, self.heads))


class _ChunkFixed(torch.autograd.Function):
    """Forward and backward of the chunk form with no decay or one fixed decay per head."""

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
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype)
        running = plan.start(state, q)
        for piece in plan.pieces:
            w = plan.factors(piece)
            qt, kt, vt = (plan.tiles(x, piece) for x in (q, k, v))
            before, running = plan.walk(running, plan.scale(kt, w.key), vt, w)
            tiles = torch.bmm(plan.scores(qt, kt, w.mask), vt)
            plan.put(out, tiles.baddbmm_(plan.scale(qt, w.query), before), piece)
        ctx.save_for_backward(q, k, v, log_decay, state)
        ctx.chunk = chunk
        return out, plan.finish(running)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, state = ctx.saved_tensors
        need_q, need_k, need_v, _, need_state = ctx.needs_input_grad[:5]
        dq = dk = dv = dstate = None
        with no_autocast(q.device):
            plan = _Plan(q, k, v, log_decay, ctx.chunk)
            if need_q:
                dq = _sweep_right(plan, q, k, v, grad_out, state)
            if need_k or need_v or need_state:
                dk, dv, dstate = _sweep_left(plan, q, k, v, grad_out, grad_state)
        return dq, dk, dv, None, dstate if need_state else None, None, None


def _sweep_right(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, state: Tensor | None) -> Tensor:
    """dQ, left to right: the states are made again on the way, so none is kept between the passes."""
    dq = torch.empty_like(q)
    running = plan.start(state, q)
    for piece in plan.pieces:
        w = plan.factors(piece)
        kt, vt, gt = (plan.tiles(x, piece) for x in (k, v, grad_out))
        before, running = plan.walk(running, plan.scale(kt, w.key), vt, w)
        tiles = torch.bmm(plan.scores(gt, vt, w.mask), kt)
        plan.put(dq, tiles.baddbmm_(plan.scale(gt, w.query_v), before.transpose(1, 2)), piece)
    return dq


def _sweep_left(
    plan: _Plan, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dK, dV and the gradient of the incoming state, right to left along the gradient of the state."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    running = plan.start(grad_state, k)
    for piece in reversed(plan.pieces):
        w = plan.factors(piece)
        qt, kt, vt, gt = (plan.tiles(x, piece) for x in (q, k, v, grad_out))
        after, running = plan.walk(running, plan.scale(qt, w.query), gt, w, backwards=True)
        mask = w.mask.transpose(-1, -2)
        tiles = torch.bmm(plan.scores(vt, gt, mask), qt)
        plan.put(dk, tiles.baddbmm_(plan.scale(vt, w.key_v), after.transpose(1, 2)), piece)
        tiles = torch.bmm(plan.scores(kt, qt, mask), gt)
        plan.put(dv, tiles.baddbmm_(plan.scale(kt, w.key), after), piece)
    return dk, dv, plan.finish(running)


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
