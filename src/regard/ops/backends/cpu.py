"""Blocked attention on the CPU, with backward, that computes only what mask and selection leave.

The mask and the selection become a `BlockPlan`, the plan becomes pieces (some query rows with all their keys, `cpu_lower.py`), and each
piece is two batched products with a softmax between them that stays in the cache (`cpu_engine.py`). Memory beyond the result is one
piece's, plus a float32 copy of the keys for half types; nothing grows with N x M. Only q, k and v are kept for the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import reference
from ..masks import Mask, everything
from ..plan import make_plan
from ..reference import accumulation_dtype
from ..selection import Selection
from . import cpu_engine
from .cpu_frame import Frame, Geometry, Options
from .cpu_lower import lower
from .cpu_pieces import Piece
from .cpu_products import fast_products, onednn_is_better

if TYPE_CHECKING:
    from ..attention import AttentionRequest

BLOCK = 64
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_TILES = 4096  # distinct mixed tiles kept; beyond, the mask is asked while the pieces run
_SMALL = 1 << 18  # scores (B H N M) that are cheaper to compute than to plan around,
_SMALL_ONCE = 1 << 21  # the same where the plan cannot be kept
_KEPT = 8  # plans per mask or selection


class Work(NamedTuple):
    """A call's sizes and the pieces that do it."""

    geometry: Geometry
    pieces: Sequence[Piece]


_work_of: WeakKeyDictionary[Mask | Selection, dict[tuple, Work]] = WeakKeyDictionary()


def refuses(request: AttentionRequest) -> str | None:
    if request.q.device.type != "cpu":
        return f"it runs on the cpu, not on {request.q.device}"
    if request.q.numel() == 0 or request.k.numel() == 0 or request.v.numel() == 0:
        return "it is not defined on empty tensors"
    if request.q.dtype not in _DTYPES:
        return f"it takes float16, bfloat16, float32 or float64, not {request.q.dtype}"
    if _reads_undeclared(request):
        return "score_mod reads tensors that need a gradient and that it does not name (regard.scores.from_function names them)"
    return None


def suits(request: AttentionRequest) -> bool:
    batch, num_heads, q_len, _ = request.q.shape
    mask = everything if request.mask is None else request.mask
    worth = _SMALL if _holder(request, mask) is not None else _SMALL_ONCE
    return batch * num_heads * q_len * request.k.shape[2] > worth


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    work = _work(request)
    bias = request.bias
    bias = None if bias is None else bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    options = Options(
        scale=request.scale,
        mask=request.mask,
        selection=request.selection,
        score_mod=request.score_mod,
        bias=None if bias is None else bias.detach(),
        dropout=request.dropout,
        seed=int(torch.randint(1 << 62, ())) if request.dropout > 0.0 else 0,
    )
    tensors = getattr(request.score_mod, "tensors", ())
    return run_pieces(request.q, request.k, request.v, bias, options, work, request.return_lse, tensors)


def run_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    options: Options,
    work: Work,
    return_lse: bool,
    tensors: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) from the pieces of `work`, with a graph where one of the inputs or of the score mod's `tensors` asks for it."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias, *tensors)):
        return _Blocked.apply(q, k, v, bias, options, work, return_lse, *tensors)
    with torch.no_grad(), _frame(work, options, q.dtype) as frame:
        return cpu_engine.forward(frame, work.pieces, q, k, v, return_lse)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        options: Options,
        work: Work,
        want_lse: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, bias, *tensors)
        ctx.options, ctx.work, ctx.count = options, work, len(tensors)
        ctx.set_materialize_grads(False)
        with _frame(work, options, q.dtype) as frame:
            return cpu_engine.forward(frame, work.pieces, q, k, v, want_lse)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *_tensors = ctx.saved_tensors  # unpacking also checks that nothing was changed in place
        if grad_out is None:
            grad_out = q.new_zeros((*q.shape[:3], v.shape[3]))
        # the score mod reads its own tensors: gradients must be asked of those, not of copies
        tensors = getattr(ctx.options.score_mod, "tensors", ()) if ctx.count else ()
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, (q, k, v, bias, *tensors), grad_out, grad_lse)
        with _frame(ctx.work, ctx.options, q.dtype) as frame:
            wanted = ctx.needs_input_grad[:4]
            grads = cpu_engine.backward(frame, ctx.work.pieces, q, k, v, grad_out, grad_lse, wanted, tensors)
        return grads.q, grads.k, grads.v, grads.bias, None, None, None, *grads.tensors


def _differentiable_backward(
    ctx: Any, inputs: tuple[Tensor | None, ...], grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again (`create_graph=True`): by the reference, with its N x M matrix."""
    if ctx.options.dropout > 0.0:
        raise RuntimeError(
            "attention: got create_graph=True with dropout on backend 'cpu', need dropout=0 or backend='eager'"
        )
    q, k, v, bias, *_ = inputs
    assert q is not None and k is not None and v is not None
    if bias is not None and ctx.options.spread is not None:
        bias = ctx.options.spread(bias)
    left = ("bias", "dropout", "seed", "spread")
    options = {name: value for name, value in vars(ctx.options).items() if name not in left}
    offset = ctx.work.geometry.q_offset
    out, lse = reference.attention(q, k, v, bias=bias, q_offset=offset, return_lse=True, **options)
    results = [(out, grad_out)] if grad_lse is None else [(out, grad_out), (lse, grad_lse)]
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    grads: list[Tensor | None] = [None] * len(inputs)
    found = torch.autograd.grad(
        [result for result, _ in results],
        [x for i, x in enumerate(inputs) if i in wanted and x is not None],
        [grad for _, grad in results],
        create_graph=True,
        allow_unused=True,
    )
    for i, grad in zip(wanted, found):
        grads[i] = grad
    return *grads[:4], None, None, None, *grads[4:]


@contextlib.contextmanager
def _frame(work: Work, options: Options, dtype: torch.dtype) -> Iterator[Frame]:
    """What the pieces share. Products are in the type chosen here (also under autocast), by the faster library."""
    dtype = accumulation_dtype(dtype)
    off = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()
    with off, fast_products(dtype) as packed:
        yield Frame(work.geometry, options, dtype, packed)


def _work(request: AttentionRequest) -> Work:
    """The pieces of a request: made once for it, and kept for selections and for masks that cannot change."""
    if "cpu" not in request.memo:
        request.memo["cpu"] = _kept_work(request)
    return request.memo["cpu"]


def _kept_work(request: AttentionRequest) -> Work:
    mask = everything if request.mask is None else request.mask
    block_q, block_k = _block_sizes(request)
    batch, num_heads, q_len, head_dim = request.q.shape
    _, num_kv_heads, kv_len, value_dim = request.v.shape
    geometry = Geometry(batch, num_heads, num_kv_heads, q_len, kv_len, request.q_offset, block_q, block_k)
    holder = _holder(request, mask)
    if holder is None:
        return _make_work(request, mask, geometry, head_dim + value_dim)
    kept = _work_of.setdefault(holder, {})
    # a key that named its own holder would keep it alive
    beside = (mask, holder.indices._version) if isinstance(holder, Selection) else None
    key = (geometry, head_dim + value_dim, request.q.dtype, torch.get_num_threads(), beside)
    if key not in kept:
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)), None)
        kept[key] = _make_work(request, mask, geometry, head_dim + value_dim)
    return kept[key]


def _holder(request: AttentionRequest, mask: Mask) -> Mask | Selection | None:
    """What the work may be kept with: the selection, or a mask that cannot change. None: it must be made each time."""
    selection = request.selection
    if not mask.frozen:
        return None
    if selection is None:
        return mask
    small = selection.indices.numel() <= 1 << 20 and not selection.indices.is_inference()
    return selection if small else None


def _make_work(request: AttentionRequest, mask: Mask, geometry: Geometry, width: int) -> Work:
    plan = make_plan(
        mask,
        request.selection,
        batch=geometry.batch,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        q_len=geometry.q_len,
        kv_len=geometry.kv_len,
        q_offset=geometry.q_offset,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        device="cpu",
        max_tiles=_MAX_TILES,
    )
    dtype = accumulation_dtype(request.q.dtype)
    pieces = lower(plan, geometry, width, dtype, packed=dtype == torch.float32 and onednn_is_better())
    return Work(geometry, pieces)


def _block_sizes(request: AttentionRequest) -> tuple[int, int]:
    if request.selection is not None:
        return request.selection.block_q, request.selection.block_k
    block = BLOCK if request.k.shape[2] <= 1 << 15 else 2 * BLOCK
    return min(block, request.q.shape[2]), min(block, request.k.shape[2])


def _reads_undeclared(request: AttentionRequest) -> bool:
    """Whether the score mod's result depends on tensors that need a gradient and are not among its `tensors`."""
    if request.score_mod is None or not torch.is_grad_enabled():
        return False
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.long)
    score = torch.zeros((1, 1, 1, 1), dtype=accumulation_dtype(request.q.dtype))
    result = request.score_mod(score, zero, zero, zero + request.q_offset, zero)
    if not isinstance(result, Tensor) or not result.requires_grad:
        return False
    declared = [tensor for tensor in getattr(request.score_mod, "tensors", ()) if tensor.requires_grad]
    known = {tensor.grad_fn for tensor in declared if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in declared}
    pending, seen = [result.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in known or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            return True
        pending += [parent for parent, _ in node.next_functions]
    return False
