"""Answers agree with scipy and with trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard.testbeds import geometry


def make(batch, count, seed=0):
    return torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [3, 5, 20])
def test_hull_and_triangles_agree_with_scipy(count):
    from scipy.spatial import ConvexHull, Delaunay

    points = make(5, count)
    hulls, triangles = geometry.convex_hull(points), geometry.delaunay(points)
    for row in range(5):
        corners = [i for i in hulls[row].tolist() if i >= 0]
        expected = ConvexHull(points[row].numpy()).vertices.tolist()  # counter-clockwise in the plane
        first = expected.index(min(expected))
        assert corners == expected[first:] + expected[:first]
        found = [i for i in triangles[row].tolist() if i >= 0]
        mine = [tuple(found[i : i + 3]) for i in range(0, len(found), 3)]
        assert all(t == tuple(sorted(t)) for t in mine) and len(set(mine)) == len(mine)
        assert set(mine) == {tuple(sorted(map(int, s))) for s in Delaunay(points[row].numpy()).simplices}
    area = geometry.polygon_area(points, hulls)
    torch.testing.assert_close(area, torch.tensor([ConvexHull(p.numpy()).volume for p in points]).to(area))


def test_triangles_are_in_the_order_of_incentres():
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.2, 1.1]]])
    assert geometry.delaunay(points).tolist() == [[0, 1, 2, 1, 2, 3]]
    assert geometry.delaunay(points[:, [3, 1, 2, 0]]).tolist() == [[1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shortest_tour_by_trying_all(count):
    points = make(3, count)
    tours = geometry.shortest_tour(points)
    lengths = geometry.tour_length(points, tours)
    for row in range(3):
        orders = torch.tensor([[0, *rest] for rest in itertools.permutations(range(1, count))])
        every = geometry.tour_length(points[row].expand(len(orders), -1, -1), orders)
        assert math.isclose(float(lengths[row]), float(every.min()), rel_tol=1e-9, abs_tol=1e-12)
        assert tours[row, 0] == 0 and (count < 3 or tours[row, 1] < tours[row, -1])


def test_sorting_and_tours_that_are_none():
    assert geometry.sorting(torch.tensor([[[0.3], [0.1], [0.2]]])).tolist() == [[1, 2, 0]]
    points = make(2, 4)
    assert geometry.tour_length(points, torch.tensor([[0, 1, 1, 2], [0, 1, 2, -1]])).isnan().all()
    assert (geometry.polygon_area(points, torch.zeros(2, 0, dtype=torch.int64)) == 0).all()


def test_bad_arguments():
    for function, points in (
        (geometry.convex_hull, torch.rand(1, 2, 2)),
        (geometry.convex_hull, torch.rand(1, 4, 3)),
        (geometry.delaunay, torch.rand(1, 65, 2)),
        (geometry.shortest_tour, torch.rand(1, 14, 2)),
    ):
        with pytest.raises(ValueError, match="points"):
            function(points)
    with pytest.raises(ValueError, match="tour"):
        geometry.tour_length(torch.rand(1, 4, 2), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="numbers"):
        geometry.sorting(torch.rand(1, 4, 2))
