"""`Selection`: who looks at whom, by content. What every selector returns and every sparse backend reads."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_tensor
from .._shapes import broadcast_shape


class Selection:
    """For each query block, the key blocks it looks at.

    Attributes:
        indices: int64 (B|1, H|1, nQ, K): numbers of key blocks, ascending, each at most once, -1 (nothing) at the end.
            The head axis may be the query heads, the kv heads (a group shares) or 1.
        block_q, block_k: rows of a query block, keys of a key block. 1 and 1 is selection per query and key.
        q_len, kv_len: lengths the selection was made for; nQ = ceil(q_len / block_q).

    A selection says which blocks are looked at; what is allowed inside (causality, padding) is the mask given beside it.
    Unsorted or repeated entries are put in order on construction.
    """

    def __init__(self, indices: Tensor, *, block_q: int, block_k: int, q_len: int, kv_len: int) -> None:
        require_tensor("indices", indices, dims=4)
        require(not indices.is_floating_point() and indices.dtype != torch.bool, "indices", indices.dtype, "integers")
        self.block_q = require_int("block_q", block_q, 1)
        self.block_k = require_int("block_k", block_k, 1)
        self.q_len = require_int("q_len", q_len, 0)
        self.kv_len = require_int("kv_len", kv_len, 0)
        require(
            indices.shape[2] == self.num_q_blocks, "indices", f"{indices.shape[2]} query blocks", f"{self.num_q_blocks}"
        )
        if indices.numel():
            low, high = int(indices.min()), int(indices.max())
            require(low >= -1, "indices", low, "block numbers >= 0, or -1 for nothing")
            require(high < self.num_k_blocks, "indices", high, f"block numbers < {self.num_k_blocks}")
        self.indices = _in_order(indices.long(), self.num_k_blocks)

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.kv_len // self.block_k)

    @property
    def counts(self) -> Tensor:
        """Key blocks per query block, (B|1, H|1, nQ)."""
        return (self.indices >= 0).sum(-1)

    @classmethod
    def from_block_map(cls, block_map: Tensor, *, block_q: int, block_k: int, q_len: int, kv_len: int) -> Selection:
        """From a bool map (B|1, H|1, nQ, nK), True where the block is looked at."""
        require_tensor("block_map", block_map, dims=4)
        require(block_map.dtype == torch.bool, "block_map", block_map.dtype, "bool")
        need = (-(-q_len // block_q), -(-kv_len // block_k))
        if tuple(block_map.shape[2:]) != need:
            raise bad_value("block_map", f"shape {tuple(block_map.shape)}", f"(B|1, H|1, {need[0]}, {need[1]})")
        width = int(block_map.sum(-1).max()) if block_map.numel() else 0
        order = torch.argsort(block_map.to(torch.int8), dim=-1, descending=True, stable=True)[..., :width]
        indices = torch.where(block_map.gather(-1, order), order, -1)
        return cls(indices, block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len)

    def block_map(self) -> Tensor:
        """Bool (B|1, H|1, nQ, nK), True where the block is looked at."""
        shape = (*self.indices.shape[:3], self.num_k_blocks + 1)
        out = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        out.scatter_(-1, self.indices.clamp(min=0) + (self.indices < 0) * self.num_k_blocks, True)
        return out[..., : self.num_k_blocks]

    def materialize(self) -> Tensor:
        """Bool (B|1, H|1, q_len, kv_len), True where the query looks at the key."""
        rows = self.block_map().repeat_interleave(self.block_q, dim=2)[:, :, : self.q_len]
        return rows.repeat_interleave(self.block_k, dim=3)[..., : self.kv_len]

    def density(self) -> float:
        """Share of all (query block, key block) pairs that are looked at."""
        total = self.indices.shape[0] * self.indices.shape[1] * self.num_q_blocks * self.num_k_blocks
        return int((self.indices >= 0).sum()) / total if total else 0.0

    def union(self, other: Selection) -> Selection:
        """Blocks that either looks at (same block sizes and lengths)."""
        for name in ("block_q", "block_k", "q_len", "kv_len"):
            require(
                getattr(self, name) == getattr(other, name),
                name,
                getattr(other, name),
                f"{getattr(self, name)} (as in the first)",
            )
        shape = broadcast_shape(self.indices.shape[:3], other.indices.shape[:3])
        parts = [x.indices.expand(*shape, x.indices.shape[-1]) for x in (self, other)]
        return Selection(
            torch.cat(parts, dim=-1), block_q=self.block_q, block_k=self.block_k, q_len=self.q_len, kv_len=self.kv_len
        )

    __or__ = union

    def for_heads(self, num_heads: int, num_kv_heads: int) -> Tensor:
        """`indices` with a head axis that is 1 or `num_heads` (a kv head's entry serves its whole group)."""
        heads = self.indices.shape[1]
        if heads in (1, num_heads):
            return self.indices
        require(heads == num_kv_heads, "selection", f"{heads} heads", f"1, {num_kv_heads} or {num_heads} heads")
        return self.indices.repeat_interleave(num_heads // num_kv_heads, dim=1)

    def to(self, device: torch.device | str) -> Selection:
        out = object.__new__(Selection)
        out.__dict__.update(self.__dict__)
        out.indices = self.indices.to(device)
        return out

    def __repr__(self) -> str:
        return (
            f"Selection({tuple(self.indices.shape)}, block_q={self.block_q}, block_k={self.block_k}, "
            f"q_len={self.q_len}, kv_len={self.kv_len})"
        )


def _in_order(indices: Tensor, num_blocks: int) -> Tensor:
    """Ascending, without repeats, -1 last; the width is trimmed to the longest list."""
    if indices.numel() == 0:
        return indices
    keys = torch.where(indices < 0, num_blocks, indices).sort(dim=-1).values
    if indices.shape[-1] > 1:
        repeated = torch.zeros_like(keys, dtype=torch.bool)
        repeated[..., 1:] = keys[..., 1:] == keys[..., :-1]
        keys = keys.masked_fill(repeated, num_blocks).sort(dim=-1).values
    width = int((keys < num_blocks).sum(-1).max())
    return torch.where(keys == num_blocks, -1, keys)[..., :width].contiguous()
