"""`attention()`: softmax attention with mask, score mod, bias and selection. Checks its input, picks a backend, runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from . import backends
from .masks import Mask, as_mask
from .selection import Selection

__all__ = ["AttentionRequest", "attention", "attention_backend", "attention_request"]


@dataclass
class AttentionRequest:
    """One checked call of `attention()`, as backends see it: every default resolved.

    `q (B, H, N, D)`, `k (B, Hkv, M, D)`, `v (B, Hkv, M, Dv)`; `mask` a `Mask` or None; `q_offset` the position of query row 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    score_mod: Callable[..., Tensor] | None
    bias: Tensor | None
    selection: Selection | None
    q_offset: int
    scale: float
    dropout: float
    return_lse: bool
    memo: dict[str, Any] = field(default_factory=dict)
    """What a backend worked out about this request while it was being chosen."""

    @property
    def needs_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.bias, *getattr(self.score_mod, "tensors", ()))
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Callable[..., Tensor] | Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    bias: Tensor | None = None,
    selection: Selection | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Softmax attention, `softmax(scale * q k^T + ...) v`, over what mask and selection allow.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). H is a multiple of Hkv: query head h reads kv head h // (H // Hkv).
        mask: who may look at whom: a `regard.masks` mask, a `mask_mod(b, h, q_idx, kv_idx) -> bool` callable, or a bool tensor
            broadcastable to (B, H, N, M), True where a query may look. None: everybody sees everything.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`, applied to scaled scores before `bias` (see `regard.scores`).
        bias: float tensor broadcastable to (B, H, N, M), added to the scores. Differentiable. -inf forbids a pair.
        selection: which key blocks each query block looks at; intersected with `mask`.
        q_offset: absolute position of query row 0, as masks and score mods see it. Default M - N: queries are the last positions.
        scale: factor on q k^T. Default D ** -0.5.
        dropout: probability of dropping an attention weight (kept ones are divided by 1 - dropout), in [0, 1). Always active when > 0.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, N), natural log, float32 for half types.
        backend: "auto", or one of `regard.ops.BACKENDS`. `attention_backend(...)` tells which one "auto" takes.

    Returns:
        (B, H, N, Dv) in q's dtype; with `return_lse`, a pair. A row that may see nothing gives zeros and an lse of -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ranges that do not fit, or a forced backend that cannot do what is asked
            (the message says why).
    """
    request = _check(q, k, v, mask, score_mod, bias, selection, q_offset, scale, dropout, return_lse)
    name = _choose(request, backend)
    out, lse = backends.load(name).run(request)
    return (out, lse) if return_lse else out


def attention_backend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options: Any) -> str:
    """The backend that `attention()` takes for the same arguments."""
    return _choose(attention_request(q, k, v, **options), backend)


def attention_request(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionRequest:
    """The checked form of a call of `attention()` with these arguments, for other ways to compute it."""
    names = ("mask", "score_mod", "bias", "selection", "q_offset", "scale", "dropout", "return_lse")
    for name in options:
        require_name("argument", name, names)
    defaults: dict[str, Any] = dict.fromkeys(names) | {"dropout": 0.0, "return_lse": False} | options
    return _check(q, k, v, **defaults)


def _choose(request: AttentionRequest, backend: str) -> str:
    if backend == "auto":
        return backends.choose(request)
    require_name("backend", backend, ["auto", *backends.BACKENDS])
    reason = backends.load(backend).refuses(request)
    if reason:
        raise bad_value("backend", backend, f"another backend: {reason}")
    return backend


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    score_mod: Any,
    bias: Tensor | None,
    selection: Selection | None,
    q_offset: int | None,
    scale: float | None,
    dropout: float,
    return_lse: bool,
) -> AttentionRequest:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, name, tensor.dtype, f"q's dtype {q.dtype}")
        require(tensor.device == q.device, name, str(tensor.device), f"q's device {q.device}")
        require(tensor.shape[0] == q.shape[0], name, f"batch {tensor.shape[0]}", f"q's batch {q.shape[0]}")
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    require(k.shape[3] == head_dim, "k", f"head_dim {k.shape[3]}", f"q's head_dim {head_dim}")
    require(v.shape[1:3] == k.shape[1:3], "v", f"shape {tuple(v.shape)}", f"(B, {num_kv_heads}, {kv_len}, Dv) like k")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise bad_value("k", f"{num_kv_heads} kv heads", f"a divisor of q's {num_heads} heads")
    if scale is None:
        require(head_dim > 0, "q", "head_dim 0", "head_dim >= 1, or an explicit scale")
        scale = head_dim**-0.5
    require(isinstance(dropout, (int, float)) and 0.0 <= dropout < 1.0, "dropout", dropout, "a probability in [0, 1)")
    if q_offset is not None:
        require_int("q_offset", q_offset, -(1 << 62))
    if score_mod is not None and not callable(score_mod):
        raise bad_value("score_mod", score_mod, "a callable (score, b, h, q_idx, kv_idx) -> score")
    full = (batch, num_heads, q_len, kv_len)
    if isinstance(mask, Tensor):
        _check_broadcast("mask", mask, full)
        if mask.dtype == torch.bool:
            mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
            mask = mask.expand(*mask.shape[:2], *((mask.shape[2], kv_len)))
    checked_mask = None if mask is None else as_mask(mask)
    if bias is not None:
        require_tensor("bias", bias, floating=True)
        _check_broadcast("bias", bias, full)
        require(bias.device == q.device, "bias", str(bias.device), f"q's device {q.device}")
    if selection is not None:
        if not isinstance(selection, Selection):
            raise TypeError(f"selection: got {type(selection).__name__}, need a regard.ops.Selection")
        require(selection.q_len == q_len, "selection", f"q_len {selection.q_len}", f"q's length {q_len}")
        require(selection.kv_len == kv_len, "selection", f"kv_len {selection.kv_len}", f"k's length {kv_len}")
        heads, rows = selection.indices.shape[1], selection.indices.shape[0]
        require(
            heads in (1, num_kv_heads, num_heads),
            "selection",
            f"{heads} heads",
            f"1, {num_kv_heads} or {num_heads} heads",
        )
        require(rows in (1, batch), "selection", f"batch {rows}", f"1 or {batch}")
    return AttentionRequest(
        q=q,
        k=k,
        v=v,
        mask=checked_mask,
        score_mod=score_mod,
        bias=bias,
        selection=selection,
        q_offset=kv_len - q_len if q_offset is None else q_offset,
        scale=float(scale),
        dropout=float(dropout),
        return_lse=bool(return_lse),
    )


def _check_broadcast(name: str, tensor: Tensor, full: tuple[int, ...]) -> None:
    shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    fits = len(shape) == 4 and all(have in (1, want) for have, want in zip(shape, full))
    require(fits, name, f"shape {tuple(tensor.shape)}", f"a shape broadcastable to (B, H, N, M) = {full}")
