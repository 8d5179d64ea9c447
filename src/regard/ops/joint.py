"""One softmax over several sets of keys: tokens that a query sees directly, and summaries that stand for the others.

Each set has its own mask and whatever fast kernel suits it; the log-sum-exps join the partial results exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._checks import require
from .attention import attention
from .masks import Mask, dense
from .reference import merge_lse


@dataclass(frozen=True)
class KeySet:
    """Keys (B, Hkv, M, D) and values (B, Hkv, M, Dv) with the mask over them.

    `mask` speaks of query ROWS (row 0 has position 0) and of places in this set. `bias` is added to the scores.
    """

    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None = None
    bias: Tensor | None = None


def joint_attention(q: Tensor, sets: Sequence[KeySet], *, return_lse: bool = False, **options: Any) -> Any:
    """Softmax attention of q (B, H, N, D) over the union of several sets of keys.

    Args:
        sets: at least one; sets without keys are left out. options: as in `regard.ops.attention` (`scale`, `score_mod`, `dropout`, ...).
    Returns:
        (B, H, N, Dv); with `return_lse` also the log-sum-exps (B, H, N). A query that sees nothing anywhere gives zeros and -inf.
    """
    require(len(sets) > 0, "sets", "none", "at least one set of keys")
    filled = [each for each in sets if each.k.shape[2] > 0] or list(sets[:1])
    parts = [
        attention(
            q,
            each.k,
            each.v,
            mask=dense(each.mask, q_offset=0) if isinstance(each.mask, Tensor) else each.mask,
            bias=each.bias,
            q_offset=0,
            return_lse=return_lse or len(filled) > 1,
            **options,
        )
        for each in filled
    ]
    if len(parts) == 1:
        return parts[0]
    out, lse = merge_lse([out for out, _ in parts], [lse for _, lse in parts])
    return (out, lse) if return_lse else out
