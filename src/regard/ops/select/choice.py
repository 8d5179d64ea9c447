"""`Choice`: everything that a selector decides about one attention call, ready for `regard.ops.attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..attention import attention
from ..masks import Mask, causal
from ..selection import Selection


class Choice(NamedTuple):
    """A selection with what has to stand beside it.

    Attributes:
        selection: which key blocks each query block looks at.
        mask: what is allowed inside these blocks, or None. It is only asked about pairs that `selection` holds.
        score_mod: how scores are bent, or None.
    """

    selection: Selection
    mask: Mask | None = None
    score_mod: Callable[..., Tensor] | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = causal, **options: Any) -> Tensor:
        """Attention over what was chosen and `mask` allows. `options` as in `regard.ops.attention`."""
        inside = mask if self.mask is None else mask & self.mask
        return attention(q, k, v, mask=inside, selection=self.selection, score_mod=self.score_mod, **options)
