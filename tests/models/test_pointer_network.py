"""Pointer networks: scores as defined, any number of points with the same weights, masks, beams; what it learns in a minute."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regard.models.pointer_network import PointerHead, PointerNetwork


def test_head_is_its_formula_and_masks_to_zero():
    torch.manual_seed(0)
    head = PointerHead(5)
    states, places = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    scores = head(states, places).detach()
    for b, i, j in itertools.product(range(2), range(3), range(4)):
        one = head.v.detach() @ torch.tanh(head.w1.weight @ places[b, j] + head.w2.weight @ states[b, i])
        assert abs(float((scores[b, i, j] - one).detach())) < 1e-6
    mask = torch.tensor([True, False, True, True])
    assert (head(states, places, mask).softmax(-1)[..., 1] == 0).all()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(head(states, places[:, order]), scores[..., order])
    with torch.no_grad():  # in pieces
        import regard.ops.additive as module

        keep, module._PIECE = module._PIECE, 1
        torch.testing.assert_close(head(states, places), scores)
        module._PIECE = keep


def test_no_preference_costs_log_of_the_places():
    net = PointerNetwork(2, 8)
    torch.nn.init.zeros_(net.head.v)
    targets = torch.tensor([[0, 2, 1], [3, -1, -1]])
    loss = net.loss(torch.rand(2, 4, 2), targets)
    assert math.isclose(float(loss.detach()), (4 + 2) / 2 * math.log(5), rel_tol=1e-6)
    fixed = PointerNetwork(2, 8, end=False)
    torch.nn.init.zeros_(fixed.head.v)
    loss = fixed.loss(torch.rand(2, 4, 2), targets).detach()
    assert math.isclose(float(loss), (3 + 1) / 2 * math.log(4), rel_tol=1e-6)


def test_same_weights_for_any_number_and_padding_changes_nothing():
    torch.manual_seed(0)
    net = PointerNetwork(2, 8)
    for count in (1, 5, 300):
        found = net(torch.rand(1, count, 2), torch.zeros(1, 2, dtype=torch.int64))
        assert found.shape == (1, 3, count + 1)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(1, 3))
    points, targets = torch.rand(2, 6, 2), torch.tensor([[1, 2, 0], [3, 0, 1]])
    padded = torch.cat((points, torch.full((2, 3, 2), 9.0)), dim=1)
    lengths = torch.tensor([6, 4])
    found = net(padded, targets, lengths)
    torch.testing.assert_close(found[0, :, :7], net(points, targets)[0])
    torch.testing.assert_close(found[1, :, :5], net(points[:, :4], targets)[1])
    assert (found[1, :, 5:] == -torch.inf).all()
    torch.nn.init.normal_(net.head.v, std=5)  # far from ties
    for constraint in ("none", "distinct", "tour"):
        made, score = net.decode(padded, 2, constraint, lengths)
        alone, own = net.decode(points[1:, :4], 2, constraint)
        torch.testing.assert_close(score[1:], own)
        assert made[1][: alone.shape[1]].equal(alone[0]) and (made[1][alone.shape[1] :] == -1).all()


def _log_probability(net, points, output):
    targets = torch.tensor([output], dtype=torch.int64).reshape(1, -1)
    found = net(points, targets)[0]
    return sum(float(found[i, place]) for i, place in enumerate([*(o + 1 for o in output), 0]))


def test_a_wide_beam_finds_the_likeliest():
    torch.manual_seed(0)
    net = PointerNetwork(2, 8)
    torch.nn.init.normal_(net.head.v, std=3)
    points = torch.rand(1, 4, 2)
    with torch.no_grad():
        tours = {order: _log_probability(net, points, order) for order in itertools.permutations(range(4))}
        short = {o: _log_probability(net, points, o) for n in range(4) for o in itertools.product(range(4), repeat=n)}
    made, score = net.decode(points, 64, "tour")
    assert tuple(made[0].tolist()) == max(tours, key=tours.get) and abs(float(score) - max(tours.values())) < 1e-5
    made, score = net.decode(points, 200, max_steps=3)
    assert tuple(made[0].tolist()) == max(short, key=short.get) and abs(float(score) - max(short.values())) < 1e-5
    assert net.decode(points, 64, "tour")[1] >= net.decode(points, 1, "tour")[1]
    fixed = PointerNetwork(2, 8, end=False)
    made, _ = fixed.decode(torch.rand(3, 5, 2), 3, "distinct")
    assert (made.sort(1).values == torch.arange(5)).all()


def test_learns_to_point_to_the_largest():
    torch.manual_seed(0)
    net = PointerNetwork(1, 32)
    optimiser = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(400):
        points = torch.rand(64, 5, 1)
        loss = net.loss(points, points[..., 0].argmax(1)[:, None])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    points = torch.rand(256, 5, 1)
    made, _ = net.decode(points, max_steps=1)
    assert (made[:, 0] == points[..., 0].argmax(1)).float().mean() > 0.8


def test_bad_arguments():
    net, points = PointerNetwork(2, 4), torch.rand(2, 3, 2)
    good = torch.zeros(2, 1, dtype=torch.int64)
    for given, says in (
        ((torch.rand(2, 3, 3), good), "points"),
        ((points[:, :0], good), "points"),
        ((points, good + 3), "targets"),
        ((points, torch.tensor([[-1, 0], [0, 1]])), "targets"),
        ((points, good[:1]), "targets"),
        ((points, good.int()), "targets"),
        ((points, good, torch.tensor([3, 0])), "lengths"),
        ((points, good + 2, torch.tensor([3, 2])), "targets"),
    ):
        with pytest.raises(ValueError, match=says):
            net(*given)
    for options, says in (({"beam": 0}, "beam"), ({"constraint": "tours"}, "constraint")):
        with pytest.raises(ValueError, match=says):
            net.decode(points, **options)
    with pytest.raises(ValueError, match="max_steps"):
        net.decode(points, constraint="distinct", max_steps=4)
    with pytest.raises(ValueError, match="max_steps"):
        net.decode(points, constraint="tour", max_steps=2)
    with pytest.raises(ValueError, match="states"):
        PointerHead(4)(torch.rand(1, 2, 3), torch.rand(1, 2, 4))
