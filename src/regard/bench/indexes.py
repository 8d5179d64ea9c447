"""Indexes of keys beside each other: what they find of the attention mass, and what they read for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .._checks import require_int
from ..ops.index import IVF, ExactIP, KeyIndex, QueryGraph, found_mass

GRAPH, BLIND, CELLS = "graph made from queries", "graph of near keys", "inverted file"


@dataclass(frozen=True)
class IndexFigures:
    """What one index did.

    Attributes:
        label: which. mass: of the exact best keys' attention mass, the share it found, mean over heads and queries; worst: the least.
        read: share of the keys that a search read. build_seconds: for all heads. search_seconds: of one query of all heads.
    """

    label: str
    mass: float
    worst: float
    read: float
    build_seconds: float
    search_seconds: float


def compare_indexes(
    keys: Tensor,
    queries: Tensor,
    test: Tensor,
    *,
    top: int = 100,
    scale: float | None = None,
    indexes: Mapping[str, tuple[KeyIndex, bool]] | None = None,
) -> list[IndexFigures]:
    """Build indexes of the same keys and ask them the same questions.

    Args:
        keys: (B, Hkv, n, D). queries: (B, H, m, D), to build from. test: (B, H, t, D), to ask.
        top: keys wanted. scale: of the scores in the softmax, default D ** -0.5.
        indexes: label -> (empty index, whether it is built from the queries too). None: a graph made from queries, the same without
            queries, and an inverted file (which needs faiss), all reading about 5 % of the keys.
    """
    require_int("top", top, 1)
    if indexes is None:
        indexes = {GRAPH: (QueryGraph(), True), BLIND: (QueryGraph(), False), CELLS: (IVF(), False)}
    best = ExactIP().build(keys).search(test, top)
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    figures = []
    for label, (index, learns) in indexes.items():
        began = time.perf_counter()
        index.build(keys, queries if learns else None)
        built = time.perf_counter() - began
        found = index.search(test, top)
        one = test[:, :, :1]
        began = time.perf_counter()
        index.search(one, top)
        searched = time.perf_counter() - began
        mass = found_mass(found, best, scale)
        read = float(found.scanned.double().mean()) / keys.shape[2]
        figures.append(IndexFigures(label, float(mass.mean()), float(mass.min()), read, built, searched))
    return figures
