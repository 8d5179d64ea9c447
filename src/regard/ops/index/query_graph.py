"""A graph of keys made from queries, walked to the keys with the largest inner products.

RetrievalAttention, Liu et al. 2024, arXiv 2409.10516. The authors' index is not released; this one follows the idea of the paper and
of RoarGraph (Chen et al. 2024): queries of attention are far from keys in distribution, so that a graph of near keys leads them
astray. Exact nearest keys of the prompt's queries give edges query -> key, which are projected to edges key -> key; they are kept by
how many queries ask for them, and joined by edges to near keys and a ring through all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._checks import require_int, require_name
from .base import Found, KeyIndex, import_faiss, reads_of, require_reads
from .graph_build import near_keys, projected_edges, put_edges, ring, wanted_keys
from .graph_search import FaissWalker, beam_search
from .growing import Growing

_ENTRIES = 16
_SAMPLE = 32  # queries on which the list length is fitted, twice
_ALL = 256  # so many keys are all read: a walk is not worth its while


class QueryGraph(KeyIndex):
    """Approximate search by inner product that reads a few percent of the keys.

    Args:
        wanted: exact nearest keys of each query of `build` that become edges.
        degree: edges per key that come from queries. near: edges per key to near keys. (And one to the next key.)
        ef: length of the list of candidates; the longer, the more is read and found; at the number of keys the search is exact. None: what
            `reads` allows.
        reads: keys that a search may read, an int, or a share of all, a float in (0, 1]. In PyTorch it is a strict limit of each query;
            with faiss, `ef` is fitted for each kv head so that the build queries keep to it on average. (Of up to 256 keys all are read,
            and never fewer than the neighbours of one key.)
        max_queries: queries per kv head used to build, the last ones of each query head.
        backend: "torch" (any device, all heads together), "faiss" (CPU; several times faster), or "auto": faiss where it is installed and
            the keys are on the CPU.

    Without queries the graph has edges between near keys alone. Keys inserted later are joined to near keys, and through `queries` of
    `insert` to the keys these want.
    """

    def __init__(
        self,
        wanted: int = 16,
        degree: int = 24,
        near: int = 15,
        ef: int | None = None,
        reads: int | float = 0.05,
        max_queries: int = 4096,
        backend: str = "auto",
    ) -> None:
        self.wanted = require_int("wanted", wanted, 2)
        self.degree, self.near = require_int("degree", degree, 1), require_int("near", near, 1)
        self.ef = None if ef is None else require_int("ef", ef, 1)
        require_reads(reads)
        self.reads, self.max_queries = reads, require_int("max_queries", max_queries, 1)
        self.backend = require_name("backend", backend, ("auto", "torch", "faiss"))
        self._faiss: Any = None
        if backend != "torch":
            try:
                self._faiss = import_faiss("QueryGraph(backend='faiss')")
            except ImportError:
                if backend == "faiss":
                    raise
        super().__init__()

    def _forget(self) -> None:
        super()._forget()
        self._edges = Growing()  # (B, Hkv, n, S): from queries | near | next | perhaps one empty, so that S is even
        self._entry: Tensor | None = None  # (B, Hkv, E)
        self._samples: Tensor | None = None  # (2, B, Hkv, c, D), queries on which list lengths are fitted
        self._walkers: list[list[FaissWalker | None]] = []
        self._lists: dict[tuple[int, int], tuple[int, int]] = {}  # keys and fitted list length by row and kv head

    @property
    def graph(self) -> Tensor:
        """Neighbours of each key, int32 (B, Hkv, n, S), -1 for none."""
        self._require_built()
        return self._edges.view()

    @property
    def _in_faiss(self) -> bool:
        return self._faiss is not None and self.keys.device.type == "cpu" and self.keys.dtype == torch.float32

    def _no_edges(self, count: int) -> Tensor:
        width = self.degree + self.near + 1
        shape = (*self.keys.shape[:2], count, width + width % 2)
        return torch.full(shape, -1, dtype=torch.int32, device=self.keys.device)

    def _forget_walkers(self) -> None:
        batch, heads = self.keys.shape[:2]
        self._walkers = [[None] * heads for _ in range(batch)]

    # Building

    def _build(self, queries: Tensor | None, first_query: Tensor) -> None:
        assert self.first is not None
        batch, heads, n, _ = self.keys.shape
        self._edges = Growing()
        self._edges.append(self._no_edges(n))
        edges = self.graph
        self._entry = torch.full((batch, heads, _ENTRIES), -1, dtype=torch.long, device=self.keys.device)
        self._samples, self._lists = None, {}
        self._forget_walkers()
        if queries is not None and queries.shape[2]:
            group = queries.shape[1] // heads
            used = min(queries.shape[2], max(1, self.max_queries // group))
            first_query = (first_query - (queries.shape[2] - used)).clamp(0, used)
            queries = queries[:, :, -used:].unflatten(1, (heads, group))
            if used > int(first_query.max()):
                self._samples = _samples(queries, first_query, _SAMPLE)
        for r in range(batch):
            first = min(n, int(self.first[r]))
            for h in range(heads):
                if first < n:
                    asked = None if queries is None else queries[r, h, :, int(first_query[r]) :].flatten(0, 1)
                    found, entry = self._of_head(self.keys[r, h, first:], asked)
                    edges[r, h, first:, : found.shape[1]] = torch.where(found < 0, -1, found + first).int()
                    self._entry[r, h, : len(entry)] = entry + first

    def _of_head(self, keys: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """Edges (n, degree + near + 1) and entries of the keys (n, D) of one head."""
        n = len(keys)
        near, successor = near_keys(keys, self.near), ring(n, keys.device)
        if queries is None or n < 2 or not len(queries):
            projected = torch.full((n, self.degree), -1, dtype=torch.long, device=keys.device)
            popular = (keys * keys).sum(-1)
        else:
            wanted = wanted_keys(keys, queries, self.wanted)
            projected = projected_edges(wanted, n, self.degree)
            popular = torch.bincount(wanted.flatten(), minlength=n).to(keys.dtype)
        return torch.cat([projected, near, successor], 1), popular.topk(min(_ENTRIES, n)).indices

    # Searching

    def _search(self, q: Tensor, k: int) -> Found:
        assert self.first is not None
        if self.size - int(self.first.min()) <= _ALL:
            return self._exact(q, k)
        return self._walk_faiss(q, k) if self._in_faiss else self._walk(q, k)

    def _limits(self) -> Tensor:
        """Keys that a query may read, (B,)."""
        assert self.first is not None
        counts = (self.size - self.first).clamp(min=0)
        if self.ef is not None:
            return counts
        allowed = torch.tensor([reads_of(self.reads, int(count)) for count in counts])
        return torch.where(counts <= _ALL, counts, allowed)

    def _walk(self, q: Tensor, k: int) -> Found:
        assert self._entry is not None
        heads = q.shape[1]
        limit = self._limits().repeat_interleave(heads)
        ef = self.ef if self.ef is not None else max(k, int(limit.max()))
        greed = 1 if self.ef is not None else 16
        parts = [
            beam_search(
                rows.flatten(0, 1),
                self.keys.flatten(0, 1),
                self.graph.flatten(0, 1),
                self._entry.flatten(0, 1),
                k,
                ef,
                limit,
                greed,
            )
            for rows in q.split(max(1, (1 << 25) // max(1, self.size * q.shape[0] * heads)), dim=2)
        ]
        indices, scores, read = (torch.cat(part, 1).unflatten(0, q.shape[:2]) for part in zip(*map(_padded(k), parts)))
        return Found(indices, scores, read)

    def _walk_faiss(self, q: Tensor, k: int) -> Found:
        assert self.first is not None
        indices = torch.full((*q.shape[:3], k), -1)
        scores = torch.full((*q.shape[:3], k), -torch.inf)
        read = torch.zeros(q.shape[:3], dtype=torch.long)
        for r in range(q.shape[0]):
            first = int(self.first[r])
            if first >= self.size:
                continue
            for h in range(q.shape[1]):
                walker = self._walker(r, h, first)
                ids, score, count = walker.search(q[r, h], min(k, len(walker)), self._list_length(r, h, walker, k))
                indices[r, h, :, : ids.shape[1]] = torch.where(ids < 0, -1, ids + first)
                scores[r, h, :, : ids.shape[1]] = score
                read[r, h] = count
        return Found(indices, scores, read)

    def _walker(self, r: int, h: int, first: int) -> FaissWalker:
        walker = self._walkers[r][h]
        if walker is None:
            assert self._entry is not None
            graph = self.graph[r, h, first:]
            entry = max(0, int(self._entry[r, h, 0]) - first)
            walker = FaissWalker(self._faiss, self.keys[r, h, first:], torch.where(graph < 0, -1, graph - first), entry)
            self._walkers[r][h] = walker
        return walker

    def _list_length(self, r: int, h: int, walker: FaissWalker, k: int) -> int:
        if self.ef is not None:
            return self.ef
        if len(walker) <= _ALL:
            return len(walker)
        size, length = self._lists.get((r, h), (0, 0))
        if len(walker) >= 1.25 * size:  # fitted never, or long ago
            limit = int(self._limits()[r])
            few = (
                self.keys[r, h, :: max(1, self.size // _SAMPLE)][None]
                if self._samples is None
                else self._samples[:, r, h]
            )
            length = min(walker.fit_ef(sample, min(k, len(walker)), limit) for sample in few)
            self._lists[r, h] = (len(walker), length)
        return length

    # Growing and changing

    def _insert(self, before: int, queries: Tensor | None) -> None:
        assert self.first is not None
        heads = self.keys.shape[1]
        self._edges.append(self._no_edges(self.size - before))
        for r in range(len(self.first)):
            first = int(self.first[r])
            for h in range(heads):
                if first < self.size:
                    self._join_near(r, h, first, max(before, first))
        self._forget_walkers()
        if queries is not None and queries.shape[2]:
            wanted = self.search(queries, self.wanted).indices.unflatten(1, (heads, -1)).flatten(2, 3)
            for r in range(len(self.first)):
                for h in range(heads):
                    self._join_wanted(self.graph[r, h], wanted[r, h], before)
            self._forget_walkers()

    def _join_near(self, r: int, h: int, first: int, before: int) -> None:
        """Edges of the keys from `before` on to near keys, back from these, and the ring through them."""
        assert self._entry is not None
        keys, edges = self.keys[r, h], self.graph[r, h]
        fresh = torch.arange(before, self.size, device=keys.device)
        closeness = keys[fresh] @ keys[first:].T - 0.5 * (keys[first:] ** 2).sum(-1)
        closeness[torch.arange(len(fresh)), fresh - first] = -torch.inf
        count = min(self.near, self.size - first - 1)
        near = closeness.topk(count, dim=-1).indices + first
        a, b = self.degree, self.degree + self.near
        edges[fresh, a : a + count] = near.int()
        back = near[:, : max(1, count // 2)]
        put_edges(edges[:, a:b], back.flatten(), fresh[:, None].expand_as(back).flatten().int())
        edges[fresh, b] = (fresh + 1).int()
        edges[self.size - 1, b] = first
        if before > first:
            edges[before - 1, b] = before
        if int(self._entry[r, h, 0]) < 0:
            self._entry[r, h, 0] = first

    def _join_wanted(self, edges: Tensor, wanted: Tensor, before: int) -> None:
        """Edges that queries ask for, where one end is a new key."""
        best, others = wanted[:, :1].expand(-1, wanted.shape[1] - 1).flatten(), wanted[:, 1:].flatten()
        real = (best >= 0) & (others >= 0) & ((best >= before) | (others >= before))
        code = torch.unique(torch.cat([best[real] * self.size + others[real], others[real] * self.size + best[real]]))
        put_edges(edges[:, : self.degree], code // self.size, (code % self.size).int())

    def _drop(self) -> None:
        assert self._entry is not None and self.first is not None
        self._edges.drop_last(self._edges.size - self.size)
        edges, last = self.graph, self.size - 1
        edges.masked_fill_(edges >= self.size, -1)
        self._entry.masked_fill_(self._entry >= self.size, -1)
        for r, first in enumerate(self.first.tolist()):
            if first <= last:
                edges[r, :, last, self.degree + self.near] = first
                self._entry[r, :, 0] = torch.where(self._entry[r, :, 0] < 0, first, self._entry[r, :, 0])
        self._forget_walkers()

    def _map(self, fn: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        assert self._entry is not None
        self._edges.map(fn)
        self._entry = fn(self._entry)
        if self._samples is not None:
            self._samples = fn(self._samples.transpose(0, 1).contiguous()).transpose(0, 1)
        # walkers are never changed, only replaced, so rows may share them
        self._walkers = [list(self._walkers[row]) for row in rows]
        self._lists = {
            (new, h): self._lists[old, h]
            for new, old in enumerate(rows)
            for h in range(self.keys.shape[1])
            if (old, h) in self._lists
        }


def _samples(queries: Tensor, first: Tensor, count: int) -> Tensor:
    """Two samples of the queries (B, Hkv, group, m, D), from everywhere after `first` (B,) and from the end: (2, B, Hkv, count', D)."""
    length = queries.shape[3]
    positions = min(length - int(first.max()), max(1, count // queries.shape[2]))
    parts = []
    for row, begin in zip(queries, first.tolist()):
        everywhere = torch.linspace(begin, length - 1, positions).long()
        end = (length - 1 - 8 * torch.arange(positions)).clamp(min=begin)
        parts.append(torch.stack([row[:, :, where.to(row.device)].flatten(1, 2) for where in (everywhere, end)]))
    return torch.stack(parts, 1)


def _padded(k: int) -> Callable[[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]:
    def pad(part: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, scores, read = part
        missing = (0, k - ids.shape[-1])
        return (
            torch.nn.functional.pad(ids, missing, value=-1),
            torch.nn.functional.pad(scores, missing, value=-torch.inf),
            read,
        )

    return pad
