"""Forward and backward of blocked CPU attention over a list of pieces. See `cpu_pieces.py` for what a piece is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_frame import Frame
from .cpu_pieces import Gather, Piece

_LOG2_E = math.log2(math.e)


class Grads(NamedTuple):
    """Gradients, None where not wanted. `tensors`: of what the score mod reads."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    tensors: list[Tensor | None]


def forward(
    frame: Frame, pieces: Sequence[Piece], q: Tensor, k: Tensor, v: Tensor, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out (B, H, N, Dv) in q's type, lse (B, H, N) or None)."""
    whole, written = _extent(pieces)
    queries, keys, values = frame.rows(q), frame.keys(k), frame.keys(v)
    out = frame.new_rows(v.shape[3], q.dtype, whole, written)
    lse = frame.new_rows(1, frame.dtype, whole, written, -torch.inf) if want_lse else None
    noise = _Noise(frame)
    for piece in pieces:
        rows, their_keys = piece.rows(queries, frame, "q"), piece.keys(keys, frame, "k")
        scores = _modified(piece, _raw_scores(piece, rows, their_keys, frame), frame)
        weights = _weigh(piece, scores, frame)
        if lse is not None:
            piece.put(lse, weights.lse())
        factor = noise.draw(weights.values)
        kept = weights.values if factor is None else weights.values.mul_(factor)
        n, g, r, _ = piece.shape
        result = frame.scratch("out", n, g * r, v.shape[3])
        piece.put(out, torch.bmm(kept, piece.keys(values, frame, "v"), out=result), weights.total)
    return out.result(q.dtype), None if lse is None else lse.result(frame.dtype)[..., 0]


def backward(
    frame: Frame,
    pieces: Sequence[Piece],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
    tensors: Sequence[Tensor],
) -> Grads:
    """Gradients of q, k, v, bias (as `wanted` says) and of the score mod's `tensors`, by computing the weights once more."""
    whole, written = _extent(pieces)
    queries, keys, values, upstream = frame.rows(q), frame.keys(k), frame.keys(v), frame.rows(grad_out)
    upstream_lse = None if grad_lse is None else frame.rows(grad_lse[..., None].to(frame.dtype))
    dq = frame.new_rows(q.shape[3], q.dtype, whole, written) if wanted[0] else None
    dk = frame.new_keys(k.shape[3], whole) if wanted[1] else None
    dv = frame.new_keys(v.shape[3], whole) if wanted[2] else None
    bias, scale = frame.options.bias, frame.options.scale
    dbias = torch.zeros(bias.shape, dtype=frame.dtype) if wanted[3] and bias is not None else None
    dtensors: list[Tensor | None] = [None] * len(tensors)
    noise = _Noise(frame)
    for piece in pieces:
        rows, their_keys = piece.rows(queries, frame, "q"), piece.keys(keys, frame, "k")
        grad_rows, their_values = piece.rows(upstream, frame, "dout"), piece.keys(values, frame, "v")
        scores = _raw_scores(piece, rows, their_keys, frame)
        graph = None
        if frame.options.score_mod is not None:
            graph = _Graph(piece, scores, frame, tensors)
            scores = graph.modified.detach().clone()
        weighed = _weigh(piece, scores, frame)
        weights = weighed.values.mul_(weighed.total.reciprocal())
        factor = noise.draw(weights)
        if dv is not None:
            piece.add_product(dv, weights if factor is None else weights * factor, grad_rows, 1.0, frame)
        n, g, r, w = piece.shape
        dweights = torch.bmm(grad_rows, their_values.mT, out=frame.scratch("dweights", n, g * r, w))
        if factor is not None:
            dweights.mul_(factor)
        dscores = torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, frame.dtype, grad_input=dweights)
        if upstream_lse is not None:
            per_row = piece.rows(upstream_lse, frame, "dlse")
            per_row = per_row if weighed.empty is None else per_row.masked_fill(weighed.empty, 0.0)
            dscores.addcmul_(weights, per_row)
        if dbias is not None:
            piece.add_to(dbias, dscores.view(piece.shape), frame.geometry)
        if graph is not None:
            dscores = graph.backward(dscores, dtensors)
        if dq is not None:
            grad = frame.scratch("out", n, g * r, q.shape[3])
            piece.put(dq, torch.baddbmm(grad, dscores, their_keys, beta=0, alpha=scale, out=grad))
        if dk is not None:
            piece.add_product(dk, dscores, rows, scale, frame)
    return Grads(
        None if dq is None else dq.result(q.dtype),
        None if dk is None else dk.result(k.dtype),
        None if dv is None else dv.result(v.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        [torch.zeros_like(x) if grad is None and x.requires_grad else grad for x, grad in zip(tensors, dtensors)],
    )


def _extent(pieces: Sequence[Piece]) -> tuple[bool, int]:
    """Whether results are stored by whole query blocks, and how many rows are."""
    whole = any(isinstance(piece, Gather) for piece in pieces)
    return whole, sum(n * g * r for n, g, r, _ in (piece.shape for piece in pieces))


def _raw_scores(piece: Piece, rows: Tensor, keys: Tensor, frame: Frame) -> Tensor:
    """scale * q k^T, (n, g * r, w), in scratch memory; in units of log 2 when nothing but the mask comes between it and the softmax."""
    n, g, r, w = piece.shape
    scores = frame.scratch("scores", n, g * r, w)
    scale = frame.options.scale * (_LOG2_E if _is_plain(frame) else 1.0)
    return torch.baddbmm(scores, rows, keys.mT, beta=0, alpha=scale, out=scores)


def _is_plain(frame: Frame) -> bool:
    return frame.options.score_mod is None and frame.options.bias is None


def _modified(piece: Piece, scores: Tensor, frame: Frame) -> Tensor:
    score_mod = frame.options.score_mod
    if score_mod is None:
        return scores
    modified = score_mod(scores.view(piece.shape), *piece.positions(frame.geometry))
    return modified.to(frame.dtype).expand(piece.shape).reshape(scores.shape)


class _Weighed(NamedTuple):
    """Softmax before its division: values (n, g * r, w), row sums and tops (n, g * r, 1), rows that see nothing (None: no row).

    Powers of 2 rather than of e: torch's exp2 is four times as fast as its exp, and the products can apply log2(e) on the way.
    """

    values: Tensor
    total: Tensor
    top: Tensor
    empty: Tensor | None

    def lse(self) -> Tensor:
        lse = (self.top + self.total.log2()) / _LOG2_E
        return lse if self.empty is None else lse.masked_fill(self.empty, -torch.inf)


def _weigh(piece: Piece, scores: Tensor, frame: Frame) -> _Weighed:
    """Bias, mask and softmax of scores (n, g * r, w), in place."""
    by_head = scores.view(piece.shape)
    bias, plain = frame.options.bias, _is_plain(frame)
    if bias is not None:
        by_head.add_(piece.pick(bias, frame.geometry))
    piece.forbid(by_head, frame)
    if not plain:
        scores.mul_(_LOG2_E)
    top = scores.amax(-1, keepdim=True)
    empty = None
    if piece.may_be_empty or not plain:
        empty = top == -torch.inf
        if bool(empty.any()):
            scores.masked_fill_(empty, 0.0)
            top.masked_fill_(empty, 0.0)
        else:
            empty = None
    values = torch.exp2(scores.sub_(top), out=scores)
    total = values.sum(-1, keepdim=True)
    if empty is not None:
        values.masked_fill_(empty, 0.0)
    return _Weighed(values, total, top, empty)


class _Noise:
    """Dropout, the same for forward and backward: pieces come in the same order, from the same seed."""

    def __init__(self, frame: Frame) -> None:
        self.keep = 1.0 - frame.options.dropout
        self.generator = torch.Generator().manual_seed(frame.options.seed) if self.keep < 1.0 else None

    def draw(self, weights: Tensor) -> Tensor | None:
        """Factors 0 or 1 / keep for the weights of the next piece; None without dropout."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(self.keep, generator=self.generator).div_(self.keep)


class _Graph:
    """The score mod of one piece, recorded so that gradients flow back through it."""

    def __init__(self, piece: Piece, raw: Tensor, frame: Frame, tensors: Sequence[Tensor]) -> None:
        self.shape, self.tensors = raw.shape, tensors
        with torch.enable_grad():
            self.leaf = raw.clone().requires_grad_()
            self.modified = _modified(piece, self.leaf, frame)

    def backward(self, grad: Tensor, totals: list[Tensor | None]) -> Tensor:
        """Gradient of the raw scores; those of the tensors are added to `totals`."""
        if not self.modified.requires_grad:  # the mod ignores the score
            return torch.zeros_like(grad)
        wanted = [i for i, tensor in enumerate(self.tensors) if tensor.requires_grad]
        inputs = [self.leaf, *(self.tensors[i] for i in wanted)]
        first, *others = torch.autograd.grad(self.modified, inputs, grad, allow_unused=True)
        for i, part in zip(wanted, others):
            if part is not None:
                have = totals[i]
                totals[i] = part if have is None else have + part
        return torch.zeros_like(grad) if first is None else first.reshape(self.shape)
