"""An inverted-file index by faiss: keys in cells around k-means centroids, of which a search reads the nearest few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import require_int
from .base import Found, KeyIndex, import_faiss, reads_of, require_reads


class IVF(KeyIndex):
    """`faiss.IndexIVFFlat` over inner products, one for each kv head of each row. On the CPU.

    The cells are made of the keys alone. Queries of attention are not distributed like keys, which is why such an index has to read
    many cells (RetrievalAttention, arXiv 2409.10516); it is here as the baseline.

    Args:
        cells: k-means cells. None: the square root of the number of keys.
        probes: cells that a search reads. None: so many that centroids and cells together are about `reads` keys.
        reads: keys that a search may read, an int, or a share of all, a float in (0, 1].
        seed: of k-means.

    Raises `ImportError` where faiss is not installed.
    """

    def __init__(
        self, cells: int | None = None, probes: int | None = None, reads: int | float = 0.05, seed: int = 0
    ) -> None:
        if cells is not None:
            require_int("cells", cells, 1)
        if probes is not None:
            require_int("probes", probes, 1)
        require_reads(reads)
        self.cells, self.probes, self.reads, self.seed = cells, probes, reads, seed
        self._faiss = import_faiss("IVF")
        super().__init__()

    def _forget(self) -> None:
        super()._forget()
        self._indexes: list[list[Any]] = []

    def _build(self, queries: Tensor | None, first_query: Tensor) -> None:
        assert self.first is not None
        self._indexes = [
            [self._make(keys[int(first) :], int(first)) for keys in row] for row, first in zip(self.keys, self.first)
        ]

    def _make(self, keys: Tensor, first: int) -> Any:
        if len(keys) == 0:
            return None
        faiss, data = self._faiss, _array(keys)
        cells = min(len(keys), self.cells or max(1, round(len(keys) ** 0.5)))
        quantizer = faiss.IndexFlatIP(data.shape[1])
        index = faiss.IndexIVFFlat(quantizer, data.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.min_points_per_centroid = self.seed, 1
        index.train(data)
        index.add_with_ids(data, np.arange(first, first + len(data)))
        return index

    def _insert(self, before: int, queries: Tensor | None) -> None:
        assert self.first is not None
        for r, row in enumerate(self._indexes):
            first = max(before, int(self.first[r]))
            for h, index in enumerate(row):
                if index is None:
                    row[h] = self._make(self.keys[r, h, first:], first)
                elif first < self.size:
                    index.add_with_ids(_array(self.keys[r, h, first:]), np.arange(first, self.size))

    def _search(self, q: Tensor, k: int) -> Found:
        scores = torch.full((*q.shape[:3], k), -torch.inf)
        indices = torch.full((*q.shape[:3], k), -1)
        scanned = torch.zeros(q.shape[:3], dtype=torch.long)
        stats = self._faiss.cvar.indexIVF_stats
        for r, row in enumerate(self._indexes):
            for h, index in enumerate(row):
                if index is None:
                    continue
                index.nprobe = self._probes(index)
                stats.reset()
                found, ids = index.search(_array(q[r, h]), k)
                scores[r, h] = torch.from_numpy(np.where(ids < 0, -np.inf, found))
                indices[r, h] = torch.from_numpy(ids)
                scanned[r, h] = round(stats.ndis / q.shape[2]) + index.nlist
        return Found(indices.to(q.device), scores.to(q), scanned.to(q.device))

    def _probes(self, index: Any) -> int:
        if self.probes is not None:
            return min(self.probes, index.nlist)
        left = reads_of(self.reads, index.ntotal) - index.nlist
        return min(index.nlist, max(1, round(left / (index.ntotal / index.nlist))))

    def _drop(self) -> None:
        for row in self._indexes:
            for h, index in enumerate(row):
                if index is not None:
                    index.remove_ids(self._faiss.IDSelectorRange(self.size, 1 << 60))
                    row[h] = index if index.ntotal else None

    def _map(self, fn: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        taken: set[int] = set()
        indexes = []
        for row in rows:  # a row that comes twice gets indexes of its own, since each will grow by itself
            copies = [i if i is None else self._faiss.clone_index(i) for i in self._indexes[row]]
            indexes.append(copies if row in taken else self._indexes[row])
            taken.add(row)
        self._indexes = indexes


def _array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())
