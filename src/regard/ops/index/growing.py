"""`Growing`: a tensor that gets longer, in memory that is allocated ahead of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Growing:
    """Rows (B, H, n, ...) appended over time; storage grows by an eighth of the length."""

    def __init__(self) -> None:
        self.size = 0
        self._held: Tensor | None = None

    def append(self, x: Tensor) -> None:
        """Add (B, H, c, ...); the first call sets dtype and device."""
        need = self.size + x.shape[2]
        if self._held is None:
            self._held = x.new_empty(x.shape)
        elif need > self._held.shape[2]:
            held = self._held.new_empty((*x.shape[:2], need + need // 8, *x.shape[3:]))
            held[:, :, : self.size] = self._held[:, :, : self.size]
            self._held = held
        self._held[:, :, self.size : need] = x
        self.size = need

    @property
    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return self._held is None

    def view(self) -> Tensor:
        """All rows, (B, H, size, ...), not copied."""
        if self._held is None:
            raise RuntimeError("nothing was appended yet")
        return self._held[:, :, : self.size]

    def drop_last(self, count: int) -> None:
        self.size -= count

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace the storage by `fn` of it."""
        if self._held is not None:
            self._held = fn(self._held)
