"""`Mask`, its combinators, and masks made from a function or a tensor.

The kinds of masks are in `mask_kinds.py`, the public names of all in `masks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, require, require_tensor
from .._shapes import broadcast_shape

Bounds = tuple[Tensor, Tensor]
KINDS = 16  # answers of `Mask.kind` of a mask that is not put together from others


class Mask:
    """A predicate over (batch, head, query position, key position).

    Subclasses define `keep` and, when they can, `bounds`. `varies_batch` / `varies_head` tell whether the answer depends on
    `b` / `h`: a plan for a mask that does not is computed once and shared. `frozen`: the answer can never change (no tensors or
    user functions inside), so a plan may be kept. `relative`: it depends on `q_idx - kv_idx` alone, so equal offsets share a tile.
    A mask that is relative within a rectangle, though not from one to another, says so by `kind`.
    """

    varies_batch: bool = False
    varies_head: bool = False
    frozen: bool = False
    relative: bool = False

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define keep()")

    def bounds(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Bounds:
        """(may keep something, surely keeps everything) over the inclusive rectangle [q_lo, q_hi] x [kv_lo, kv_hi].

        Both answers may err on the unsure side: the first towards True, the second towards False.
        """
        shape = broadcast_shape(b.shape, h.shape, q_lo.shape, kv_lo.shape)
        device = q_lo.device
        return torch.ones(shape, dtype=torch.bool, device=device), torch.zeros(shape, dtype=torch.bool, device=device)

    def kind(self, b: Tensor, h: Tensor, q_lo: Tensor, q_hi: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Tensor | None:
        """A number in [0, KINDS) for each rectangle; two of equal number, size and `q_lo - kv_lo` hold the same. None: not known."""
        return torch.zeros_like(q_lo) if self.relative else None

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.keep(b, h, q_idx, kv_idx)

    def __and__(self, other: Any) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: Any) -> Mask:
        return And(as_mask(other), self)

    def __or__(self, other: Any) -> Mask:
        return Or(self, as_mask(other))

    def __ror__(self, other: Any) -> Mask:
        return Or(as_mask(other), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        num_heads: int = 1,
        q_offset: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The boolean matrix, (batch or 1, num_heads or 1, q_len, kv_len): True where the query may look."""
        offset = kv_len - q_len if q_offset is None else q_offset
        b, h, q, kv = index_grid(
            batch if self.varies_batch else 1, num_heads if self.varies_head else 1, q_len, kv_len, offset, device
        )
        shape = (b.shape[0], h.shape[1], q_len, kv_len)
        return torch.broadcast_to(self.keep(b, h, q, kv), shape)


def index_grid(
    batch: int, num_heads: int, q_len: int, kv_len: int, q_offset: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tensors (B,1,1,1), (1,H,1,1), (1,1,N,1), (1,1,1,M) for evaluating masks and score mods densely."""
    return (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(num_heads, device=device).view(1, -1, 1, 1),
        torch.arange(q_len, device=device).view(1, 1, -1, 1) + q_offset,
        torch.arange(kv_len, device=device).view(1, 1, 1, -1),
    )


def inherit(mask: Mask, *parts: Mask) -> None:
    """What a composition varies with, and what it may promise."""
    mask.varies_batch = any(part.varies_batch for part in parts)
    mask.varies_head = any(part.varies_head for part in parts)
    mask.frozen = all(part.frozen for part in parts)
    mask.relative = all(part.relative for part in parts)


def _both_kinds(left: Mask, right: Mask, rectangle: tuple[Tensor, ...]) -> Tensor | None:
    one, other = left.kind(*rectangle), right.kind(*rectangle)
    return None if one is None or other is None else one * KINDS + other


class And(Mask):
    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right
        inherit(self, left, right)

    def keep(self, b, h, q_idx, kv_idx):
        return self.left.keep(b, h, q_idx, kv_idx) & self.right.keep(b, h, q_idx, kv_idx)

    def bounds(self, *args):
        some_l, all_l = self.left.bounds(*args)
        some_r, all_r = self.right.bounds(*args)
        return some_l & some_r, all_l & all_r

    def kind(self, *rectangle):
        return _both_kinds(self.left, self.right, rectangle)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class Or(Mask):
    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right
        inherit(self, left, right)

    def keep(self, b, h, q_idx, kv_idx):
        return self.left.keep(b, h, q_idx, kv_idx) | self.right.keep(b, h, q_idx, kv_idx)

    def bounds(self, *args):
        some_l, all_l = self.left.bounds(*args)
        some_r, all_r = self.right.bounds(*args)
        return some_l | some_r, all_l | all_r

    def kind(self, *rectangle):
        return _both_kinds(self.left, self.right, rectangle)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class Not(Mask):
    def __init__(self, inner: Mask) -> None:
        self.inner = inner
        inherit(self, inner)

    def keep(self, b, h, q_idx, kv_idx):
        return ~self.inner.keep(b, h, q_idx, kv_idx)

    def bounds(self, *args):
        some, every = self.inner.bounds(*args)
        return ~every, ~some

    def kind(self, *rectangle):
        return self.inner.kind(*rectangle)

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


class FunctionMask(Mask):
    def __init__(self, function: Callable[..., Tensor], varies_batch: bool, varies_head: bool) -> None:
        self.function = function
        self.varies_batch, self.varies_head = varies_batch, varies_head

    def keep(self, b, h, q_idx, kv_idx):
        out = self.function(b, h, q_idx, kv_idx)
        if not isinstance(out, Tensor) or out.dtype != torch.bool:
            raise bad_type("mask", getattr(out, "dtype", out), "a mask_mod that returns a bool tensor")
        return out

    def __repr__(self) -> str:
        return f"from_function({getattr(self.function, '__name__', self.function)!r})"


class DenseMask(Mask):
    def __init__(self, tensor: Tensor, q_offset: int | None) -> None:
        require_tensor("mask", tensor)
        require(tensor.dtype == torch.bool, "mask", tensor.dtype, "a bool tensor, True where a query may look")
        require(tensor.dim() in (2, 4), "mask", f"shape {tuple(tensor.shape)}", "(N, M) or (B|1, H|1, N|1, M)")
        self.tensor = tensor if tensor.dim() == 4 else tensor[None, None]
        self.varies_batch, self.varies_head = self.tensor.shape[0] > 1, self.tensor.shape[1] > 1
        self.q_offset = q_offset

    def keep(self, b, h, q_idx, kv_idx):
        tensor = self.tensor.to(q_idx.device)
        rows, columns = tensor.shape[2:]
        row = q_idx - (columns - rows if self.q_offset is None else self.q_offset)
        row = row.clamp(0, rows - 1) if rows > 1 else torch.zeros_like(q_idx)
        zero_b, zero_h = torch.zeros_like(b), torch.zeros_like(h)
        return tensor[
            b if self.varies_batch else zero_b, h if self.varies_head else zero_h, row, kv_idx.clamp(max=columns - 1)
        ]

    def __repr__(self) -> str:
        return f"dense({tuple(self.tensor.shape)})"


def as_mask(mask: Any) -> Mask:
    """A `Mask` from a `Mask`, a bool tensor, or a `mask_mod` callable."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return DenseMask(mask, None)
    if callable(mask):
        return FunctionMask(mask, True, True)
    raise bad_type("mask", mask, "a regard.masks.Mask, a bool tensor, or a callable mask_mod")
