"""Making the graph of `QueryGraph`: edges between keys that queries want together, between near keys, and a ring through all.

All functions work on the keys of one kv head, (n, D), as int64 numbers of keys; -1 is no edge.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512  # keys that are compared with each other when near keys are looked for among many
_CHUNK = 1 << 23  # scores made at once


def wanted_keys(keys: Tensor, queries: Tensor, count: int) -> Tensor:
    """The `count` keys that each query likes best, best first, int64 (m, count): the edges of the bipartite graph."""
    rows = max(1, _CHUNK // max(1, len(keys)))
    count = min(count, len(keys))
    return torch.cat([(part @ keys.T).topk(count, dim=-1).indices for part in queries.split(rows)])


def projected_edges(wanted: Tensor, num_keys: int, degree: int) -> Tensor:
    """Edges between keys, from those between queries and keys: each query's best key is joined to the others it wants, both ways.

    Args:
        wanted: int64 (m, k), see `wanted_keys`; -1 is nothing. degree: edges kept per key, those that most queries ask for.
    Returns:
        int64 (num_keys, degree), most asked for first.
    """
    best, others = wanted[:, :1].expand(-1, wanted.shape[1] - 1).flatten(), wanted[:, 1:].flatten()
    real = (best >= 0) & (others >= 0)
    best, others = best[real], others[real]
    code, times = torch.unique(torch.cat([best * num_keys + others, others * num_keys + best]), return_counts=True)
    source, target = code // num_keys, code % num_keys
    order = torch.argsort(source * (int(times.max()) + 1 if len(times) else 1) - times)
    return padded_lists(source[order], target[order], num_keys, degree)


def padded_lists(source: Tensor, target: Tensor, num_keys: int, width: int) -> Tensor:
    """(num_keys, width): the first `width` targets of each source; sources ascending."""
    rank = torch.arange(len(source), device=source.device)
    rank = rank - torch.searchsorted(source, torch.arange(num_keys, device=source.device))[source]
    keep = rank < width
    out = torch.full((num_keys, width), -1, dtype=torch.long, device=source.device)
    out[source[keep], rank[keep]] = target[keep]
    return out


def near_keys(keys: Tensor, count: int) -> Tensor:
    """For each key `count` others near it in Euclidean distance, int64 (n, count); -1 where there are no more.

    Exact up to a few thousand keys; above, among the keys of the same and of neighbouring k-means cells.
    """
    n = len(keys)
    out = torch.full((n, count), -1, dtype=torch.long, device=keys.device)
    if n <= 8 * _BLOCK:
        order = torch.arange(n, device=keys.device)
        windows = [(s, min(n, s + _BLOCK), 0, n) for s in range(0, n, _BLOCK)]
    else:
        order = _cell_order(keys)
        half = _BLOCK // 2
        windows = [(s, min(n, s + _BLOCK), max(0, s - half), min(n, s + _BLOCK + half)) for s in range(0, n, _BLOCK)]
    norms = (keys * keys).sum(-1)
    for begin, end, low, high in windows:
        mine, theirs = order[begin:end], order[low:high]
        closeness = keys[mine] @ keys[theirs].T - 0.5 * norms[theirs]
        closeness[torch.arange(end - begin), torch.arange(begin - low, end - low)] = -torch.inf
        found = closeness.topk(min(count, high - low), dim=-1)
        out[mine, : found.indices.shape[1]] = theirs[found.indices].masked_fill(found.values == -torch.inf, -1)
    return out


def _cell_order(keys: Tensor, rounds: int = 4) -> Tensor:
    """An order of the keys in which those of one k-means cell stand together, and near cells near each other."""
    generator = torch.Generator().manual_seed(0)
    cells = len(keys) // 128
    sample = keys[torch.randperm(len(keys), generator=generator)[: 16 * cells].to(keys.device)]
    centres = sample[:cells].clone()

    def cell(x: Tensor) -> Tensor:
        offset = 0.5 * (centres * centres).sum(-1)
        return torch.cat([(part @ centres.T - offset).argmax(-1) for part in x.split(_CHUNK // cells)])

    for _ in range(rounds):
        mine = cell(sample)
        sizes = torch.bincount(mine, minlength=cells)
        means = torch.zeros_like(centres).index_add_(0, mine, sample) / sizes.clamp(min=1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)
    axis = torch.linalg.svd(centres - centres.mean(0), full_matrices=False).Vh[0]
    place = (centres @ axis).argsort().argsort()
    return place[cell(keys)].argsort(stable=True)


def ring(num_keys: int, device: torch.device) -> Tensor:
    """Each key's successor, (n, 1): so that every key can be reached, and since neighbours in the text are wanted together."""
    return ((torch.arange(num_keys, device=device) + 1) % max(1, num_keys))[:, None]


def put_edges(table: Tensor, source: Tensor, target: Tensor) -> None:
    """Write edges source -> target into `table` (n, width), in place: into free slots first, then over others, from the last slot on."""
    order = torch.argsort(source, stable=True)
    source, target = source[order], target[order]
    rank = torch.arange(len(source), device=source.device)
    rank = rank - torch.searchsorted(source, source)
    width = table.shape[1]
    free = (table[source] >= 0).sum(-1)
    slot = torch.where(free + rank < width, free + rank, width - 1 - (free + rank) % width)
    table[source, slot] = target
