"""MoH-ViT and MoH-DiT: published sizes, routing and balance losses, skipping, oblong images, guidance, errors."""

from __future__ import annotations

import pytest
import torch

from regard.models import MoHDiT, MoHTransNeXt, moh_dit, moh_transnext
from regard.models.dit_parts import sincos_2d
from regard.models.moh_dit import PRESETS as DIT_PRESETS
from regard.models.moh_transnext import PRESETS as VIT_PRESETS
from regard.nn.spatial import mixture_of_heads_2d
from regard.ops import head_balance_loss

TINY = {"dims": (8, 12), "num_heads": (2, 3), "depths": (1, 2), "shared": (2, 1), "active": (2, 2), "sr_ratios": (2, 1)}
TINY |= {"mlp_ratios": (2, 2), "num_classes": 5}


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("size", list(VIT_PRESETS))
def test_published_vits_use_the_share_of_heads_in_their_name(size, monkeypatch):
    cells = lambda grid: grid[0] * grid[1]  # noqa: E731
    tables = lambda q, k, trained: (torch.zeros(cells(q), cells(k)).long(), torch.zeros(4, 2))  # noqa: E731
    monkeypatch.setattr(mixture_of_heads_2d, "log_relative_positions", tables)
    preset = VIT_PRESETS[size]
    used = sum(a * d for a, d in zip(preset["active"], preset["depths"]))
    share = used / sum(h * d for h, d in zip(preset["num_heads"], preset["depths"]))
    assert abs(100 * share - int(size[-2:])) < 9
    with torch.device("meta"):
        model = moh_transnext(size)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert (48 < millions < 51) if size.startswith("small") else (88 < millions < 92)


@pytest.mark.parametrize("size", list(DIT_PRESETS))
def test_published_dits(size):
    preset = DIT_PRESETS[size]
    share = sum(preset["active"]) / sum(preset["num_heads"])
    assert abs(100 * share - int(size[-2:])) < 6
    with torch.device("meta"):
        model = moh_dit(size)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    low, high = {"S": (32, 34), "B": (129, 132), "L": (455, 462), "XL": (672, 682)}[size.split("/")[0]]
    assert low < millions < high


def test_vit_routes_and_trains_on_oblong_images():
    model = randomise(MoHTransNeXt((16, 24), **TINY))
    x = torch.randn(2, 3, 16, 24)
    logits, routings = model(x, return_aux=True)
    assert logits.shape == (2, 5) and len(routings) == 3
    assert [r.balance_loss is None for r in routings] == [True, False, False]
    assert (routings[1].selected.sum(1) == 2).all()
    (logits.square().mean() + head_balance_loss(routings)).backward()
    assert all(p.grad is not None for p in model.parameters())
    maps, _ = model.feature_maps(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 4, 6), (2, 12, 2, 3)]
    features = MoHTransNeXt((16, 24), **{**TINY, "num_classes": 0})
    assert features(x).shape == (2, 12)


def test_vit_samples_do_not_mix():
    model, x = randomise(MoHTransNeXt(16, **TINY)).eval(), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-5)


def test_dit_skips_heads_and_gives_the_same():
    options = {
        "dim": 24,
        "num_heads": [4, 6],
        "shared": [1, 2],
        "active": [2, 4],
        "head_dim": 8,
        "num_classes": 3,
        "in_channels": 2,
    }
    dense, skipping = (randomise(MoHDiT((8, 12), 2, **options, skip_inactive=skip)).eval() for skip in (False, True))
    x, t, y = torch.randn(2, 2, 8, 12), torch.tensor([5, 900]), torch.tensor([0, 3])
    out, routings = dense(x, t, y, return_aux=True)
    assert out.shape == (2, 4, 8, 12) and [int(r.selected[0, :, 0].sum()) for r in routings] == [2, 4]
    torch.testing.assert_close(skipping(x, t, y), out, atol=1e-5, rtol=1e-5)


def test_dit_starts_at_zero_and_drops_labels_in_training_alone():
    model = MoHDiT(8, 2, 2, dim=24, num_layers=1, num_heads=4, shared=1, active=2, num_classes=3, class_dropout=0.9)
    x, t = torch.randn(8, 2, 8, 8), torch.zeros(8).long()
    assert torch.equal(model(x, t, t), torch.zeros(8, 4, 8, 8))
    randomise(model).eval()
    none = torch.full((8,), 3)
    assert torch.equal(model(x, t, t), model(x, t, t))
    model.train()
    torch.manual_seed(0)
    made, want = model(x, t, t), model.eval()(x, t, none)
    dropped = torch.stack(
        [(torch.allclose(a, b, atol=1e-5) and torch.tensor(True)) or torch.tensor(False) for a, b in zip(made, want)]
    )
    assert 4 <= int(dropped.sum()) <= 8


def test_guidance_of_one_is_the_class_and_of_zero_is_none():
    model = randomise(MoHDiT(8, 2, 4, dim=24, num_layers=1, num_heads=4, shared=1, active=2, num_classes=3)).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 2])
    with_class, none = model(x, t, y), model(x, t, torch.full((2,), 3))
    torch.testing.assert_close(model.guided(x, t, y, 1.0), with_class, atol=1e-3, rtol=1e-3)
    zero = model.guided(x, t, y, 0.0)
    torch.testing.assert_close(zero[:, :3], none[:, :3], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(zero[:, 3:], with_class[:, 3:], atol=1e-3, rtol=1e-3)
    assert torch.allclose(model.guided(x, t, y, 0.0, 8), none, atol=1e-3)


def test_positions_tell_rows_and_columns():
    table = sincos_2d(8, (2, 3))
    column, row = table.view(2, 3, 2, 4).unbind(2)
    assert torch.equal(column[0], column[1]) and torch.equal(row[:, 0], row[:, 2])
    torch.testing.assert_close(
        row[1, 0],
        torch.tensor([1.0, 0.01, 0, 0]).sin() + torch.tensor([0, 0, 1.0, 0.01]).cos() * torch.tensor([0, 0, 1.0, 1.0]),
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoHTransNeXt(20, **TINY), "image_size"),
        (lambda: MoHTransNeXt(16, **{**TINY, "depths": (1,)}), "depths"),
        (lambda: MoHTransNeXt(16, **TINY)(torch.zeros(1, 3, 16, 24)), "x"),
        (lambda: moh_transnext("tiny"), "size"),
        (lambda: MoHDiT(9, 2), "image_size"),
        (lambda: MoHDiT(8, 2, num_layers=3, shared=[1, 2]), "shared"),
        (
            lambda: MoHDiT(8, 2, dim=24, num_layers=1, class_dropout=0.0).guided(
                torch.zeros(1, 4, 8, 8), *[torch.zeros(1).long()] * 2, 2.0
            ),
            "class_dropout",
        ),
        (lambda: MoHDiT(8, 2, dim=24, num_layers=1)(torch.zeros(2, 4, 8, 8), torch.zeros(1), torch.zeros(2)), "time"),
        (lambda: sincos_2d(6, (2, 2)), "dim"),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()
