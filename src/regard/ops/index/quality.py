"""How good an index is at what attention needs of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import require_name
from .base import Found, KeyIndex
from .exact import ExactIP

KINDS = ("exact", "ivf", "graph")


def make_index(kind: str, **options: Any) -> KeyIndex:
    """An empty index: "exact", "ivf" (needs faiss) or "graph"; options are those of the class."""
    require_name("kind", kind, KINDS)
    if kind == "exact":
        return ExactIP(**options)
    if kind == "ivf":
        from .ivf import IVF

        return IVF(**options)
    from .query_graph import QueryGraph

    return QueryGraph(**options)


def found_mass(found: Found, best: Found, scale: float) -> Tensor:
    """Attention mass of the keys that were found, as a share of that of the best ones, (B, H, N).

    Args:
        found, best: searches with the same k, `best` by an exact index. scale: of the scores in the softmax.
    """
    mass = [torch.logsumexp(part.scores.double() * scale, -1) for part in (found, best)]
    return torch.exp(mass[0] - mass[1]).nan_to_num(1.0)
