"""The Triton kernels behind `triton.py`: forward, dq, and dk/dv over a `BlockPlan`. Softmax in float32, base 2 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import BlockPlan

_LOG2E = 1.4426950408889634


@triton.jit
def _tile_mask(tile, tiles_ptr, rows, cols, row_ok, col_ok, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Allowed pairs of one block: inside the lengths and, for a mixed block, set in its tile."""
    keep = row_ok[:, None] & col_ok[None, :]
    offsets = tile.to(tl.int64) * BLOCK_M * BLOCK_N + rows[:, None] * BLOCK_N + cols[None, :]
    mixed = (rows * 0 + tile) >= 0
    bits = tl.load(tiles_ptr + offsets, mask=keep & mixed[:, None], other=1)
    return keep & (bits != 0)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lists_ptr, tiles_of_ptr, counts_ptr, tiles_ptr,
    H, HKV, N, M, D, DV, NUM_Q, WIDTH, PLAN_H, PLAN_B_DIV, PLAN_H_DIV, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    bkv = b * HKV + h // (H // HKV)
    row_list = ((b // PLAN_B_DIV) * PLAN_H + h // PLAN_H_DIV) * NUM_Q + i

    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row = i * BLOCK_M + rows
    row_ok = row < N
    q = tl.load(
        q_ptr + (bh * N + row[:, None]) * D + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0
    ).to(DOT)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    count = tl.load(counts_ptr + row_list)
    for s in range(count):
        j = tl.load(lists_ptr + row_list * WIDTH + s)
        tile = tl.load(tiles_of_ptr + row_list * WIDTH + s)
        col = j * BLOCK_N + cols
        col_ok = col < M
        k = tl.load(
            k_ptr + (bkv * M + col[None, :]) * D + d[:, None], mask=col_ok[None, :] & (d < D)[:, None], other=0.0
        ).to(DOT)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        keep = _tile_mask(tile, tiles_ptr, rows, cols, row_ok, col_ok, BLOCK_M, BLOCK_N)
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - safe_top[:, None])
        decay = tl.exp2(top - safe_top)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(
            v_ptr + (bkv * M + col[:, None]) * DV + dv[None, :], mask=col_ok[:, None] & (dv < DV)[None, :], other=0.0
        ).to(DOT)
        acc = acc * decay[:, None] + tl.dot(p.to(DOT), v, input_precision=PRECISION)
        top = new_top

    seen = total > 0.0
    safe_total = tl.where(seen, total, 1.0)
    out = acc / safe_total[:, None]
    lse = tl.where(seen, (top + tl.log2(safe_total)) * 0.6931471805599453, float("-inf"))
    tl.store(
        out_ptr + (bh * N + row[:, None]) * DV + dv[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (dv < DV)[None, :],
    )
    tl.store(lse_ptr + bh * N + row, lse, mask=row_ok)


@triton.jit
def _dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, lists_ptr, tiles_of_ptr, counts_ptr, tiles_ptr,
    H, HKV, N, M, D, DV, NUM_Q, WIDTH, PLAN_H, PLAN_B_DIV, PLAN_H_DIV, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    bkv = b * HKV + h // (H // HKV)
    row_list = ((b // PLAN_B_DIV) * PLAN_H + h // PLAN_H_DIV) * NUM_Q + i

    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    row = i * BLOCK_M + rows
    row_ok = row < N
    q_mask = row_ok[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (bh * N + row[:, None]) * D + d[None, :], mask=q_mask, other=0.0).to(DOT)
    do = tl.load(
        do_ptr + (bh * N + row[:, None]) * DV + dv[None, :], mask=row_ok[:, None] & (dv < DV)[None, :], other=0.0
    ).to(DOT)
    lse = tl.load(lse_ptr + bh * N + row, mask=row_ok, other=0.0)
    delta = tl.load(delta_ptr + bh * N + row, mask=row_ok, other=0.0)
    safe_lse = tl.where(lse == float("-inf"), 0.0, lse)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    count = tl.load(counts_ptr + row_list)
    for s in range(count):
        j = tl.load(lists_ptr + row_list * WIDTH + s)
        tile = tl.load(tiles_of_ptr + row_list * WIDTH + s)
        col = j * BLOCK_N + cols
        col_ok = col < M
        k = tl.load(
            k_ptr + (bkv * M + col[:, None]) * D + d[None, :], mask=col_ok[:, None] & (d < D)[None, :], other=0.0
        ).to(DOT)
        v = tl.load(
            v_ptr + (bkv * M + col[:, None]) * DV + dv[None, :], mask=col_ok[:, None] & (dv < DV)[None, :], other=0.0
        ).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        keep = _tile_mask(tile, tiles_ptr, rows, cols, row_ok, col_ok, BLOCK_M, BLOCK_N)
        p = tl.where(keep, tl.exp2((scores - safe_lse[:, None]) * 1.4426950408889634), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        dq += tl.dot(ds.to(DOT), k, input_precision=PRECISION)
    tl.store(dq_ptr + (bh * N + row[:, None]) * D + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lists_ptr, tiles_of_ptr, counts_ptr, tiles_ptr,
    H, HKV, N, M, D, DV, NUM_K, WIDTH, PLAN_H, PLAN_B_DIV, PLAN_H_DIV, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    bkv = tl.program_id(1).to(tl.int64)
    b, hkv = bkv // HKV, bkv % HKV
    group = H // HKV

    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    col = j * BLOCK_N + cols
    col_ok = col < M
    k_mask, v_mask = col_ok[:, None] & (d < D)[None, :], col_ok[:, None] & (dv < DV)[None, :]
    k = tl.load(k_ptr + (bkv * M + col[:, None]) * D + d[None, :], mask=k_mask, other=0.0).to(DOT)
    v = tl.load(v_ptr + (bkv * M + col[:, None]) * DV + dv[None, :], mask=v_mask, other=0.0).to(DOT)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(group):
        h = hkv * group + g
        bh = b * H + h
        col_list = ((b // PLAN_B_DIV) * PLAN_H + h // PLAN_H_DIV) * NUM_K + j
        count = tl.load(counts_ptr + col_list)
        for s in range(count):
            i = tl.load(lists_ptr + col_list * WIDTH + s)
            tile = tl.load(tiles_of_ptr + col_list * WIDTH + s)
            row = i * BLOCK_M + rows
            row_ok = row < N
            q = tl.load(
                q_ptr + (bh * N + row[:, None]) * D + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0
            ).to(DOT)
            do = tl.load(
                do_ptr + (bh * N + row[:, None]) * DV + dv[None, :],
                mask=row_ok[:, None] & (dv < DV)[None, :],
                other=0.0,
            ).to(DOT)
            lse = tl.load(lse_ptr + bh * N + row, mask=row_ok, other=0.0)
            delta = tl.load(delta_ptr + bh * N + row, mask=row_ok, other=0.0)
            safe_lse = tl.where(lse == float("-inf"), 0.0, lse)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            keep = _tile_mask(tile, tiles_ptr, rows, cols, row_ok, col_ok, BLOCK_M, BLOCK_N)
            p = tl.where(keep, tl.exp2((scores - safe_lse[:, None]) * 1.4426950408889634), 0.0)
            dv_acc += tl.dot(tl.trans(p.to(DOT)), do, input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None]) * scale
            dk_acc += tl.dot(tl.trans(ds.to(DOT)), q, input_precision=PRECISION)
    tl.store(dk_ptr + (bkv * M + col[:, None]) * D + d[None, :], dk_acc.to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + (bkv * M + col[:, None]) * DV + dv[None, :], dv_acc.to(dv_ptr.dtype.element_ty), mask=v_mask)


def _dot_dtype(q: Tensor) -> tl.dtype:
    """Type of matrix-product operands. The interpreter multiplies bfloat16 as integers, so there it is widened."""
    if q.dtype == torch.bfloat16:
        return tl.bfloat16 if q.is_cuda else tl.float32
    return tl.float16 if q.dtype == torch.float16 else tl.float32


def _geometry(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, backward: bool) -> dict:
    head_dim, value_dim = q.shape[3], v.shape[3]
    wide = max(head_dim, value_dim) > 64
    return {
        "BLOCK_M": plan.block_q,
        "BLOCK_N": plan.block_k,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        # exact float32 products for float32 input: tf32 would not be the same operation
        "PRECISION": "ieee",
        "DOT": _dot_dtype(q),
        "num_warps": 8 if wide and plan.block_q * plan.block_k >= 128 * 64 else 4,
        "num_stages": 2 if backward or wide else 3,
    }


def _shared(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, blocks: int, width: int) -> list[int]:
    batch, num_heads, q_len, head_dim = q.shape
    plan_batch, plan_heads = plan.kv_blocks.shape[:2]
    return [
        num_heads, k.shape[1], q_len, k.shape[2], head_dim, v.shape[3], blocks, width,
        plan_heads, batch // plan_batch, num_heads // plan_heads,
    ]  # fmt: skip


def _lists(lists: Tensor, tiles_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = (lists >= 0).sum(-1).int().contiguous()
    return lists.int().contiguous(), tiles_of.int().contiguous(), counts


def launch_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: BlockPlan, scale: float) -> None:
    """Fill `out` and `lse` (float32, natural log). All tensors contiguous."""
    lists, tiles_of, counts = _lists(plan.kv_blocks, plan.tiles_of)
    grid = (plan.num_q_blocks, q.shape[0] * q.shape[1])
    _forward[grid](
        q, k, v, out, lse, lists, tiles_of, counts, plan.tiles.byte().contiguous(),
        *_shared(q, k, v, plan, plan.num_q_blocks, lists.shape[-1]), scale * _LOG2E, **_geometry(q, k, v, plan, False),
    )  # fmt: skip


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, plan: BlockPlan, scale: float,
) -> None:  # fmt: skip
    """Fill `dq`, `dk`, `dv`; `delta` is rowsum(dO * O) less any gradient on the lse. All tensors contiguous."""
    tiles = plan.tiles.byte().contiguous()
    geometry = _geometry(q, k, v, plan, True)
    lists, tiles_of, counts = _lists(plan.kv_blocks, plan.tiles_of)
    _dq[(plan.num_q_blocks, q.shape[0] * q.shape[1])](
        q, k, v, grad_out, lse, delta, dq, lists, tiles_of, counts, tiles,
        *_shared(q, k, v, plan, plan.num_q_blocks, lists.shape[-1]), scale, **geometry,
    )  # fmt: skip
    lists, tiles_of, counts = _lists(*plan.transposed())
    _dkdv[(plan.num_k_blocks, k.shape[0] * k.shape[1])](
        q, k, v, grad_out, lse, delta, dk, dv, lists, tiles_of, counts, tiles,
        *_shared(q, k, v, plan, plan.num_k_blocks, lists.shape[-1]), scale, **geometry,
    )  # fmt: skip
