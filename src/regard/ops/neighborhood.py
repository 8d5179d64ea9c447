"""Neighborhood attention: every token of a grid attends to the window of tokens around it.

Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level (Hassani et al., 2024, arXiv
2403.04690). Code read for numbers: SHI-Labs/NATTEN at 8c8729f (MIT), `src/natten/functional.py` and `backends/flex.py`.

What differs: no compiled extension anywhere. On the CPU the paper's N-D tiling becomes tiles with a halo of keys for the blocked
engine (`backends/cpu_halo.py`), with backward; elsewhere tokens are put in the order of tiles and the block backends take the mask.
Window rules are theirs (`mask_neighborhood.GridAxis`). Relative position biases, which their fused kernels have not, are those of the
older NAT and DiNAT models.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, require, require_name, require_tensor
from . import backends
from .attention import attention, attention_backend
from .mask_neighborhood import GridAxis, Neighborhood, grid_axes
from .masks import index_grid
from .scores import ScoreMod, from_function

__all__ = ["neighborhood_attention", "neighborhood_attention_backend"]

_TILED = "tiled"
_BLOCK = 64  # positions: the block of the GPU backends, filled by one tile (or by two that lie side by side)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    *,
    scale: float | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    rel_pos_bias: Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention of each token over its neighborhood on a grid of 1, 2 or 3 axes. Heads come last, as in NATTEN.

    Args:
        q: (B, *grid, H, D). k: (B, *grid, Hkv, D). v: (B, *grid, Hkv, Dv). H is a multiple of Hkv.
        kernel_size, stride, dilation, is_causal: the window, each one value or one an axis; see `regard.masks.neighborhood`.
        scale: factor on q k^T. Default D ** -0.5.
        extra_kv: keys (B, M, Hkv, D) and values (B, M, Hkv, Dv) that every token attends to as well (text, registers).
        rel_pos_bias: (H, 2 * kernel_size - 1, ...), one axis for each of the grid's: entry [h, o + kernel_size - 1, ...] is added to
            the scaled scores of keys o dilated steps after the query. Extra keys get none. Differentiable.
        dropout: probability of dropping an attention weight, in [0, 1). Always active when > 0.
        return_lse: also return the log-sum-exp of each token's scores, (B, *grid, H), natural log, float32 for half types.
        backend: "auto", "tiled" (CPU: tiles with halos, forward and backward), or a backend of `attention()`, which then gets the
            mask. `neighborhood_attention_backend` tells which one "auto" takes.

    Returns:
        (B, *grid, H, Dv) in q's dtype; with `return_lse`, a pair.

    Raises:
        ValueError, TypeError: shapes or options that do not fit; kernel_size * dilation must not exceed the grid, stride not kernel_size.
    """
    axes, bias = _check(q, k, v, kernel_size, stride, dilation, is_causal, extra_kv, rel_pos_bias)
    name = _choose(q, axes, bias, backend, dropout, return_lse)
    require(isinstance(dropout, (int, float)) and 0.0 <= dropout < 1.0, "dropout", dropout, "a probability in [0, 1)")
    require(scale is not None or q.shape[-1] > 0, "q", "head_dim 0", "head_dim >= 1, or an explicit scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    grid = q.shape[1:-2]
    flat = [x.flatten(1, -3) for x in (q, k, v)]
    if name == _TILED:
        out, lse = _tiled(flat, axes, scale, extra_kv, bias, float(dropout), return_lse)
    else:
        out, lse = _masked(flat, axes, scale, extra_kv, bias, float(dropout), return_lse, name)
    out = out.unflatten(1, grid)
    return (out, lse.unflatten(1, grid)) if return_lse else out


def neighborhood_attention_backend(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int | tuple[int, ...], *, backend: str = "auto", **options: Any
) -> str:
    """The backend that `neighborhood_attention` takes for the same arguments."""
    names = ("stride", "dilation", "is_causal", "scale", "extra_kv", "rel_pos_bias", "dropout", "return_lse")
    for name in options:
        require_name("argument", name, names)
    stride, dilation, is_causal = options.get("stride", 1), options.get("dilation", 1), options.get("is_causal", False)
    extra_kv = options.get("extra_kv")
    axes, bias = _check(q, k, v, kernel_size, stride, dilation, is_causal, extra_kv, options.get("rel_pos_bias"))
    name = _choose(q, axes, bias, backend, options.get("dropout", 0.0), options.get("return_lse", False))
    if name != "auto":
        return name
    mask, _ = _arranged(axes, "auto")
    flat = _with_extra([x.flatten(1, -3) for x in (q, k, v)], extra_kv)
    more = {key: options[key] for key in ("scale", "dropout", "return_lse") if key in options}
    mod = None if bias is None else _score_mod(_mask(axes, None) if mask is None else mask, bias)
    return attention_backend(*(x.transpose(1, 2) for x in flat), mask=mask, score_mod=mod, q_offset=0, **more)


def _choose(
    q: Tensor, axes: tuple[GridAxis, ...], bias: Tensor | None, backend: str, dropout: float, return_lse: bool
) -> str:
    """`_TILED`, or the `backend` argument for `attention()`."""
    require_name("backend", backend, ["auto", _TILED, *backends.BACKENDS])
    on_cpu = q.device.type == "cpu" and q.numel() > 0
    if backend == _TILED:
        require(
            on_cpu, "backend", backend, f"tensors on the cpu that are not empty, not {tuple(q.shape)} on {q.device}"
        )
    dense = bias is None and all(axis.sees_all for axis in axes)
    return _TILED if backend == "auto" and on_cpu and not dense else backend


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    extra_kv: Any,
    rel_pos_bias: Any,
) -> tuple[tuple[GridAxis, ...], Tensor | None]:
    require_tensor("q", q, floating=True)
    require(4 <= q.dim() <= 6, "q", f"shape {tuple(q.shape)}", "(B, *grid, H, D) with 1 to 3 grid axes")
    for name, x in (("k", k), ("v", v)):
        require_tensor(name, x, dims=q.dim(), floating=True)
        require(
            x.shape[:-2] == q.shape[:-2], name, f"shape {tuple(x.shape)}", f"q's batch and grid {tuple(q.shape[:-2])}"
        )
    axes = grid_axes(tuple(q.shape[1:-2]), kernel_size, stride, dilation, is_causal)
    if extra_kv is not None:
        if not isinstance(extra_kv, (tuple, list)) or len(extra_kv) != 2:
            raise bad_type("extra_kv", extra_kv, "a pair (keys, values)")
        count = extra_kv[0].shape[1] if isinstance(extra_kv[0], Tensor) and extra_kv[0].dim() == 4 else 0
        for name, x, like in zip(("extra keys", "extra values"), extra_kv, (k, v)):
            require_tensor(name, x, dims=4, floating=True)
            need = (q.shape[0], count, *like.shape[-2:])
            require(tuple(x.shape) == need, name, f"shape {tuple(x.shape)}", f"(B, M, Hkv, D) = {need}")
    if rel_pos_bias is not None:
        require_tensor("rel_pos_bias", rel_pos_bias, floating=True)
        need = (q.shape[-2], *(2 * axis.kernel - 1 for axis in axes))
        require(tuple(rel_pos_bias.shape) == need, "rel_pos_bias", tuple(rel_pos_bias.shape), f"shape {need}")
    tensors = (k, v, *(extra_kv or ()), *(() if rel_pos_bias is None else (rel_pos_bias,)))
    for x in tensors:
        require(x.device == q.device, "k, v, extra_kv, rel_pos_bias", str(x.device), f"q's device {q.device}")
    for x in (k, v, *(extra_kv or ())):
        require(x.dtype == q.dtype, "k, v, extra_kv", x.dtype, f"q's dtype {q.dtype}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    require(v.shape[-2] == kv_heads, "v", f"{v.shape[-2]} heads", f"k's {kv_heads} heads")
    require(kv_heads > 0 and heads % kv_heads == 0, "k", f"{kv_heads} kv heads", f"a divisor of q's {heads} heads")
    require(k.shape[-1] == q.shape[-1], "k", f"head_dim {k.shape[-1]}", f"q's head_dim {q.shape[-1]}")
    return axes, None if rel_pos_bias is None else rel_pos_bias.flatten(1)


def _with_extra(flat: list[Tensor], extra_kv: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    q, k, v = flat
    return flat if extra_kv is None else [q, torch.cat([k, extra_kv[0]], dim=1), torch.cat([v, extra_kv[1]], dim=1)]


def _tiled(
    flat: list[Tensor],
    axes: tuple[GridAxis, ...],
    scale: float,
    extra_kv: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    dropout: float,
    return_lse: bool,
) -> tuple[Tensor, Any]:
    from .backends import cpu, cpu_halo
    from .backends.cpu_frame import Geometry, Options
    from .backends.cpu_products import onednn_is_better
    from .reference import accumulation_dtype

    q, k, v = (x.transpose(1, 2) for x in _with_extra(flat, extra_kv))
    k, v = k.contiguous(), v.contiguous()  # read several times, in runs of neighboring tokens
    geometry = Geometry(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], 0, q.shape[2], k.shape[2])
    dtype = accumulation_dtype(q.dtype)
    packed = dtype == torch.float32 and onednn_is_better()
    pieces = cpu_halo.lower(axes, geometry, q.shape[3] + v.shape[3], dtype, packed, torch.get_num_threads())
    mask = _mask(axes, None)
    options = Options(
        scale=scale,
        mask=mask,
        dropout=dropout,
        seed=int(torch.randint(1 << 62, ())) if dropout > 0.0 else 0,
        spread=lambda table: _spread(mask, table[0, :, 0], k.shape[2]),
    )
    table = None if bias is None else bias[None, :, None, :]
    if table is not None:
        options.bias = table.detach()
    out, lse = cpu.run_pieces(q, k, v, table, options, cpu.Work(geometry, pieces), return_lse)
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


def _masked(
    flat: list[Tensor],
    axes: tuple[GridAxis, ...],
    scale: float,
    extra_kv: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    dropout: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Any]:
    """By `attention()`, on tokens in the order of tiles where a block backend may take it."""
    mask, order = _arranged(axes, backend)
    if order is not None:
        order = order.to(flat[0].device)
        flat = [x.index_select(1, order) for x in flat]
    q, k, v = (x.transpose(1, 2) for x in _with_extra(flat, extra_kv))
    mod = None if bias is None else _score_mod(_mask(axes, None) if mask is None else mask, bias)
    out, lse = (
        attention(
            q,
            k,
            v,
            mask=mask,
            score_mod=mod,
            q_offset=0,
            scale=scale,
            dropout=dropout,
            return_lse=True,
            backend=backend,
        )
        if return_lse
        else (
            attention(q, k, v, mask=mask, score_mod=mod, q_offset=0, scale=scale, dropout=dropout, backend=backend),
            None,
        )
    )
    results = [out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)]
    if order is not None:
        back = order.argsort()
        results = [None if x is None else x.index_select(1, back) for x in results]
    return results[0], results[1]


def _arranged(axes: tuple[GridAxis, ...], backend: str) -> tuple[Neighborhood | None, Tensor | None]:
    """The mask (None: everybody sees all) and the order of tokens that suits a backend (None: row-major)."""
    if all(axis.sees_all for axis in axes):
        return None, None
    whole = backend in ("eager", "sdpa") or (len(axes) == 1 and axes[0].dilation == 1)
    mask = _mask(axes, None if whole else _block_tile(axes))
    return mask, mask.order


@lru_cache(maxsize=32)
def _mask(axes: tuple[GridAxis, ...], tile: tuple[int, ...] | None) -> Neighborhood:
    """One object for equal windows, so that backends find the plans they kept for it."""
    return Neighborhood(axes, tile)


def _block_tile(axes: tuple[GridAxis, ...]) -> tuple[int, ...]:
    """Extents whose product is `_BLOCK`, as near to a cube as powers of two and the grid allow."""
    tile = [1] * len(axes)
    while math.prod(tile) < _BLOCK:
        open_axes = [i for i, axis in enumerate(axes) if tile[i] < axis.places(0)]
        if not open_axes:
            break
        tile[min(open_axes, key=lambda i: (tile[i], -i))] *= 2
    return tuple(tile)


def _score_mod(mask: Neighborhood, bias: Tensor) -> ScoreMod:
    """Adds `bias` (H, entries) by relative place to scores of positions as `mask` counts them."""
    entries = [2 * axis.kernel - 1 for axis in mask.axes]

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ranks = mask.table.to(score.device)[::3].long()
        query, key = q_idx.clamp(0, mask.tokens - 1), kv_idx.clamp(0, mask.tokens - 1)
        offset = torch.zeros_like(query + key)
        for rank, axis, count in zip(ranks, mask.axes, entries):
            offset = offset * count + (rank[key] - rank[query] + axis.kernel - 1).clamp(0, count - 1)
        return score + torch.where(kv_idx < mask.tokens, bias.to(score.dtype)[h, offset], 0.0)

    return from_function(mod, bias)


def _spread(mask: Neighborhood, bias: Tensor, kv_len: int) -> Tensor:
    """A table of relative biases as the matrix (1, H, N, M)."""
    places = index_grid(1, bias.shape[0], mask.tokens, kv_len, 0, bias.device)
    return _score_mod(mask, bias)(bias.new_zeros(()), *places)
