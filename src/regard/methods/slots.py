"""Slots: where in a cache the entries of a head lie, as a pure function of how many tokens it has seen.

Nothing about positions is stored: `held(length)` tells which position every slot holds after `length` tokens. Positions and
lengths count from a row's first real token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 128  # slots by which storage grows
_NOWHERE = 1 << 62


@dataclass(frozen=True)
class Slots:
    """Base. Lengths are int64 (B, 1, 1); answers are (B, 1 | heads, slots), -1 for an empty slot."""

    def capacity(self, length: int) -> int:
        """Slots to allocate for rows of at most `length` tokens; never shrinks as the length grows."""
        raise NotImplementedError

    def held(self, length: Tensor, capacity: int) -> Tensor:
        """The position that each slot holds after `length` tokens. No position is held twice."""
        raise NotImplementedError

    def of(self, position: Tensor, length: Tensor) -> Tensor:
        """The slot in which `position` lies after `length` tokens; where it is not held, any number above all slots."""
        raise NotImplementedError

    def held_tokens(self, length: int) -> int:
        """Entries kept after `length` tokens, per head, mean over heads rounded up."""
        raise NotImplementedError


@dataclass(frozen=True)
class AllSlots(Slots):
    """Everything, in order."""

    def capacity(self, length: int) -> int:
        return -(-length // PAGE) * PAGE

    def held(self, length: Tensor, capacity: int) -> Tensor:
        slot = torch.arange(capacity, device=length.device)
        return torch.where(slot < length, slot, -1)

    def of(self, position: Tensor, length: Tensor) -> Tensor:
        return position

    def held_tokens(self, length: int) -> int:
        return length


@dataclass(frozen=True)
class RingSlots(Slots):
    """`sink` fixed slots for the first tokens, then a ring of the last `window`. Until the ring is full, slots are positions."""

    sink: int
    window: int

    def capacity(self, length: int) -> int:
        return min(self.sink + self.window, -(-length // PAGE) * PAGE)

    def held(self, length: Tensor, capacity: int) -> Tensor:
        slot = torch.arange(capacity, device=length.device)
        last = length - 1
        turning = last - (last - slot) % self.window  # the latest position that this slot of the ring was written with
        position = torch.where(slot < self.sink, slot, turning)
        least = torch.where(slot < self.sink, 0, self.sink)
        return torch.where((position >= least) & (position < length), position, -1)

    def of(self, position: Tensor, length: Tensor) -> Tensor:
        return torch.where(position < self.sink, position, self.sink + (position - self.sink) % self.window)

    def held_tokens(self, length: int) -> int:
        return min(length, self.sink + self.window)


@dataclass(frozen=True)
class ShardedSlots(Slots):
    """S2-Attention: a ring of the last `local_blocks` blocks, and, once they have left it, the strided columns, in order.

    Block j of head h is a strided column when (j + phases[h]) % stride == 0. Sinks that are none go to slots of their own.
    """

    block: int
    local_blocks: int
    stride: int
    phases: tuple[int, ...]
    sink: int = 0

    @property
    def ring(self) -> int:
        return self.local_blocks * self.block

    def capacity(self, length: int) -> int:
        if length <= self.ring:
            return self.sink + min(self.ring, -(-length // PAGE) * PAGE)
        left = -(-(length - self.ring) // self.block)  # blocks that have begun to leave the ring
        return self.sink + self.ring + -(-left // self.stride) * self.block

    def _phase(self, device: torch.device) -> Tensor:
        return torch.tensor(self.phases, device=device)[None, :, None]

    def held(self, length: Tensor, capacity: int) -> Tensor:
        slot = torch.arange(capacity, device=length.device)
        last, phase = length - 1, self._phase(length.device)
        place = slot - self.sink
        turning = last - (last - place) % self.ring
        column = (place - self.ring) // self.block  # the how-manieth strided column of the head
        strided = ((-phase) % self.stride + column * self.stride) * self.block + (place - self.ring) % self.block
        strided = torch.where(strided < length - self.ring, strided, -1)  # in the ring until then
        lone = torch.where(
            (slot // self.block + phase) % self.stride == 0, -1, slot
        )  # a sink that is no strided column
        lone = torch.where(slot < length - self.ring, lone, -1)
        position = torch.where(place < 0, lone, torch.where(place < self.ring, turning, strided))
        return torch.where((position >= 0) & (position < length), position, -1)

    def of(self, position: Tensor, length: Tensor) -> Tensor:
        phase = self._phase(position.device)
        block = position // self.block
        column = (block - (-phase) % self.stride) // self.stride
        strided = self.sink + self.ring + column * self.block + position % self.block
        in_ring = position >= length - self.ring
        is_strided = (block + phase) % self.stride == 0
        kept = torch.where(in_ring, self.sink + position % self.ring, strided)
        lone = torch.where(position < self.sink, position, _NOWHERE)
        return torch.where(in_ring | is_strided, kept, lone)

    def held_tokens(self, length: int) -> int:
        if length <= self.ring:
            return length
        counts = (self.held(torch.tensor([[[length]]]), self.capacity(length)) >= 0).sum(-1)
        return int(-(-counts.sum() // counts.numel()))
