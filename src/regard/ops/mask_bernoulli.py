"""Blocks of keys that take part by chance, the less likely the farther they are: PrFlashAttention's pattern.

"The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI", 2024, arXiv 2410.18441: a position
paper without code. It lets a pair of blocks take part with a probability that depends on their distance and leaves the probability open;
1 / (1 + distance)^gamma is our choice. Draws are a hash of seed, head and block numbers: the same on every device, in prefill and decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require, require_int
from .mask_base import Mask

_TABLE_FROM = 4096  # index entries asked about at a time from which a table of all blocks pays
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hashed_uniform(seed: int, *numbers: Tensor) -> Tensor:
    """float32 in [0, 1), one for each combination of `numbers` (integers that broadcast together): splitmix64, number after number."""
    x = torch.tensor(_signed(seed * _MIX[0] + 1), device=numbers[0].device)
    for number in numbers:
        x = (x ^ number.long()) + _signed(_MIX[0])
        x = (x ^ _shifted(x, 30)) * _signed(_MIX[1])
        x = (x ^ _shifted(x, 27)) * _signed(_MIX[2])
        x = x ^ _shifted(x, 31)
    return _shifted(x, 40).float() / (1 << 24)


def distance_probability(distance: Tensor, gamma: float) -> Tensor:
    """1 / (1 + distance)^gamma, float32."""
    return (1.0 + distance.float()) ** -gamma


def gamma_for(kept: float, num_blocks: int) -> float:
    """The gamma with which the last of `num_blocks` rows of blocks keeps `kept` blocks on average, 1 < kept <= num_blocks."""
    require_int("num_blocks", num_blocks, 1)
    fits = isinstance(kept, (int, float)) and 1 < kept <= max(num_blocks, 2)
    require(fits, "kept", kept, f"a number > 1 and <= {num_blocks}, the blocks")
    distance = torch.arange(num_blocks, dtype=torch.float64)
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(((1 + distance) ** -middle).sum()) > kept else (low, middle)
    return low


class DistanceBernoulli(Mask):
    """Block i of queries keeps block j of keys if they are the same, if j is one of the first `sink`, or by the draw."""

    frozen = varies_head = True

    def __init__(self, block_size: int, gamma: float, sink: int, seed: int, group: int, per_batch: bool) -> None:
        self.block_size, self.sink = require_int("block_size", block_size, 1), require_int("sink", sink, 0)
        self.group, self.seed = require_int("group", group, 1), require_int("seed", seed, -(1 << 62))
        require(isinstance(gamma, (int, float)) and gamma >= 0, "gamma", gamma, "a number >= 0")
        self.gamma, self.varies_batch = float(gamma), bool(per_batch)
        self._table = torch.zeros(0, 0, 0, dtype=torch.bool)

    def blocks(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query block i keeps key block j."""
        numbers = max(x.numel() for x in (b, h, i, j))
        if self.varies_batch or numbers < _TABLE_FROM or int(torch.minimum(i.min(), j.min())) < 0:
            return self._drawn(b, h, i, j)
        return self._known(int(h.max()) // self.group + 1, int(torch.maximum(i.max(), j.max())) + 1, i.device)[
            h // self.group, i, j
        ]

    def _known(self, heads: int, blocks: int, device: torch.device) -> Tensor:
        """All draws up to these numbers, (heads, blocks, blocks): masks are asked for the same blocks entry by entry."""
        if self._table.shape[0] < heads or self._table.shape[1] < blocks or self._table.device != device:
            h, i = torch.arange(heads, device=device)[:, None, None], torch.arange(blocks, device=device)
            self._table = self._drawn(torch.zeros_like(h), h * self.group, i[:, None], i)
        return self._table

    def _drawn(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b if self.varies_batch else torch.zeros_like(b)
        drawn = hashed_uniform(self.seed, row, h // self.group, i, j) < distance_probability((i - j).abs(), self.gamma)
        return drawn | (i == j) | (j < self.sink)

    def keep(self, b, h, q_idx, kv_idx):
        size = self.block_size
        return self.blocks(b, h, q_idx.div(size, rounding_mode="floor"), kv_idx.div(size, rounding_mode="floor"))

    def bounds(self, b, h, q_lo, q_hi, kv_lo, kv_hi):
        i_lo, i_hi, j_lo, j_hi = (x.div(self.block_size, rounding_mode="floor") for x in (q_lo, q_hi, kv_lo, kv_hi))
        one = (i_lo == i_hi) & (j_lo == j_hi)
        exact = self.blocks(b, h, i_lo, j_lo)
        return exact | ~one, (exact & one) | torch.full_like(exact, self.gamma == 0)

    def __repr__(self) -> str:
        return f"distance_bernoulli({self.block_size}, gamma={self.gamma}, sink={self.sink}, seed={self.seed})"
