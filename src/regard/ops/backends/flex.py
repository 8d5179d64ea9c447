"""Compiled FlexAttention over our `BlockPlan`: forward everywhere, backward on CUDA (torch has none for the CPU).

The mask is handed over as data (which tile each mixed block has), not as code: one compiled kernel serves every mask and selection, and
no mask has to be traceable. A score mod is compiled in, once for each score mod object.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..plan import FULL, BlockPlan, kept_plan

if TYPE_CHECKING:
    from ..attention import AttentionRequest

BLOCK = 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_compiled: WeakKeyDictionary[Callable, Callable] = WeakKeyDictionary()


def refuses(request: AttentionRequest) -> str | None:
    q, k, v = request.q, request.k, request.v
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "flex is not defined on empty tensors"
    if q.dtype not in _DTYPES:
        return f"flex takes float32, float16 or bfloat16, not {q.dtype}"
    if request.dropout > 0.0:
        return "flex has no dropout"
    if request.selection is not None and (request.selection.block_q % 64 or request.selection.block_k % 64):
        blocks = f"({request.selection.block_q}, {request.selection.block_k})"
        return f"flex needs a selection of blocks that are multiples of 64, not {blocks}"
    if request.needs_grad:
        beside = (request.bias, *getattr(request.score_mod, "tensors", ()))
        if not q.is_cuda:
            return "flex has no backward on the cpu"
        if any(tensor is not None and tensor.requires_grad for tensor in beside):
            return "flex gives no gradient to bias or to what score_mod reads"
    if request.return_lse and not q.is_cuda:
        return "flex does not return the log-sum-exp on the cpu"
    if q.is_cuda and min(q.shape[3], v.shape[3]) < 16:
        return f"flex needs a head_dim of at least 16 on cuda, not {min(q.shape[3], v.shape[3])}"
    return compiler_missing(q.device.type)


def suits(request: AttentionRequest) -> bool:
    return True


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = request.q, request.k, request.v
    aux = AuxRequest(lse=True) if request.return_lse else None
    kernel = _kernel(request.score_mod if request.score_mod is not None else _plain, q.is_cuda)
    try:
        result = kernel(
            q,
            k,
            v,
            score_mod=_score_mod(request),
            block_mask=block_mask_of(_plan(request), q.shape[0], q.shape[1]),
            scale=request.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=aux,
        )
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"backend 'flex' could not compile this attention; take another backend. torch says: {reason}"
        ) from error
    out, lse = (result[0], result[1].lse) if aux is not None else (result, None)
    return out, lse


def block_mask_of(plan: BlockPlan, batch: int, num_heads: int) -> Any:
    """A `torch.nn.attention.flex_attention.BlockMask` that says the same as `plan`."""
    from torch.nn.attention.flex_attention import BlockMask

    kv, tiles_of = plan.kv_blocks, plan.tiles_of
    if kv.shape[1] not in (1, num_heads):
        kv, tiles_of = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (kv, tiles_of))
    listed = kv >= 0
    mixed = _lists(kv, listed & (tiles_of != FULL), plan.num_k_blocks)
    full = _lists(kv, listed & (tiles_of == FULL), plan.num_k_blocks)
    grid = torch.zeros((*kv.shape[:3], plan.num_k_blocks + 1), dtype=torch.int32, device=kv.device)
    where = torch.where(listed, kv, plan.num_k_blocks)
    grid.scatter_(-1, where, tiles_of.clamp(min=0).int())
    # a power of two of tiles: other numbers are other shapes, and each shape is compiled anew
    spare = (1 << max(2, (plan.tiles.shape[0] - 1).bit_length())) - plan.tiles.shape[0]
    tiles = torch.cat([plan.tiles, plan.tiles.new_zeros((spare, plan.block_q, plan.block_k))])
    return BlockMask.from_kv_blocks(
        *mixed,
        *full,
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=_lookup(grid, tiles, plan.block_q, plan.block_k),
        seq_lengths=(plan.q_len, plan.kv_len),
    )


def _lookup(grid: Tensor, tiles: Tensor, block_q: int, block_k: int) -> Callable[..., Tensor]:
    per_batch, per_head = grid.shape[0] > 1, grid.shape[1] > 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        tile = grid[b if per_batch else 0, h if per_head else 0, q_idx // block_q, kv_idx // block_k]
        return tiles[tile, q_idx % block_q, kv_idx % block_k]

    return mask_mod


def _lists(kv: Tensor, kept: Tensor, num_k_blocks: int) -> tuple[Tensor, Tensor]:
    """(number of blocks, their indices padded to all key blocks) of the kept ones, as BlockMask wants them."""
    order = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)
    indices = torch.where(kept, kv, 0).gather(-1, order)
    indices = torch.nn.functional.pad(indices, (0, num_k_blocks - indices.shape[-1]))
    return kept.sum(-1).int(), indices.int().contiguous()


def _plan(request: AttentionRequest) -> BlockPlan:
    return kept_plan(
        request.mask,
        request.selection,
        batch=request.q.shape[0],
        num_heads=request.q.shape[1],
        num_kv_heads=request.k.shape[1],
        q_len=request.q.shape[2],
        kv_len=request.k.shape[2],
        q_offset=request.q_offset,
        block_q=BLOCK,
        block_k=BLOCK,
        device=request.q.device,
    )


def _score_mod(request: AttentionRequest) -> Callable[..., Tensor] | None:
    mod, offset = request.score_mod, request.q_offset
    bias = request.bias
    if bias is None and mod is None:
        return None
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    shape = (1, 1, 1, 1) if bias is None else bias.shape

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if mod is not None:
            score = mod(score, b, h, q_idx + offset, kv_idx)
        if bias is not None:
            at = (b, h, q_idx, kv_idx)
            score = score + bias[tuple(place if size > 1 else 0 for place, size in zip(at, shape))]
        return score

    return score_mod


def _plain() -> None:
    """Stands for "no score mod" among the compiled kernels."""


def _kernel(key: Callable, on_cuda: bool) -> Callable:
    """flex_attention, compiled. Each key has a copy with its own code object, so that torch counts recompilations apart."""
    if key not in _compiled:
        from torch.nn.attention.flex_attention import flex_attention

        code = flex_attention.__code__.replace(co_name=f"flex_attention_{len(_compiled)}")
        own = FunctionType(code, flex_attention.__globals__, flex_attention.__name__, flex_attention.__defaults__)
        own.__kwdefaults__ = flex_attention.__kwdefaults__
        # symbolic shapes do not survive torch's C++ template; a kernel a shape does
        _compiled[key] = torch.compile(own, dynamic=None if on_cuda else False)
    return _compiled[key]


def compiler_missing(device: str) -> str | None:
    """Why FlexAttention cannot be compiled for a type of device; None when nothing speaks against it."""
    if device == "cpu":
        from torch._inductor import config

        names = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else list(config.cpp.cxx)
        if not any(name and shutil.which(name) for name in (*names, "g++", "clang++")):
            return "flex compiles C++ on the cpu, and no compiler (g++, clang++) is on the PATH"
    elif device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "flex compiles Triton kernels on cuda, and triton is not installed"
    else:
        return f"flex runs on cpu and cuda, not on {device}"
    return None
