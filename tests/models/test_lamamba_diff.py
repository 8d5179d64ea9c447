"""LaMamba-Diff: what it is at its start, classes and guidance, maps that are no squares, gradients, linear cost, bad input."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.models import LaMambaDiff


def made(seed=0, **options):
    torch.manual_seed(seed)
    return LaMambaDiff(**({"size": 8, "in_channels": 2, "dim": 4, "depths": (1, 1, 1, 1), "mid_depth": 1, "num_heads": 2, "window": 4,
                           "num_classes": 3} | options)).eval()  # fmt: skip


def shaken(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


X, T, Y = (
    torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([3.0, 700.0]),
    torch.tensor([0, 2]),
)


def test_a_new_network_knows_neither_time_nor_class():
    model = made()
    assert model(X, T, Y).shape == (2, 4, 8, 8)
    assert torch.equal(model(X, T, Y), model(X, T.flip(0), Y.flip(0)))
    model = shaken(model)
    assert not torch.allclose(model(X, T, Y), model(X, T.flip(0), Y), atol=1e-4)
    assert not torch.allclose(model(X, T, Y), model(X, T, Y.flip(0)), atol=1e-4)


def test_guidance_of_one_is_the_class_and_of_zero_none():
    model = shaken(made())
    plain, none = model(X, T, Y), model(X, T)
    assert torch.allclose(none, model(X, T, torch.tensor([3, 3])))
    assert torch.allclose(model.guided(X, T, Y, 1.0), plain, atol=1e-5)
    at_zero = model.guided(X, T, Y, 0.0)
    assert torch.allclose(at_zero[:, :2], none[:, :2], atol=1e-5) and torch.allclose(
        at_zero[:, 2:], plain[:, 2:], atol=1e-5
    )


def test_maps_need_not_be_square_and_patches_are_put_back():
    model = made(size=(8, 16), patch_size=2)
    assert model(torch.randn(1, 2, 16, 32), T[:1]).shape == (1, 4, 16, 32)


def test_batch_mates_do_not_matter_and_classes_are_forgotten_in_training_alone():
    model = shaken(made())
    assert torch.allclose(model(X, T, Y)[1:], model(X[1:], T[1:], Y[1:]), atol=1e-5)
    always = shaken(made(class_dropout=1.0)).train()
    assert torch.allclose(always(X, T, Y), always(X, T), atol=1e-6)
    assert torch.isfinite(made(num_classes=0)(X, T)).all()


def test_gradients_reach_all_parameters():
    model = shaken(made()).train()
    model(X, T, Y).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_products_grow_as_the_pixels_do():
    def count(side):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(size=side)(torch.randn(1, 2, side, side), T[:1])
        return counter.get_total_flops()

    small, large = count(16), count(32)
    assert 3.5 < large / small < 4.1


@pytest.mark.parametrize(
    ("options", "name"),
    [({"size": 6}, "size"), ({"depths": (1, 1)}, "depths"), ({"num_heads": (1, 2)}, "num_heads"), ({"dim": 6, "num_heads": 1}, "dim"),
     ({"class_dropout": 2.0}, "class_dropout")],
)  # fmt: skip
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        made(**options)


def test_bad_input():
    model = made(class_dropout=0.0)
    with pytest.raises(ValueError, match="x:"):
        model(torch.zeros(1, 2, 8, 9), T[:1], Y[:1])
    with pytest.raises(ValueError, match="classes"):
        model(X, T)
    with pytest.raises(ValueError, match="classes"):
        model(X, T, Y[:1])
