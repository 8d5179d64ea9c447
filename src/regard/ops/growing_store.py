"""Storage of keys and values that grow while decoding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["GrowingStore"]

_PAGE = 128  # tokens by which a store grows: one copy every _PAGE steps, at most _PAGE - 1 rows of slack


class GrowingStore:
    """Keys and values that only grow, (B, H, length, D) each, in storage that grows by pages of `page` tokens."""

    def __init__(self, page: int = _PAGE) -> None:
        self.length, self.page = 0, page
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H, n, D) rows; returns views of everything held."""
        need = self.length + keys.shape[2]
        if self._keys is None or self._values is None or need > self._keys.shape[2]:
            capacity = -(-need // self.page) * self.page
            self._keys, self._values = (
                self._grown(self._keys, keys, capacity),
                self._grown(self._values, values, capacity),
            )
        self._keys[:, :, self.length : need] = keys
        self._values[:, :, self.length : need] = values
        self.length = need
        return self.views()

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        new = like.new_empty((*like.shape[:2], capacity, like.shape[3]))
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def views(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of storage, the slack of the last page included."""
        return sum(t.numel() * t.element_size() for t in (self._keys, self._values) if t is not None)

    def drop_last(self, count: int) -> None:
        self.length -= count

    def map_rows(self, fn: Any) -> None:
        if self._keys is not None and self._values is not None:
            self._keys, self._values = fn(self._keys), fn(self._values)
