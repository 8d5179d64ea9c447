"""Selective scan: its forms against each other, against the general system, continued from a state, with gradients; bad input."""

import pytest
import torch

from regard.ops.state import selective_scan, selective_ssm_ltv


def made(length=23, groups=None, dtype=torch.float64):
    torch.manual_seed(0)
    shape = (2, length, 3) if groups is None else (2, length, groups, 3)
    u, delta = torch.randn(2, length, 6, dtype=dtype), torch.rand(2, length, 6, dtype=dtype)
    a, d = -torch.rand(6, 3, dtype=dtype) * 3, torch.randn(6, dtype=dtype)
    return u, delta, a, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), d


def slow(u, delta, a, b, c, d, h=None):
    h = torch.zeros(2, 6, 3, dtype=u.dtype) if h is None else h
    rows = []
    for t in range(u.shape[1]):
        h = (delta[:, t, :, None] * a).exp() * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        rows.append((h * c[:, t, None]).sum(-1) + d * u[:, t])
    return torch.stack(rows, 1), h


@pytest.mark.parametrize("form", ["auto", "parallel", "chunk", "recurrent"])
@pytest.mark.parametrize("length", [1, 7, 8, 23])
def test_every_form_is_the_definition_and_goes_on_from_a_state(form, length):
    parts = made(length)
    want, state = slow(*parts)
    y, h = selective_scan(*parts, form=form, chunk_size=8, return_state=True)
    assert torch.allclose(y, want) and torch.allclose(h, state)
    cut = length // 2
    first, held = selective_scan(
        *(p[:, :cut] if p.dim() > 2 else p for p in parts), form=form, chunk_size=8, return_state=True
    )
    rest = selective_scan(*(p[:, cut:] if p.dim() > 2 else p for p in parts), form=form, chunk_size=8, initial=held)
    assert torch.allclose(torch.cat((first, rest), 1), want)


def test_it_is_a_linear_system_that_varies_in_time():
    u, delta, a, b, c, d = made(9)
    for mode in ("parallel", "matrix"):
        assert torch.allclose(
            selective_ssm_ltv(u, delta, a, b, c, d).run(mode=mode), selective_scan(u, delta, a, b, c, d)
        )


def test_groups_are_scans_of_their_own():
    u, delta, a, b, c, d = made(9, groups=2)
    whole = selective_scan(u, delta, a, b, c, d)
    for i in range(2):
        own = slice(3 * i, 3 * i + 3)
        alone = selective_scan(u[..., own], delta[..., own], a[own], b[:, :, i], c[:, :, i], d[own])
        assert torch.allclose(whole[..., own], alone)


def test_gradients_of_the_forms_agree_and_are_right():
    parts = [p.requires_grad_() for p in made(11)]
    assert torch.autograd.gradcheck(lambda *p: selective_scan(*p, form="chunk", chunk_size=4), parts)
    grads = [
        torch.autograd.grad(selective_scan(*parts, form=form, chunk_size=4).square().sum(), parts)
        for form in ("chunk", "parallel", "recurrent")
    ]
    for other in grads[1:]:
        assert all(torch.allclose(one, two) for one, two in zip(grads[0], other))


def test_half_types_are_computed_in_float32_and_nothing_is_an_answer():
    parts = made(9, dtype=torch.float32)
    half = [p.bfloat16() for p in parts]
    y, h = selective_scan(*half, return_state=True)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert torch.allclose(y.float(), selective_scan(*(p.float() for p in half)), atol=0.05)
    empty = made(0)
    y, h = selective_scan(*empty, return_state=True)
    assert y.shape == (2, 0, 6) and (h == 0).all()


def test_bad_input():
    u, delta, a, b, c, d = made(5)
    for bad, name in (
        ((u, delta[:1], a, b, c, d), "delta"), ((u, delta, a[:2], b, c, d), "a:"), ((u, delta, a, b[..., :2], c, d), "b:"),
        ((u, delta, a, b, c[:, :, None].expand(-1, -1, 4, -1), d), "c:"), ((u, delta, a, b, c, d[:2]), "d:"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            selective_scan(*bad)
    with pytest.raises(ValueError, match="initial"):
        selective_scan(u, delta, a, b, c, d, initial=torch.zeros(1))
    with pytest.raises(ValueError, match="form"):
        selective_scan(u, delta, a, b, c, d, form="fast")
