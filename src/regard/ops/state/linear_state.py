"""The state that linear attention carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import bad_value, require, require_int, require_tensor


@dataclass
class LinearState:
    """All that a causal linear attention remembers: its size does not depend on how many tokens it has seen.

    kv: (B, H, D, Dv), the decayed sum of k^T v over the tokens so far; D is the width after the feature map.
    normaliser: (B, H, D), the decayed sum of k, or None when the attention is not normalised.
    float32 (float64 for float64 inputs). A state holds numbers after the last token of the call that returned it.
    """

    kv: Tensor
    normaliser: Tensor | None = None

    def __post_init__(self) -> None:
        require_tensor("state.kv", self.kv, dims=4, floating=True)
        if self.normaliser is not None:
            require_tensor("state.normaliser", self.normaliser, dims=3, floating=True)
            if self.normaliser.shape != self.kv.shape[:3]:
                got, need = tuple(self.normaliser.shape), tuple(self.kv.shape[:3])
                raise bad_value("state.normaliser", f"shape {got}", f"shape {need} to go with state.kv")

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        normalize: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LinearState:
        """The state before the first token. head_dim: width after the feature map; value_dim: the same unless given."""
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "num_heads": num_heads, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            require_int(name, size, 0)
        require(dtype.is_floating_point, "dtype", dtype, "a floating point dtype")
        kv = torch.zeros(batch, num_heads, head_dim, value_dim, dtype=dtype, device=device)
        return cls(kv, kv.new_zeros(batch, num_heads, head_dim) if normalize else None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.kv.nbytes + (0 if self.normaliser is None else self.normaliser.nbytes)

    def detach(self) -> LinearState:
        """The same numbers, cut from the graph: for truncated back-propagation through time."""
        return LinearState(self.kv.detach(), None if self.normaliser is None else self.normaliser.detach())

    def select(self, batch_index: Tensor) -> LinearState:
        """The rows of the batch named by `batch_index` (int64, (B',)): beam search reorders its beams with this."""
        normaliser = None if self.normaliser is None else self.normaliser.index_select(0, batch_index)
        return LinearState(self.kv.index_select(0, batch_index), normaliser)

    def to(self, *args: object, **kwargs: object) -> LinearState:
        """As `Tensor.to`."""
        normaliser = None if self.normaliser is None else self.normaliser.to(*args, **kwargs)  # type: ignore[call-overload]
        return LinearState(self.kv.to(*args, **kwargs), normaliser)  # type: ignore[call-overload]
