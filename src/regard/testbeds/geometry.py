"""Points in the plane with answers that are sequences of indices: sorting, convex hull, Delaunay triangulation, shortest tours.

The tasks of Pointer Networks (Vinyals et al. 2015, arXiv 1506.03134), answers in the order that it found trainable; labels are computed
exactly here. Indices count from 0, -1 stands behind the end.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from .._checks import require, require_tensor

__all__ = ["convex_hull", "delaunay", "polygon_area", "shortest_tour", "sorting", "tour_length"]


def _rows(points: Tensor, least: int) -> np.ndarray:
    require_tensor("points", points, dims=3, floating=True)
    fits = points.shape[2] == 2 and points.shape[1] >= least
    require(fits, "points", f"shape {tuple(points.shape)}", f"(B, N >= {least}, 2)")
    return points.detach().double().cpu().numpy()


def _padded(answers: list[list[int]]) -> Tensor:
    longest = max(map(len, answers), default=0)
    return torch.tensor([one + [-1] * (longest - len(one)) for one in answers], dtype=torch.int64).reshape(-1, longest)


def sorting(numbers: Tensor) -> Tensor:
    """numbers (B, N, 1) -> indices (B, N) from the smallest to the largest."""
    require_tensor("numbers", numbers, dims=3, floating=True)
    require(numbers.shape[2] == 1, "numbers", f"shape {tuple(numbers.shape)}", "(B, N, 1)")
    return numbers[..., 0].argsort(dim=1, stable=True)


def convex_hull(points: Tensor) -> Tensor:
    """points (B, N >= 3, 2) -> corners of the hull, counter-clockwise, from the one with the lowest index; (B, M), -1 behind the end.

    Points inside an edge are no corners.
    """
    return _padded([_hull(one) for one in _rows(points, 3)])


def _hull(points: np.ndarray) -> list[int]:
    order = np.lexsort((points[:, 1], points[:, 0]))

    def half(indices: np.ndarray) -> list[int]:
        chain: list[int] = []
        for i in indices:
            while len(chain) > 1 and _turn(points[chain[-2]], points[chain[-1]], points[i]) <= 0:
                chain.pop()
            chain.append(int(i))
        return chain[:-1]

    corners = half(order) + half(order[::-1])
    first = corners.index(min(corners))
    return corners[first:] + corners[:first]


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def delaunay(points: Tensor) -> Tensor:
    """points (B, 3 <= N <= 64, 2), no four on a circle -> triangles (B, 3 T), three indices each, -1 behind the end.

    Indices grow within a triangle; triangles are in the order of their incentres, by x and then y. A triangle is one of these if its
    circle holds no point: found by trying all.
    """
    require(points.shape[1] <= 64, "points", f"{points.shape[1]} points", "at most 64")
    return _padded([_delaunay(one) for one in _rows(points, 3)])


def _delaunay(points: np.ndarray) -> list[int]:
    triples = np.array(list(itertools.combinations(range(len(points)), 3)))
    a, b, c = (points[triples[:, i]] for i in range(3))
    turn = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    keep = np.abs(turn) > 1e-14
    triples, a, b, c, turn = (x[keep] for x in (triples, a, b, c, turn))
    u, w = b - a, c - a
    uu, ww = (u**2).sum(1), (w**2).sum(1)
    centre = a + np.stack((w[:, 1] * uu - u[:, 1] * ww, u[:, 0] * ww - w[:, 0] * uu), 1) / (2 * turn[:, None])
    radius = ((centre - a) ** 2).sum(1)
    empty = np.ones(len(triples), dtype=bool)
    for i, point in enumerate(points):
        inside = ((centre - point) ** 2).sum(1) < radius * (1 - 1e-9)
        empty &= ~inside | (triples == i).any(1)
    triples, a, b, c = (x[empty] for x in (triples, a, b, c))
    sides = [np.linalg.norm(p - q, axis=1)[:, None] for p, q in ((b, c), (a, c), (a, b))]
    incentre = (sides[0] * a + sides[1] * b + sides[2] * c) / (sides[0] + sides[1] + sides[2])
    return [int(i) for i in triples[np.lexsort((incentre[:, 1], incentre[:, 0]))].flatten()]


def shortest_tour(points: Tensor) -> Tensor:
    """points (B, 1 <= N <= 13, 2) -> the shortest closed tour from point 0, (B, N), by Held and Karp; its direction: lower second index."""
    require(points.shape[1] <= 13, "points", f"{points.shape[1]} points", "at most 13")
    return _padded([_tour(one) for one in _rows(points, 1)])


def _tour(points: np.ndarray) -> list[int]:
    count = len(points)
    if count < 3:
        return list(range(count))
    far = np.linalg.norm(points[:, None] - points[None], axis=2)
    best, others = far[1:, 1:], count - 1
    cost = np.full((1 << others, others), np.inf)  # of the set's shortest path from point 0 to its member j
    cost[1 << np.arange(others), np.arange(others)] = far[0, 1:]
    sets = np.arange(1 << others)
    sizes = np.array([bin(s).count("1") for s in sets])
    for size in range(2, count):
        for j in range(others):
            some = sets[(sizes == size) & (sets >> j & 1 == 1)]
            cost[some, j] = (cost[some ^ (1 << j)] + best[:, j]).min(1)
    left, tour = (1 << others) - 1, [0]
    at = int((cost[left] + far[1:, 0]).argmin())
    while True:
        tour.append(at + 1)
        left ^= 1 << at
        if not left:
            break
        at = int((cost[left] + best[:, at]).argmin())
    return tour if tour[1] < tour[-1] else [0, *tour[:0:-1]]


def tour_length(points: Tensor, tour: Tensor) -> Tensor:
    """Length (B,) of closed tours (B, N) over points (B, N, 2); NaN where a tour is no permutation."""
    require_tensor("points", points, dims=3, floating=True)
    need = f"shape {tuple(points.shape[:2])}"
    require(tour.shape == points.shape[:2], "tour", f"shape {tuple(tour.shape)}", need)
    valid = (tour.sort(1).values == torch.arange(tour.shape[1], device=tour.device)).all(1)
    there = points.gather(1, tour.clamp(min=0)[..., None].expand(-1, -1, points.shape[2]))
    length = (there - there.roll(-1, 1)).norm(dim=2).sum(1)
    return torch.where(valid, length, torch.nan)


def polygon_area(points: Tensor, corners: Tensor) -> Tensor:
    """Area (B,) of polygons of indices (B, M), -1 behind the end: positive where counter-clockwise, little worth where crossing itself."""
    require_tensor("points", points, dims=3, floating=True)
    require_tensor("corners", corners, dims=2)
    if not corners.shape[1]:
        return points.new_zeros(len(points))
    full = torch.where(corners < 0, corners[:, :1], corners).clamp(min=0)  # the first corner again adds nothing
    x, y = points.gather(1, full[..., None].expand(-1, -1, 2)).unbind(-1)
    return (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2
