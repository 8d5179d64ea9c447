"""FlashAttention by its formulas: exact attention in tiles, forward and backward, and a count of what the tiles move.

FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (Dao et al., 2022, arXiv 2205.14135) and FlashAttention-2
(Dao, 2023, arXiv 2307.08691). Code read for numbers: Dao-AILab/flash-attention at 0251105 (BSD-3), `flash_attn/utils/testing.py`.
This is the specification that kernels are held to, and the meter of their traffic; `attention()` has the fast ways to the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor
from .attention import attention_request
from .masks import Mask
from .reference import accumulation_dtype
from .selection import Selection

__all__ = ["TileTraffic", "flash_tiles", "tiled_attention"]


@dataclass
class TileTraffic:
    """Elements moved between slow and fast memory, by tensor, as counted tile by tile. Add up calls by passing the same object."""

    forward_reads: Counter[str] = field(default_factory=Counter)
    forward_writes: Counter[str] = field(default_factory=Counter)
    backward_reads: Counter[str] = field(default_factory=Counter)
    backward_writes: Counter[str] = field(default_factory=Counter)
    tiles: int = 0
    """Tiles of scores computed in the forward pass."""

    @property
    def forward(self) -> int:
        return self.forward_reads.total() + self.forward_writes.total()

    @property
    def backward(self) -> int:
        return self.backward_reads.total() + self.backward_writes.total()


def flash_tiles(sram: int, head_dim: int) -> tuple[int, int]:
    """(block_q, block_k) for a fast memory of `sram` elements: block_k = ceil(sram / 4 d), block_q = min(block_k, d), as in the paper."""
    require_int("head_dim", head_dim, 1)
    block_k = -(-require_int("sram", sram, 1) // (4 * head_dim))
    return min(block_k, head_dim), block_k


@dataclass
class _Call:
    mask: Mask | None
    score_mod: Callable[..., Tensor] | None
    kept: Tensor | None
    block_q: int
    block_k: int
    q_offset: int
    scale: float
    dropout: float
    dropout_mask: Tensor | None
    seed: int
    outer: str
    traffic: TileTraffic | None


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    sram: int | None = None,
    mask: Mask | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    bias: Tensor | None = None,
    block_mask: Selection | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_mask: Tensor | None = None,
    variant: str = "released",
    traffic: TileTraffic | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention in tiles of `block_q` queries by `block_k` keys, with the backward pass of the paper; available as
    `regard.ops.reference.flash_attention`.

    Args:
        q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), mask, score_mod, bias, q_offset, scale: as in `regard.ops.attention`.
        block_q, block_k: tile sizes; default those of `block_mask`, else of `sram`, else 64. sram: elements of fast memory (`flash_tiles`).
        block_mask: tiles that are computed at all (block-sparse FlashAttention); its block sizes must be the tile sizes.
        dropout: probability of dropping a weight, in [0, 1). Each tile's mask is drawn again in the backward pass from a seed that is
            taken from torch's generator. dropout_mask: bool, broadcastable to (B, H, N, M), True = kept, instead of drawing.
        variant: which loop is outside: "released" queries (FlashAttention-2: the output is divided once and written once), "paper" keys
            (FlashAttention: kept normalized in slow memory, read and written for each key tile). Same numbers, other traffic.
        traffic: counts what is moved, also in the backward pass.

    Returns: (B, H, N, Dv); with `return_lse` also (B, H, N). Rows that see nothing: zeros, -inf, zero gradients. Differentiable
    once, in q, k, v, bias and the tensors that score_mod names.
    """
    request = attention_request(
        q, k, v, mask=mask, score_mod=score_mod, bias=bias, selection=block_mask, q_offset=q_offset, scale=scale,
        dropout=dropout, return_lse=return_lse,
    )  # fmt: skip
    require_name("variant", variant, ("released", "paper"))
    if block_mask is not None:
        own = (block_mask.block_q, block_mask.block_k)
        given = (block_q or own[0], block_k or own[1])
        require(given == own, "block_q, block_k", given, f"the tiles of block_mask, {own}")
        block_q, block_k = own
    if sram is not None:
        require(block_q is None and block_k is None, "sram", sram, "either sram or tile sizes, not both")
        block_q, block_k = flash_tiles(sram, q.shape[3])
    block_q, block_k = require_int("block_q", block_q or 64, 1), require_int("block_k", block_k or 64, 1)
    if dropout_mask is not None:
        full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        require_tensor("dropout_mask", dropout_mask)
        try:
            dropout_mask = dropout_mask.to(torch.bool).expand(full)
        except RuntimeError:
            require(False, "dropout_mask", f"shape {tuple(dropout_mask.shape)}", f"broadcastable to {full}")
    kept = None if block_mask is None else block_mask.to(q.device).block_map()
    if kept is not None and kept.shape[1] not in (1, q.shape[1]):
        kept = kept.repeat_interleave(q.shape[1] // kept.shape[1], dim=1)
    call = _Call(
        request.mask, score_mod, kept, block_q, block_k, request.q_offset, request.scale, request.dropout, dropout_mask,
        int(torch.randint(1 << 40, ())) if dropout > 0.0 and dropout_mask is None else 0,
        "queries" if variant == "released" else "keys", traffic,
    )  # fmt: skip
    tensors = tuple(getattr(score_mod, "tensors", ()))
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    out, lse = _Tiled.apply(q, k, v, bias, call, *tensors)
    return (out, lse) if return_lse else out


class _Tiles:
    """The tiles of one call, in the arithmetic's type, with the kv heads' groups as an axis: q (B, Hkv, G, r, D), k (B, Hkv, 1, c, D)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: _Call) -> None:
        self.call, self.dtype = call, accumulation_dtype(q.dtype)
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.q_len, self.kv_len = q.shape[2], k.shape[2]
        self.q, self.k, self.v = self.grouped(q), k.to(self.dtype)[:, :, None], v.to(self.dtype)[:, :, None]
        self.bias = None if bias is None else bias.detach()
        self.rows = [slice(i, min(i + call.block_q, self.q_len)) for i in range(0, self.q_len, call.block_q)]
        self.columns = [slice(j, min(j + call.block_k, self.kv_len)) for j in range(0, self.kv_len, call.block_k)]

    def grouped(self, x: Tensor) -> Tensor:
        """(B, H, ...) as (B, Hkv, G, ...) in the arithmetic's type."""
        return x.to(self.dtype).unflatten(1, (self.kv_heads, self.heads // self.kv_heads))

    def pairs(self, outer: str) -> list[tuple[int, int]]:
        """(i, j) of the tiles to compute, the outer loop's number changing last."""
        kept = self.call.kept
        every = [(i, j) for i in range(len(self.rows)) for j in range(len(self.columns))]
        chosen = every if kept is None else [(i, j) for i, j in every if bool(kept[:, :, i, j].any())]
        return chosen if outer == "queries" else sorted(chosen, key=lambda pair: (pair[1], pair[0]))

    def raw(self, i: int, j: int) -> Tensor:
        """scale * q k^T of one tile, (B, Hkv, G, r, c)."""
        return self.q[..., self.rows[i], :] @ self.k[..., self.columns[j], :].mT * self.call.scale

    def modified(self, raw: Tensor, i: int, j: int) -> Tensor:
        """Score mod and bias."""
        if self.call.score_mod is not None:
            scores = self.call.score_mod(raw.flatten(1, 2), *self.positions(i, j))
            raw = torch.broadcast_to(scores, raw.flatten(1, 2).shape).unflatten(1, raw.shape[1:3])
        if self.bias is not None:
            part = self.bias[:, :, self.rows[i] if self.bias.shape[2] > 1 else slice(None)]
            part = part[..., self.columns[j] if self.bias.shape[3] > 1 else slice(None)].to(self.dtype)
            raw = raw + (part.unflatten(1, raw.shape[1:3]) if part.shape[1] > 1 else part[:, :, None])
        return raw

    def positions(self, i: int, j: int) -> tuple[Tensor, ...]:
        device = self.q.device
        query = torch.arange(self.rows[i].start, self.rows[i].stop, device=device) + self.call.q_offset
        key = torch.arange(self.columns[j].start, self.columns[j].stop, device=device)
        batch, head = torch.arange(self.q.shape[0], device=device), torch.arange(self.heads, device=device)
        return batch.view(-1, 1, 1, 1), head.view(1, -1, 1, 1), query.view(1, 1, -1, 1), key.view(1, 1, 1, -1)

    def forbidden(self, scores: Tensor, i: int, j: int) -> Tensor:
        """`scores` with -inf where mask or block mask say so."""
        keep = None if self.call.mask is None else self.call.mask.keep(*self.positions(i, j))
        if self.call.kept is not None:
            chosen = self.call.kept[:, :, i, j, None, None]
            keep = chosen if keep is None else keep & chosen
        if keep is None:
            return scores
        keep = keep.expand(*keep.shape[:1], *keep.shape[1:2], *scores.shape[3:])
        keep = keep.unflatten(1, scores.shape[1:3]) if keep.shape[1] > 1 else keep[:, :, None]
        return scores.masked_fill(~keep, -torch.inf)

    def noise(self, i: int, j: int, like: Tensor) -> Tensor | None:
        """Factors 0 or 1 / (1 - dropout) of one tile: given, or drawn from the call's seed and the tile's number."""
        call = self.call
        if call.dropout_mask is not None:
            kept = call.dropout_mask[:, :, self.rows[i], self.columns[j]].unflatten(1, like.shape[1:3])
            return kept.to(self.dtype) / (1.0 - call.dropout)
        if call.dropout == 0.0:
            return None
        generator = torch.Generator(like.device).manual_seed(call.seed + i * len(self.columns) + j)
        return torch.empty_like(like).bernoulli_(1.0 - call.dropout, generator=generator) / (1.0 - call.dropout)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: _Call, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(q, k, v, bias, call)
        out = tiles.q.new_zeros((*tiles.q.shape[:4], v.shape[3]))
        top = tiles.q.new_full(tiles.q.shape[:4], -torch.inf)
        total = torch.zeros_like(top)
        reads, writes = (
            (Counter(), Counter())
            if call.traffic is None
            else (call.traffic.forward_reads, call.traffic.forward_writes)
        )
        pairs, held = tiles.pairs(call.outer), -1
        for i, j in pairs:
            row, column = tiles.rows[i], tiles.columns[j]
            scores = tiles.forbidden(tiles.modified(tiles.raw(i, j), i, j), i, j)
            before = top[..., row].clone()
            now = torch.maximum(before, scores.amax(-1))
            base = now.masked_fill(now == -torch.inf, 0.0)
            weights = torch.exp(scores - base[..., None])
            shrink = torch.exp(before - base)
            noise = tiles.noise(i, j, weights)
            added = (weights if noise is None else weights * noise) @ tiles.v[..., column, :]
            sums = shrink * total[..., row] + weights.sum(-1)
            if call.outer == "keys":  # normalized all the time
                known = torch.where(sums > 0, sums, 1.0)
                out[..., row, :] = ((shrink * total[..., row])[..., None] * out[..., row, :] + added) / known[..., None]
            else:
                out[..., row, :] = shrink[..., None] * out[..., row, :] + added
            top[..., row], total[..., row] = now, sums
            if call.outer == "keys":
                if j != held:
                    reads.update(k=tiles.k[..., column, :].numel(), v=tiles.v[..., column, :].numel())
                moved = {"out": out[..., row, :].numel(), "statistics": 2 * now.numel()}
                reads.update(q=tiles.q[..., row, :].numel(), **moved)
                writes.update(**moved)
                held = j
            else:
                if i != held:
                    reads.update(q=tiles.q[..., row, :].numel())
                    writes.update(out=out[..., row, :].numel(), lse=now.numel())
                reads.update(k=tiles.k[..., column, :].numel(), v=tiles.v[..., column, :].numel())
                held = i
        if call.outer == "queries":
            out = out / torch.where(total > 0, total, 1.0)[..., None]
        if call.traffic is not None:
            call.traffic.tiles += len(pairs)
        lse = (top + total.log()).flatten(1, 2)
        out = out.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, out, lse, *tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse, *_ = ctx.saved_tensors
        call: _Call = ctx.call
        named = tuple(getattr(call.score_mod, "tensors", ()))
        tiles = _Tiles(q, k, v, bias, call)
        grad = tiles.grouped(torch.zeros_like(out) if grad_out is None else grad_out)
        # rowsum(dO * O); a gradient of the log-sum-exp acts on each weight as its negative
        delta = (grad * tiles.grouped(out)).sum(-1)
        if grad_lse is not None:
            delta = delta - tiles.grouped(grad_lse)
        base = tiles.grouped(lse)
        delta, base = (x.masked_fill(base == -torch.inf, 0.0) for x in (delta, base))
        dq, dk, dv = torch.zeros_like(tiles.q), torch.zeros_like(tiles.k), torch.zeros_like(tiles.v)
        dbias = torch.zeros_like(bias, dtype=tiles.dtype) if bias is not None and ctx.needs_input_grad[3] else None
        dnamed: list[Tensor | None] = [None] * len(named)
        reads, writes = (
            (Counter(), Counter())
            if call.traffic is None
            else (call.traffic.backward_reads, call.traffic.backward_writes)
        )
        held = -1
        for i, j in tiles.pairs("keys"):
            row, column = tiles.rows[i], tiles.columns[j]
            with torch.enable_grad():
                raw = tiles.raw(i, j).detach().requires_grad_(call.score_mod is not None)
                modified = tiles.modified(raw, i, j)
            weights = torch.exp(tiles.forbidden(modified.detach(), i, j) - base[..., row, None])
            noise = tiles.noise(i, j, weights)
            gradient, values = grad[..., row, :], tiles.v[..., column, :]
            dropped = weights if noise is None else weights * noise
            dv[..., column, :] += (dropped.mT @ gradient).sum(2, keepdim=True)
            dweights = gradient @ values.mT
            dscores = weights * ((dweights if noise is None else dweights * noise) - delta[..., row, None])
            if dbias is not None:
                _add_to_bias(dbias, dscores.flatten(1, 2), row, column)
            if call.score_mod is not None:
                dscores = _through(modified, raw, named, dscores, dnamed)
            dq[..., row, :] += call.scale * (dscores @ tiles.k[..., column, :])
            dk[..., column, :] += call.scale * (dscores.mT @ tiles.q[..., row, :]).sum(2, keepdim=True)
            if j != held:
                moved = {"k": dk[..., column, :].numel(), "v": dv[..., column, :].numel()}
                reads.update(moved)
                writes.update({f"d{name}": count for name, count in moved.items()})
                held = j
            size = tiles.q[..., row, :].numel()
            reads.update(q=size, dq=size, dout=gradient.numel(), statistics=2 * delta[..., row].numel())
            writes.update(dq=size)
        unread = [torch.zeros_like(x) if g is None and x.requires_grad else g for x, g in zip(named, dnamed)]
        return (
            dq.flatten(1, 2).to(q.dtype), dk[:, :, 0].to(k.dtype), dv[:, :, 0].to(v.dtype),
            None if dbias is None else dbias.to(bias.dtype), None, *unread,
        )  # fmt: skip


def _add_to_bias(dbias: Tensor, dscores: Tensor, row: slice, column: slice) -> None:
    axes = [axis for axis in range(4) if dbias.shape[axis] == 1]
    part = dscores.sum(axes, keepdim=True) if axes else dscores
    rows = row if dbias.shape[2] > 1 else slice(None)
    dbias[:, :, rows, column if dbias.shape[3] > 1 else slice(None)] += part


def _through(
    modified: Tensor, raw: Tensor, named: tuple[Tensor, ...], grad: Tensor, totals: list[Tensor | None]
) -> Tensor:
    """The gradient of a tile's raw scores from that of its modified ones; those of the score mod's tensors are added to `totals`."""
    if not modified.requires_grad:
        return torch.zeros_like(grad)
    wanted = [number for number, tensor in enumerate(named) if tensor.requires_grad]
    first, *others = torch.autograd.grad(modified, [raw, *(named[n] for n in wanted)], grad, allow_unused=True)
    for number, part in zip(wanted, others):
        have = totals[number]
        totals[number] = part if have is None else (have if part is None else have + part)
    return torch.zeros_like(grad) if first is None else first
