"""Chunk linear attention in Triton, forward and backward, for no decay or one fixed decay per head.

Two kernels a direction: one walks the chunks and writes the state before each, the other makes all chunks' outputs at
once from those states. They run segment by segment (some dozen chunks), so that what they keep beside inputs and outputs
does not grow with the length. Float32 accumulation; products of float32 tensors in full precision ("ieee").
Without a GPU the same kernels run in Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported).

The mathematics is Lightning Attention-2's (arXiv 2401.04658); the split into a sequential and a parallel kernel is ours.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _tile(ptr, row0, rows, col0, cols, num_rows, num_cols, DTYPE: tl.constexpr):
    """Rows row0.. and columns col0.. of a row-major matrix, zero outside (num_rows, num_cols)."""
    r, c = row0 + rows, col0 + cols
    inside = (r < num_rows)[:, None] & (c < num_cols)[None, :]
    return tl.load(ptr + r[:, None].to(tl.int64) * num_cols + c[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _keep(ptr, tile, row0, rows, col0, cols, num_rows, num_cols):
    """Store what `_tile` would load."""
    r, c = row0 + rows, col0 + cols
    inside = (r < num_rows)[:, None] & (c < num_cols)[None, :]
    tl.store(ptr + r[:, None].to(tl.int64) * num_cols + c[None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rate(decay_ptr, head, HAS_DECAY: tl.constexpr):
    rate = 0.0
    if HAS_DECAY:
        rate = tl.load(decay_ptr + head).to(tl.float32)
    return rate


@triton.jit
def _inside(rate, rows, HAS_DECAY: tl.constexpr, TRANSPOSED: tl.constexpr):
    """exp(rate (a - b)) for query row a >= key row b, else 0; [a, b], or [b, a] when transposed."""
    distance = rows[:, None] - rows[None, :]
    if TRANSPOSED:
        distance = -distance
    if HAS_DECAY:
        weight = tl.exp(rate * tl.maximum(distance, 0).to(tl.float32))
        return tl.where(distance >= 0, weight, 0.0)
    return tl.where(distance >= 0, 1.0, 0.0)


@triton.jit
def _states(
    x_ptr, y_ptr, decay_ptr, start_ptr, states_ptr, end_ptr,
    H, X_GROUP, N, D, DV, first, count,
    BACKWARDS: tl.constexpr, HAS_DECAY: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sum of x^T y over `count` chunks from chunk `first`, written before each chunk is added.

    Forwards: x = k, y = v. Backwards: x = q, y = the gradient of the output, from the last chunk to the first.
    """
    row = tl.program_id(0).to(tl.int64)
    d0, v0 = tl.program_id(1) * BD, tl.program_id(2) * BV
    tokens, d, dv = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV)
    rate = _rate(decay_ptr, row % H, HAS_DECAY)
    x_ptr += (row // X_GROUP) * N * D
    y_ptr += (row // X_GROUP) * N * DV
    size = D * DV
    running = _tile(start_ptr + row * size, d0, d, v0, dv, D, DV, tl.float32)
    for i in range(count):
        local = i
        if BACKWARDS:
            local = count - 1 - i
        _keep(states_ptr + (row * count + local) * size, running, d0, d, v0, dv, D, DV)
        t0 = (first + local) * C
        x = _tile(x_ptr, t0, tokens, d0, d, N, D, tl.float32)
        y = _tile(y_ptr, t0, tokens, v0, dv, N, DV, DOT)
        if HAS_DECAY:
            here = tl.minimum(N - t0, C)  # the last chunk may be shorter
            age = here - 1 - tokens
            if BACKWARDS:
                age = tokens + 1
            x = x * tl.exp(rate * tl.maximum(age, 0).to(tl.float32))[:, None]
            running = running * tl.exp(rate * here.to(tl.float32))
        running += tl.dot(tl.trans(x).to(DOT), y, input_precision=PRECISION)
    _keep(end_ptr + row * size, running, d0, d, v0, dv, D, DV)


@triton.jit
def _outputs(
    q_ptr, k_ptr, v_ptr, decay_ptr, states_ptr, out_ptr,
    H, GROUP, N, D, DV, first, count,
    HAS_DECAY: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk, one block of value columns: ((q k^T) * inside) v + decay * (q S)."""
    row, local = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    v0, t0 = tl.program_id(1) * BV, (first + local) * C
    tokens, d, dv = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV)
    rate = _rate(decay_ptr, row % H, HAS_DECAY)
    kv_row = row // GROUP
    state_ptr = states_ptr + (row * count + local) * D * DV
    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    for d0 in range(0, D, BD):
        q = _tile(q_ptr + row * N * D, t0, tokens, d0, d, N, D, DOT)
        k = _tile(k_ptr + kv_row * N * D, t0, tokens, d0, d, N, D, DOT)
        state = _tile(state_ptr, d0, d, v0, dv, D, DV, MIX)
        scores += tl.dot(q, tl.trans(k), input_precision=PRECISION)
        out += tl.dot(q.to(MIX), state, input_precision=PRECISION)
    if HAS_DECAY:
        out = out * tl.exp(rate * (tokens + 1).to(tl.float32))[:, None]
    v = _tile(v_ptr + kv_row * N * DV, t0, tokens, v0, dv, N, DV, MIX)
    scores = scores * _inside(rate, tokens, HAS_DECAY, False)
    out += tl.dot(scores.to(MIX), v, input_precision=PRECISION)
    _keep(out_ptr + row * N * DV, out, t0, tokens, v0, dv, N, DV)


@triton.jit
def _grad_qk(
    q_ptr, k_ptr, v_ptr, g_ptr, decay_ptr, states_ptr, grads_ptr, dq_ptr, dk_ptr,
    H, GROUP, N, D, DV, first, count,
    HAS_DECAY: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk of one chunk and one block of columns, from the state before it and the gradient of the state after it."""
    row, local = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    d0, t0 = tl.program_id(1) * BD, (first + local) * C
    tokens, d, dv = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV)
    rate = _rate(decay_ptr, row % H, HAS_DECAY)
    kv_row = row // GROUP
    at = (row * count + local) * D * DV
    back = tl.zeros([C, C], tl.float32)  # [query, key]
    dq = tl.zeros([C, BD], tl.float32)
    dk = tl.zeros([C, BD], tl.float32)
    for v0 in range(0, DV, BV):
        g = _tile(g_ptr + row * N * DV, t0, tokens, v0, dv, N, DV, DOT)
        v = _tile(v_ptr + kv_row * N * DV, t0, tokens, v0, dv, N, DV, DOT)
        state = _tile(states_ptr + at, d0, d, v0, dv, D, DV, MIX)
        grad = _tile(grads_ptr + at, d0, d, v0, dv, D, DV, MIX)
        back += tl.dot(g, tl.trans(v), input_precision=PRECISION)
        dq += tl.dot(g.to(MIX), tl.trans(state), input_precision=PRECISION)
        dk += tl.dot(v.to(MIX), tl.trans(grad), input_precision=PRECISION)
    if HAS_DECAY:
        dq = dq * tl.exp(rate * (tokens + 1).to(tl.float32))[:, None]
        age = tl.maximum(tl.minimum(N - t0, C) - 1 - tokens, 0)
        dk = dk * tl.exp(rate * age.to(tl.float32))[:, None]
    back = back * _inside(rate, tokens, HAS_DECAY, False)
    q = _tile(q_ptr + row * N * D, t0, tokens, d0, d, N, D, MIX)
    k = _tile(k_ptr + kv_row * N * D, t0, tokens, d0, d, N, D, MIX)
    dq += tl.dot(back.to(MIX), k, input_precision=PRECISION)
    dk += tl.dot(tl.trans(back).to(MIX), q, input_precision=PRECISION)
    _keep(dq_ptr + row * N * D, dq, t0, tokens, d0, d, N, D)
    _keep(dk_ptr + row * N * D, dk, t0, tokens, d0, d, N, D)


@triton.jit
def _grad_v(
    q_ptr, k_ptr, g_ptr, decay_ptr, grads_ptr, dv_ptr,
    H, GROUP, N, D, DV, first, count,
    HAS_DECAY: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one chunk and one block of value columns."""
    row, local = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    v0, t0 = tl.program_id(1) * BV, (first + local) * C
    tokens, d, dv = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV)
    rate = _rate(decay_ptr, row % H, HAS_DECAY)
    kv_row = row // GROUP
    grad_ptr = grads_ptr + (row * count + local) * D * DV
    scores = tl.zeros([C, C], tl.float32)  # [key, query]
    out = tl.zeros([C, BV], tl.float32)
    for d0 in range(0, D, BD):
        q = _tile(q_ptr + row * N * D, t0, tokens, d0, d, N, D, DOT)
        k = _tile(k_ptr + kv_row * N * D, t0, tokens, d0, d, N, D, DOT)
        grad = _tile(grad_ptr, d0, d, v0, dv, D, DV, MIX)
        scores += tl.dot(k, tl.trans(q), input_precision=PRECISION)
        out += tl.dot(k.to(MIX), grad, input_precision=PRECISION)
    if HAS_DECAY:
        age = tl.maximum(tl.minimum(N - t0, C) - 1 - tokens, 0)
        out = out * tl.exp(rate * age.to(tl.float32))[:, None]
    g = _tile(g_ptr + row * N * DV, t0, tokens, v0, dv, N, DV, MIX)
    scores = scores * _inside(rate, tokens, HAS_DECAY, True)
    out += tl.dot(scores.to(MIX), g, input_precision=PRECISION)
    _keep(dv_ptr + row * N * DV, out, t0, tokens, v0, dv, N, DV)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class _Launch:
    """Sizes, dtypes and segments of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, chunk: int, segment: int | None):
        self.batch, self.heads, self.length, self.dim = q.shape
        self.value_dim = v.shape[-1]
        self.group = self.heads // k.shape[1]
        self.rows = self.batch * self.heads
        self.log_decay = None if log_decay is None else log_decay.detach().float().contiguous()
        self.chunk = max(16, min(128, triton.next_power_of_2(chunk)))
        self.block_d = max(16, min(64, triton.next_power_of_2(self.dim)))
        self.block_v = max(16, min(64, triton.next_power_of_2(self.value_dim)))
        # DOT: products of two inputs. MIX: products of an input with a float32 sum, where float16 could overflow.
        self.dot, self.mix, self.precision, self.state_dtype = {
            torch.float32: (tl.float32, tl.float32, "ieee", torch.float32),
            torch.bfloat16: (tl.bfloat16, tl.bfloat16, "ieee", torch.bfloat16),
            torch.float16: (tl.float16, tl.float32, "tf32", torch.float32),
        }[q.dtype]
        if _interpreted() and q.dtype == torch.bfloat16:  # the interpreter multiplies bfloat16 as integers
            self.dot = self.mix = tl.float32
        chunks = triton.cdiv(self.length, self.chunk)
        step = segment or max(8, min(128, 4096 // max(1, self.rows)))
        self.segments = [(first, min(step, chunks - first)) for first in range(0, chunks, step)]
        self.sizes = (self.length, self.dim, self.value_dim)

    def constants(self, mix: bool = True) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "HAS_DECAY": self.log_decay is not None, "C": self.chunk, "BD": self.block_d, "BV": self.block_v,
            "PRECISION": self.precision, "DOT": self.dot if mix else self.mix, "num_warps": 4,
        }  # fmt: skip
        return {**shared, "MIX": self.mix} if mix else shared

    def grid(self, count: int, *, values: bool) -> tuple[int, int]:
        width, block = (self.value_dim, self.block_v) if values else (self.dim, self.block_d)
        return self.rows * count, triton.cdiv(width, block)

    def states(
        self, x: Tensor, y: Tensor, start: Tensor, first: int, count: int, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        """States before each chunk of the segment (after it, when backwards) and the one that the next segment starts from."""
        before = torch.empty(self.rows, count, self.dim, self.value_dim, dtype=self.state_dtype, device=x.device)
        end = torch.empty_like(start)
        grid = (self.rows, triton.cdiv(self.dim, self.block_d), triton.cdiv(self.value_dim, self.block_v))
        decay = start if self.log_decay is None else self.log_decay
        _states[grid](
            x, y, decay, start, before, end, self.heads, 1 if backwards else self.group, *self.sizes, first, count,
            BACKWARDS=backwards, **self.constants(mix=False),
        )  # fmt: skip
        return before, end


class _ChunkTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, chunk: int,
        dtype: torch.dtype, segment: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        launch = _Launch(q, k, v, log_decay, chunk, segment)
        shape = (launch.batch, launch.heads, launch.dim, launch.value_dim)
        running = q.new_zeros(shape, dtype=torch.float32) if state is None else state.float().contiguous()
        out = q.new_empty(*q.shape[:3], launch.value_dim, dtype=dtype)
        starts = []
        decay = running if launch.log_decay is None else launch.log_decay
        for first, count in launch.segments:
            starts.append(running)
            before, running = launch.states(k, v, running, first, count, backwards=False)
            _outputs[launch.grid(count, values=True)](
                q,
                k,
                v,
                decay,
                before,
                out,
                launch.heads,
                launch.group,
                *launch.sizes,
                first,
                count,
                **launch.constants(),
            )
        ctx.save_for_backward(q, k, v, log_decay, *starts)
        ctx.options = (chunk, segment, state is not None)
        return out, running if launch.segments else running.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, *starts = ctx.saved_tensors
        chunk, segment, has_state = ctx.options
        launch = _Launch(q, k, v, log_decay, chunk, segment)
        g = grad_out.contiguous()
        running = grad_state.float().contiguous()
        split = launch.group > 1  # a kv head sums over its group: keep its parts in float32
        dq = torch.empty_like(q)
        dk = torch.empty(q.shape, dtype=torch.float32 if split else k.dtype, device=q.device)
        dv = torch.empty(g.shape, dtype=torch.float32 if split else v.dtype, device=q.device)
        decay = running if launch.log_decay is None else launch.log_decay
        tail, constants = (launch.heads, launch.group, *launch.sizes), launch.constants()
        for (first, count), start in zip(reversed(launch.segments), reversed(starts)):
            before, _ = launch.states(k, v, start, first, count, backwards=False)
            grads, running = launch.states(q, g, running, first, count, backwards=True)
            _grad_qk[launch.grid(count, values=False)](
                q, k, v, g, decay, before, grads, dq, dk, *tail, first, count, **constants
            )
            _grad_v[launch.grid(count, values=True)](q, k, g, decay, grads, dv, *tail, first, count, **constants)
        if split:
            dk, dv = (x.unflatten(1, (-1, launch.group)).sum(2) for x in (dk, dv))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, running if has_state else None, None, None, None


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot run on these inputs, or None."""
    if not q.is_cuda and not _interpreted():
        return "triton needs a CUDA GPU (or TRITON_INTERPRET=1 to run its interpreter on the CPU)"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 or bfloat16, not {q.dtype}"
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "its kernels are not defined on empty tensors"
    return None


def chunk_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `regard.ops.state.chunk.chunk_fixed`, float32 states. chunk_size is taken as a power of two in 16..128; `segment`
    is the number of chunks whose states are held at a time (None: by the number of heads)."""
    return _ChunkTriton.apply(q, k, v, log_decay, state, chunk_size, dtype, segment)  # type: ignore[no-any-return]
