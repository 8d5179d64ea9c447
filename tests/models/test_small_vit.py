"""The vision shell: every mixer that sees everything runs in it on tokens or maps, and it learns."""

from __future__ import annotations

import pytest
import torch

from regard.models import SmallLM, SmallViT
from regard.nn.mixers import MIXERS, build_mixer, mixer_names
from regard.testbeds.images import Images
from regard.testbeds.training import token_loss, train


@pytest.mark.parametrize("name", mixer_names(False, layout=None))
def test_every_mixer_runs_and_trains(name):
    torch.manual_seed(0)
    model = SmallViT((16, 24), 4, 5, 1, dim=32, num_layers=2, num_heads=4, mixer=name)
    images = torch.randn(3, 1, 16, 24)
    logits, aux = model(images, return_aux=True)
    assert logits.shape == (3, 5) and logits.isfinite().all() and aux.isfinite()
    (logits.square().mean() + aux).backward()
    assert model.positions.grad.isfinite().all() and model.positions.grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.blocks[0].mixer.parameters())


def test_learns_the_direction_of_stripes():
    torch.manual_seed(0)
    labels = torch.randint(4, (200,))
    images = 0.3 * torch.rand(200, 1, 8, 8)
    for row, label in zip(images, labels.tolist()):
        stripes = row[0] if label < 2 else row[0].T  # a view: two directions, two phases
        stripes[label % 2 :: 2] += 0.5
    data = Images(images, labels, list("abcd"))
    model = SmallViT(8, 2, 4, 1, dim=32, num_layers=2, num_heads=2, mixer=("softmax", "magnitude"))
    train(model, data.batches(32), steps=40, lr=3e-3, loss=token_loss, progress=False)
    with torch.no_grad():
        assert (model.eval()(data.kept).argmax(-1) == data.kept_labels).float().mean() > 0.9
    assert len(data.learn) == 160 and not torch.equal(data.batches(8)(0)[0], data.batches(8)(1)[0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(image_size=30), "image_size"),
        (dict(mixer="lightning"), "bidirectional"),
        (dict(mixer="sofmax"), "did you mean softmax"),
        (dict(mlp_ratio=0), "mlp_ratio"),
        (dict(mixer=("softmax", "linear"), mixer_options={"bias": True}), "mixer_options"),
    ],
)
def test_bad_arguments(given, says):
    with pytest.raises(ValueError, match=says):
        SmallViT(**{"image_size": 16, "dim": 16, "num_layers": 1, **given})


def test_bad_input_and_layouts():
    with pytest.raises(ValueError, match="images"):
        SmallViT(16, 4, dim=16, num_layers=1)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="SmallViT"):
        SmallLM(10, 16, 1, 4, "magnitude", causal=False)
    grid = next(name for name, kind in MIXERS.items() if kind.layout == "grid")
    with pytest.raises(ValueError, match="grid"):
        build_mixer(grid, 16, 4, causal=False)
