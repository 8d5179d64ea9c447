"""Searching the graph of `QueryGraph`: a beam search over many queries at once in PyTorch, or faiss walking the same graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_EXPAND = 8  # keys whose neighbours are read at once, at most


def beam_search(
    q: Tensor, keys: Tensor, graph: Tensor, entry: Tensor, k: int, ef: int, limit: Tensor, rounds: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Best-first search, all queries of all graphs together.

    Args:
        q: (C, R, D). keys: (C, n, D). graph: (C, n, S) numbers of neighbours. entry: int64 (C, E), where to begin. -1 is none.
        k: keys wanted. ef: length of the list of keys whose neighbours are still to be read.
        limit: int64 (C,), keys a query may read. rounds: of reading, in which it should use that up, at least; the more, the better chosen.
    Returns:
        numbers (C, R, k'), scores, with k' <= k, best first (-1 and -inf where nothing was found), and keys read (C, R).
    """
    graphs, rows, dim = q.shape
    n, width = graph.shape[1:]
    total = graphs * rows
    base = (torch.arange(graphs, device=q.device) * n).repeat_interleave(rows)[:, None]
    flat_keys, flat_graph = keys.reshape(graphs * n, dim), graph.reshape(graphs * n, width)
    query, most = q.reshape(total, dim), limit.to(q.device).repeat_interleave(rows)[:, None]
    size = max(ef, k)
    at_once = min(_EXPAND, max(1, int(limit.max()) // (rounds * width)))
    visited = torch.zeros(total, n + 1, dtype=torch.bool, device=q.device)
    visited[:, n] = True
    read = torch.zeros(total, 1, dtype=torch.long, device=q.device)
    best = q.new_full((total, 0), -torch.inf)
    number = torch.zeros(total, 0, dtype=torch.long, device=q.device)
    open_ = torch.zeros(total, 0, dtype=torch.bool, device=q.device)
    fresh = entry.repeat_interleave(rows, dim=0)
    while True:
        fresh = torch.where(fresh < 0, n, fresh).sort(-1).values
        fresh[:, 1:][fresh[:, 1:] == fresh[:, :-1]] = n
        new = ~visited.gather(1, fresh)
        new &= read + new.cumsum(-1) <= most
        fresh = torch.where(new, fresh, n)
        visited.scatter_(1, fresh, True)
        read += new.sum(-1, keepdim=True)
        vectors = flat_keys[(base + fresh).clamp(max=graphs * n - 1)]
        score = torch.matmul(vectors, query[:, :, None])[..., 0].masked_fill(~new, -torch.inf)
        best, order = torch.cat([best, score], -1).topk(min(size, best.shape[1] + score.shape[1]), dim=-1)
        number = torch.cat([number, fresh], -1).gather(-1, order)
        open_ = torch.cat([open_, new], -1).gather(-1, order)
        # the list that is walked is the best `ef`; what stands below is only remembered
        candidate = torch.where(open_[:, :ef], best[:, :ef], -torch.inf)
        value, place = candidate.topk(min(at_once, candidate.shape[1]), dim=-1)
        alive = (value > -torch.inf) & (read < most)
        if not bool(alive.any()):
            break
        open_.scatter_(1, place, False)
        parents = torch.where(alive, base + number.gather(1, place), 0)
        fresh = torch.where(alive[..., None], flat_graph[parents].long(), -1).flatten(1)
    found = best[:, :k]
    ids = torch.where(found > -torch.inf, number[:, :k], -1)
    return ids.view(graphs, rows, -1), found.view(graphs, rows, -1), read.view(graphs, rows)


class FaissWalker:
    """faiss's search of HNSW graphs, given a graph of ours as its lowest and only level. Holds copies of keys and graph.

    Args:
        keys: (n, D). graph: (n, S), neighbours, -1 for none, S even. entry: where to begin.
    """

    def __init__(self, faiss: Any, keys: Tensor, graph: Tensor, entry: int) -> None:
        n, width = graph.shape
        self.faiss = faiss
        self.index = faiss.IndexHNSWFlat(keys.shape[1], width // 2, faiss.METRIC_INNER_PRODUCT)
        self.index.storage.add(np.ascontiguousarray(keys.numpy()))
        self.index.ntotal = n
        walk = self.index.hnsw
        faiss.copy_array_to_vector(np.ones(n, dtype=np.int32), walk.levels)  # every key lives on one level
        walk.prepare_level_tab(n, True)
        walk.max_level, walk.entry_point = 0, entry
        if walk.neighbors.size() != n * width:
            raise RuntimeError(f"faiss laid out {walk.neighbors.size()} neighbours, not {n} * {width}")
        lists = graph.to(torch.int32).masked_fill(graph < 0, torch.iinfo(torch.int32).max).sort(-1).values
        lists[:, 1:][lists[:, 1:] == lists[:, :-1]] = torch.iinfo(torch.int32).max
        lists = lists.sort(-1).values  # -1 ends a list
        array = np.ascontiguousarray(lists.masked_fill(lists == torch.iinfo(torch.int32).max, -1).numpy())
        faiss.memcpy(walk.neighbors.data(), faiss.swig_ptr(array), array.nbytes)

    def search(self, q: Tensor, k: int, ef: int) -> tuple[Tensor, Tensor, int]:
        """q (R, D): numbers (R, k), scores, and keys read on average."""
        stats = self.faiss.cvar.hnsw_stats
        stats.reset()
        options = self.faiss.SearchParametersHNSW(efSearch=ef)
        scores, ids = self.index.search(np.ascontiguousarray(q.numpy()), k, params=options)
        found = torch.from_numpy(np.where(ids < 0, -np.inf, scores).astype(np.float32))
        return torch.from_numpy(ids), found, round(stats.ndis / max(1, len(q)))

    def fit_ef(self, q: Tensor, k: int, limit: int) -> int:
        """The largest list length at which queries like `q` read at most `limit` keys on average."""
        low, high = 1, max(2, min(4 * limit, len(self)))
        if self.search(q, k, high)[2] <= limit:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self.search(q, k, middle)[2] <= limit:
                low = middle
            else:
                high = middle
        return low

    def __len__(self) -> int:
        return self.index.ntotal
