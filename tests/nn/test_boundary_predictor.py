"""DHSA's boundary predictor and the loss it is trained with."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard.losses import focal_bce, soft_label_transform
from regard.nn import BoundaryPredictor


def keys(batch=2, heads=2, length=30, dim=6, seed=0):
    return torch.randn(batch, heads, length, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window_pool", [False, True])
@pytest.mark.parametrize(("window", "length"), [(4, 30), (2, 1), (5, 3)])
def test_by_its_definition(window_pool, window, length):
    torch.manual_seed(0)
    net = BoundaryPredictor(12, window, hidden=7, heads=3, window_pool=window_pool)
    k = keys(length=length)
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(net.qkv.weight)
        attention.in_proj_bias.copy_(net.qkv.bias)
    attention.out_proj.load_state_dict(net.out.state_dict())
    tokens = F.pad(k.transpose(1, 2).flatten(2), (0, 0, window - 1, window))
    for i in range(length):
        around = tokens[:, i : i + 2 * window]
        mixed = net.norm(attention(around, around, around)[0])
        left, right = mixed[:, :window], mixed[:, window:]
        if window_pool:
            left, right = ((net.pool(x).softmax(1) * x).sum(1) for x in (left, right))
        else:
            left, right = left.mean(1), right.mean(1)
        alike = F.cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        wanted = net.score(torch.cat((left, right, (left - right).abs(), left * right, alike), -1))[:, 0]
        torch.testing.assert_close(net(k)[:, i], wanted, rtol=1e-5, atol=1e-6)


def test_long_inputs_are_worked_off_in_parts(monkeypatch):
    torch.manual_seed(0)
    net, k = BoundaryPredictor(12), keys()
    whole = net(k)
    monkeypatch.setattr("regard.nn.sequence.boundary_predictor._GAPS_AT_A_TIME", 7)
    torch.testing.assert_close(net(k), whole)
    assert net(k[:, :, :0]).shape == (2, 0)


def test_margins_and_cuts():
    torch.manual_seed(0)
    net, k = BoundaryPredictor(12, window=3), keys()
    scores = net.gap_scores(k)
    assert (scores[:, :2] == -100).all() and (scores[:, -3:] == -100).all() and (scores[:, 2:-3] > -100).all()
    wide = net.gap_scores(k, wide_margins=True)
    assert (wide[:, :5] == -100).all() and (wide[:, -6:] == -100).all() and (wide[:, 5:-6] > -100).all()
    cuts, same = net.boundaries(k, 4, nms=3, instruction=6)
    assert torch.equal(same, scores)
    assert (cuts[:, 0] == 0).all() and (cuts[:, -1] == 30).all() and (cuts == 25).any(1).all()


def test_the_authors_state_dict_loads_under_their_names():
    torch.manual_seed(0)
    net = BoundaryPredictor(12, window_pool=True)
    theirs = {
        "enc.mha.in_proj_weight": net.qkv.weight,
        "enc.mha.in_proj_bias": net.qkv.bias,
        "enc.mha.out_proj.weight": net.out.weight,
        "enc.mha.out_proj.bias": net.out.bias,
        "enc.norm.weight": net.norm.weight,
        "enc.norm.bias": net.norm.bias,
        "pool.gate.weight": net.pool.weight,
        "mlp.0.weight": net.score[0].weight,
        "mlp.0.bias": net.score[0].bias,
        "mlp.2.weight": net.score[2].weight,
        "mlp.2.bias": net.score[2].bias,
    }
    other = BoundaryPredictor(12, window_pool=True)
    assert not torch.allclose(other(keys()), net(keys()))
    regard.load_official(other, {name: value.detach() for name, value in theirs.items()})
    assert torch.equal(other(keys()), net(keys()))
    regard.load_official(other, net.state_dict())  # our own names are left alone


def test_it_learns_where_topics_change():
    """Keys that wander around one centre a chunk: after a few steps most predicted cuts on new sequences are the true ones."""
    torch.manual_seed(0)

    def text():
        cuts = [0, *sorted(torch.randperm(5)[:3].add(1).mul(16).add(torch.randint(-3, 4, (3,))).tolist()), 96]
        k = torch.cat([torch.randn(1, 8) + 0.3 * torch.randn(b - a, 8) for a, b in pairwise(cuts)])
        label = torch.zeros(1, 96)
        label[0, [cut - 1 for cut in cuts[1:-1]]] = 1.0
        return k.view(1, 96, 2, 4).transpose(1, 2), label, cuts

    net = BoundaryPredictor(8, window=4, hidden=32, heads=2)
    step = torch.optim.Adam(net.parameters(), lr=3e-3)
    inner = torch.zeros(1, 96, dtype=torch.bool)
    inner[:, 7:-8] = True
    for _ in range(250):
        k, label, _ = text()
        loss = focal_bce(net(k), label, inner, pos_weight=8.0)
        step.zero_grad()
        loss.backward()
        step.step()
    hits = 0
    for _ in range(10):
        k, _, cuts = text()
        found = net.boundaries(k, 3, nms=4)[0][0].tolist()
        hits += sum(any(abs(cut - guess) <= 1 for guess in found[1:-1]) for cut in cuts[1:-1])
    assert hits >= 20  # of 30; by chance about 3


def test_focal_loss_by_its_definition():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets = torch.rand(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    p = logits.sigmoid()
    right = p * targets + (1 - p) * (1 - targets)
    each = (1 - right) ** 1.5 * -(3.0 * targets * p.log() + (1 - targets) * (1 - p).log()) * mask
    torch.testing.assert_close(
        focal_bce(logits, targets, mask, pos_weight=3.0, gamma=1.5, reduction="none"), each, rtol=1e-9, atol=1e-12
    )
    got = focal_bce(logits, targets, mask, pos_weight=torch.tensor(3.0), gamma=1.5)
    torch.testing.assert_close(got, each.sum() / 13)
    assert focal_bce(logits, targets, mask, pos_weight=3.0, gamma=1.5, reduction="sum") == each.sum()
    plain = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(focal_bce(logits, targets, gamma=0.0), plain)
    assert focal_bce(logits, targets, torch.zeros(2, 9, dtype=torch.bool)) == 0
    assert focal_bce(logits, targets > 0.5).requires_grad  # hard labels may be bool


def test_soft_labels():
    ratio = torch.tensor([1.0, 2.0, 0.5, 0.0])
    wanted = torch.sigmoid(4 * torch.log(ratio + 1e-6))
    torch.testing.assert_close(soft_label_transform(ratio), wanted)
    assert soft_label_transform(
        torch.tensor(2.0), alpha=2.0, beta=torch.tensor(2.0).log().item()
    ).item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BoundaryPredictor(10, heads=4), "heads: got 4, need a divisor of channels = 10"),
        (lambda: BoundaryPredictor(0), "channels: got 0"),
        (lambda: BoundaryPredictor(8)(torch.zeros(1, 2, 5, 5)), "k: got '2 heads x 5', need channels = 8"),
        (lambda: BoundaryPredictor(8)(torch.zeros(2, 5, 8)), "k: got"),
        (lambda: focal_bce(torch.zeros(2), torch.zeros(3)), "targets: got"),
        (lambda: focal_bce(torch.zeros(2), torch.zeros(2), gamma=-1), "gamma: got -1"),
        (lambda: focal_bce(torch.zeros(2), torch.zeros(2), reduction="avg"), "reduction: unknown name 'avg'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
