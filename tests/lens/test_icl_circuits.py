"""Circuits of in-context heads: the pattern is read back, and what leaves it is told."""

import pytest
import torch
from torch import nn

from regard.lens import icl_circuits
from regard.nn import InContextAttention


def patterned():
    layer = InContextAttention(6, 4).double()
    layer.set_pattern(torch.tensor([0.2, -0.25, 0.2, 0.001]).double(), torch.tensor([1.0, -2.1, 1.0, 0.3]).double())
    return layer


def test_pattern_is_read_back():
    found = icl_circuits(patterned())
    torch.testing.assert_close(found.omega, torch.tensor([0.2, -0.25, 0.2, 0.001]).double())
    torch.testing.assert_close(found.mu, torch.tensor([1.0, -2.1, 1.0, 0.3]).double())
    assert found.roles == ["positive", "negative", "positive", "dummy"]
    assert found.active.tolist() == [True, True, True, False]
    for share in (found.kq_error, found.off_diagonal, found.ov_error):
        assert share.max() < 1e-12
    assert found.mu_sum.item() == pytest.approx(0.2) and found.omega_spread == pytest.approx(1.25)


def test_what_leaves_the_pattern():
    layer = patterned()
    with torch.no_grad():
        layer.k_proj.weight[0, 0] = 3  # head 0: feature 0 weighs three times as much as the others
        layer.k_proj.weight[6, 1] = 2  # head 1: off the diagonal
        layer.v_proj.weight[17, 0] = 1  # head 2: a feature is passed on as well
    found = icl_circuits(layer)
    assert found.kq_error[0] > 0.3 and found.off_diagonal[0] < 1e-12
    assert found.kq_error[1].item() == found.off_diagonal[1].item() == pytest.approx((4 / 9) ** 0.5)
    assert found.ov_error.tolist() == pytest.approx([0, 0, 0.5**0.5, 0])
    torch.testing.assert_close(found.diagonal[0], torch.tensor([0.6, 0.2, 0.2, 0.2, 0.2]).double())


def test_columns_that_a_question_cannot_read_do_not_count():
    layer = patterned()
    with torch.no_grad():
        layer.q_proj.weight[:, -1] = 1
    found, prompt = icl_circuits(layer), torch.randn(2, 5, 6).double()
    assert found.kq[:, :, -1].abs().max() > 0 and found.kq_error.max() < 1e-12
    prompt[:, -1, -1] = 0
    torch.testing.assert_close(layer(prompt), patterned()(prompt))


def test_two_responses():
    layer = InContextAttention(5, 2, 2)
    found = icl_circuits(layer)
    assert found.diagonal.shape == (2, 3) and found.mu.shape == (2, 2) and found.mu_sum.shape == (2,)
    torch.testing.assert_close(found.mu, found.ov[:, 3:].diagonal(dim1=1, dim2=2))


def test_nothing_is_a_dummy():
    layer = InContextAttention(4, 2)
    for p in layer.parameters():
        nn.init.zeros_(p)
    found = icl_circuits(layer)
    assert found.roles == ["dummy", "dummy"] and bool((found.kq_error == 0).all() and (found.ov_error == 0).all())
    assert found.omega_spread != found.omega_spread


def test_errors():
    with pytest.raises(TypeError, match=r"^layer: "):
        icl_circuits(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^layer: "):
        icl_circuits(InContextAttention(3, 2, None))
    with pytest.raises(ValueError, match=r"^dummy: "):
        icl_circuits(InContextAttention(3, 2), dummy=2.0)
