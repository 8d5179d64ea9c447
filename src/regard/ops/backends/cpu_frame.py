"""What every piece of a blocked CPU attention call shares: flattened tensors, options, accumulators, scratch memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import Mask
from ..selection import Selection


@dataclass(frozen=True)
class Geometry:
    """Sizes of a call. `group` query heads read one kv head; blocks of `block_q` rows and `block_k` keys."""

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    q_offset: int
    block_q: int
    block_k: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.kv_len // self.block_k)


@dataclass
class Options:
    """How scores become weights. `bias` is 4-D with axes of size 1 where it broadcasts; pieces that read it in another form come with
    `spread`, which makes that of it for the reference."""

    scale: float
    mask: Mask | None = None
    selection: Selection | None = None
    score_mod: Callable[..., Tensor] | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    seed: int = 0
    spread: Callable[[Tensor], Tensor] | None = None


@dataclass
class Frame:
    """The tensors of a call by flat head: rows (B * H, N, .), keys (B * Hkv, M, .), in the type that arithmetic uses.

    Rows stay in their own type (pieces convert what they read); keys of half types are converted once. `blocks` views serve the
    pieces that gather; lengths are padded to whole blocks for them only. `packed`: the products want their factors side by side in
    memory (they would copy them otherwise), so slices are put into scratch memory first.
    """

    geometry: Geometry
    options: Options
    dtype: torch.dtype
    packed: bool
    memory: dict[str, Tensor] = field(default_factory=dict)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory for one piece's use, grown when needed. What it holds is gone with the next call for the same name."""
        size = 1
        for extent in shape:
            size *= extent
        have = self.memory.get(name)
        if have is None or have.numel() < size:
            have = self.memory[name] = torch.empty(size, dtype=self.dtype)
        return have[:size].view(shape)

    def rows(self, x: Tensor) -> Rows:
        geometry = self.geometry
        return Rows(x.reshape(geometry.batch * geometry.num_heads, geometry.q_len, x.shape[3]), geometry)

    def new_rows(self, width: int, dtype: torch.dtype, whole_blocks: bool, written: int, fill: float = 0.0) -> Rows:
        """One row a query, `fill` unless pieces write them all (`written` rows); with `whole_blocks` padded to a multiple of `block_q`."""
        geometry = self.geometry
        length = geometry.q_blocks * geometry.block_q if whole_blocks else geometry.q_len
        flat = torch.empty((geometry.batch * geometry.num_heads, length, width), dtype=dtype)
        return Rows(flat if written == flat.shape[0] * length else flat.fill_(fill), geometry)

    def keys(self, x: Tensor) -> Keys:
        geometry = self.geometry
        flat = x.to(self.dtype).reshape(geometry.batch * geometry.num_kv_heads, geometry.kv_len, x.shape[3])
        return Keys(flat, geometry)

    def new_keys(self, width: int, whole_blocks: bool) -> Keys:
        geometry = self.geometry
        length = geometry.k_blocks * geometry.block_k if whole_blocks else geometry.kv_len
        return Keys(torch.zeros((geometry.batch * geometry.num_kv_heads, length, width), dtype=self.dtype), geometry)


class Rows:
    """Per-query values, (B * H, N, width), seen as slices or as blocks."""

    def __init__(self, flat: Tensor, geometry: Geometry) -> None:
        self.flat, self.geometry = flat, geometry
        self._blocks: Tensor | None = None

    @property
    def grouped(self) -> Tensor:
        """(B * Hkv, group, N, width)."""
        return self.flat.unflatten(0, (-1, self.geometry.group))

    @property
    def blocks(self) -> Tensor:
        """(B * H * query blocks, block_q, width). A view, except where the length is not a multiple of the block."""
        if self._blocks is None:
            short = self.geometry.q_blocks * self.geometry.block_q - self.flat.shape[1]
            flat = F.pad(self.flat, (0, 0, 0, short)) if short > 0 else self.flat
            self._blocks = flat.reshape(-1, self.geometry.block_q, flat.shape[2])
        return self._blocks

    def result(self, dtype: torch.dtype) -> Tensor:
        """(B, H, N, width), without padding."""
        geometry = self.geometry
        flat = self.flat[:, : geometry.q_len].to(dtype)
        return flat.reshape(geometry.batch, geometry.num_heads, geometry.q_len, flat.shape[2])


class Keys:
    """Per-key values, (B * Hkv, M, width), seen as slices or as blocks."""

    def __init__(self, flat: Tensor, geometry: Geometry) -> None:
        self.flat, self.geometry = flat, geometry
        self._blocks: Tensor | None = None

    @property
    def blocks(self) -> Tensor:
        """(B * Hkv * key blocks, block_k * width). A view, except where the length is not a multiple of the block."""
        if self._blocks is None:
            short = self.geometry.k_blocks * self.geometry.block_k - self.flat.shape[1]
            flat = F.pad(self.flat, (0, 0, 0, short)) if short > 0 else self.flat
            self._blocks = flat.reshape(-1, self.geometry.block_k * flat.shape[2])
        return self._blocks

    def result(self, dtype: torch.dtype) -> Tensor:
        geometry = self.geometry
        flat = self.flat[:, : geometry.kv_len].to(dtype)
        return flat.reshape(geometry.batch, geometry.num_kv_heads, geometry.kv_len, flat.shape[2])
