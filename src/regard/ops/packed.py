"""Tensors in few bits: asymmetric min/max quantisation by groups, the codes really packed (2, 4 or 8 bits each)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_tensor

BITS = (2, 4, 8)


@dataclass
class Packed:
    """A tensor (..., n, D) in `bits` bits an entry.

    Attributes:
        codes: uint8 (..., n, ceil(D * bits / 8)), the first channel in the lowest bits. scale, zero: an entry is code * scale + zero.
            axis "tokens": (..., n / group, D), one pair a channel and stretch of `group` rows; axis "channels": (..., n, D / group),
            one pair a row and stretch of `group` channels.
        bits, group, axis, channels: as given to `quantise`; channels = D.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    axis: str
    channels: int

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def __getitem__(self, rows: slice) -> Packed:
        """Some rows, whole groups of them where they share scales."""
        start, stop, _ = rows.indices(self.rows)
        if self.axis == "tokens":
            if start % self.group or (stop % self.group and stop != self.rows):
                raise bad_value("rows", rows, f"a slice of whole groups of {self.group}")
            scales = slice(start // self.group, -(-stop // self.group))
        else:
            scales = slice(start, stop)
        return self.map(lambda t: t[..., scales if t is not self.codes else slice(start, stop), :])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Packed:
        parts = fn(self.codes), fn(self.scale), fn(self.zero)
        return Packed(*parts, self.bits, self.group, self.axis, self.channels)

    def dequantise(self) -> Tensor:
        """The tensor (..., n, D), in the dtype of `scale`."""
        codes = unpack_bits(self.codes, self.bits, self.channels).to(self.scale.dtype)
        if self.axis == "tokens":
            grouped = codes.unflatten(-2, (-1, self.group))
            return (grouped * self.scale[..., None, :] + self.zero[..., None, :]).flatten(-3, -2)
        grouped = codes.unflatten(-1, (-1, self.group))
        return (grouped * self.scale[..., None] + self.zero[..., None]).flatten(-2)


def quantise(x: Tensor, bits: int, group: int, axis: str) -> Packed:
    """`x` (..., n, D) rounded to `2 ** bits` levels between the least and the greatest entry of each group.

    Args:
        bits: 2, 4 or 8. axis: "tokens": a group is `group` rows of one channel (n a multiple of it); "channels": `group` channels of
            one row (D a multiple of it). group: its size.
    Returns:
        the `Packed` tensor; scale = (max - min) / (2 ** bits - 1) and zero = min, in x's dtype. Up to the rounding of that dtype an
        entry is off by at most scale / 2; a group of equal entries comes back as it was.
    """
    require(require_tensor("x", x, floating=True).dim() >= 2, "x", f"shape {tuple(x.shape)}", "(..., n, D)")
    require(bits in BITS, "bits", bits, f"one of {BITS}")
    require_int("group", group, 1)
    require(axis in ("tokens", "channels"), "axis", axis, "'tokens' or 'channels'")
    dim = -2 if axis == "tokens" else -1
    require(x.shape[dim] % group == 0, "group", group, f"a divisor of {x.shape[dim]} {axis}")
    wide = x.float() if x.dtype != torch.float64 else x
    grouped = wide.unflatten(dim, (-1, group))
    inner = -2 if axis == "tokens" else -1
    low, high = grouped.amin(inner, keepdim=True), grouped.amax(inner, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(x.dtype)
    zero = low.to(x.dtype)
    step = scale.to(wide.dtype)
    codes = (grouped - zero.to(wide.dtype)) / torch.where(step == 0, torch.ones_like(step), step)
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8)
    codes = codes.flatten(-3, -2) if axis == "tokens" else codes.flatten(-2)
    return Packed(pack_bits(codes, bits), scale.squeeze(inner), zero.squeeze(inner), bits, group, axis, x.shape[-1])


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., D) below 2 ** bits, packed 8 / bits to a byte: (..., ceil(D * bits / 8))."""
    each = 8 // bits
    if each == 1:
        return codes
    short = -codes.shape[-1] % each
    codes = torch.nn.functional.pad(codes, (0, short)).unflatten(-1, (-1, each))
    packed = codes[..., 0].clone()
    for i in range(1, each):
        packed |= codes[..., i] << (bits * i)
    return packed


def unpack_bits(packed: Tensor, bits: int, channels: int) -> Tensor:
    """The codes (..., channels) that `pack_bits` packed."""
    each = 8 // bits
    if each == 1:
        return packed
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :channels]


def cat_packed(first: Packed, second: Packed) -> Packed:
    """Rows of one after those of another of the same kind."""
    codes, scale, zero = (
        torch.cat([getattr(first, n), getattr(second, n)], dim=-2) for n in ("codes", "scale", "zero")
    )
    return Packed(codes, scale, zero, first.bits, first.group, first.axis, first.channels)
