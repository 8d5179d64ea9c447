"""Softmax, linear, state space and recurrent layers in one form: each system gives what its layer gives, in all modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.nn import QLSTM, S4D, LinearAttention, NormalizedLinearAttention, SoftmaxAttention, as_ltv
from regard.ops.state import LTV, linear_scan, selective_ssm_ltv

LAYERS = {
    "softmax": lambda: SoftmaxAttention(12, 3, bias=True),
    "softmax, rotary, two kv heads": lambda: SoftmaxAttention(16, 4, num_kv_heads=2, rope_base=100.0, qk_norm=True),
    "linear": lambda: LinearAttention(12, 3, key_dim=6, bias=True),
    "linear, no normaliser, decay": lambda: LinearAttention(12, 3, feature_map="relu", normalize=False, decay="token"),
    "linear, normaliser, decay, rotary": lambda: LinearAttention(12, 3, decay="token", rope_base=50.0, scale=0.3),
    "normalized": lambda: NormalizedLinearAttention(12, 3),
    "qlstm": lambda: QLSTM(6),
    "qlstm, forward gate": lambda: QLSTM(6, reverse=False, kernel_size=1),
    "s4d": lambda: S4D(6, 2, causal=True, d_state=4),
}


@pytest.mark.parametrize("mode", ["parallel", "recurrent", "matrix"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_system_is_the_layer(name, mode):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    width = layer.dim
    x = torch.randn(2, 9, width, dtype=torch.float64)
    with torch.no_grad():
        expected, system = layer(x), as_ltv(layer, x)
        y = system.run(mode=mode)
        y = layer._out(y) if isinstance(layer, S4D) else y
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    spectrum = system.transition_spectrum()
    assert spectrum.shape == system.decay.shape and (spectrum[..., :-1] >= spectrum[..., 1:]).all()


def test_softmax_by_its_taylor_series_converges():
    torch.manual_seed(0)
    layer = SoftmaxAttention(4, 2).double()
    x = torch.randn(1, 8, 4, dtype=torch.float64)
    expected = layer(x).detach()
    systems = [as_ltv(layer, x, order=order) for order in (1, 3, 8)]
    errors = [float((system.run() - expected).abs().max() / expected.abs().max()) for system in systems]
    assert errors[2] < 1e-3 * errors[0] and errors[1] < 0.1 * errors[0] and errors[2] < 1e-5
    assert systems[1].state_size == 2 * (1 + 2 + 4 + 8) * 2


def test_a_normaliser_that_is_the_row_sum_is_linear_attention():
    torch.manual_seed(0)
    layer = LinearAttention(12, 3, eps=0.0).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    system = as_ltv(layer, x)
    given = NormalizedLinearAttention(12, 3, feature_map="elu+1").double()
    given.load_state_dict(layer.state_dict(), strict=False)
    for one in (given.q_proj, given.k_proj, given.v_proj, given.out_proj):
        torch.nn.init.zeros_(one.bias)
    q, k = (F.elu(to(x)).add(1).unflatten(-1, (3, 4)).transpose(1, 2) for to in (layer.q_proj, layer.k_proj))
    given.eta = lambda x: (q @ k.transpose(-1, -2)).tril().sum(-1)
    torch.testing.assert_close(given(x), layer(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(as_ltv(given, x).run(), system.run(), rtol=1e-10, atol=1e-12)


def test_weights_of_linear_attention_sum_to_one_in_the_matrix():
    torch.manual_seed(0)
    layer = LinearAttention(4, 1, eps=0.0).double()
    with torch.no_grad():
        layer.v_proj.weight.copy_(torch.eye(4))
        layer.out_proj.weight.copy_(torch.eye(4))
    phi = as_ltv(layer, torch.randn(1, 7, 4, dtype=torch.float64)).matrix()[..., :4]
    weights = phi.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 7, 4, dtype=torch.float64))
    assert (phi[0, 2, 3:] == 0).all()


def test_reversed_gate_is_the_decay_of_a_state_space_model():
    torch.manual_seed(0)
    layer = QLSTM(5).double()
    x = torch.randn(1, 11, 5, dtype=torch.float64)
    decay, enter, inner, _, _ = layer.parts(x)
    forget = layer.gates(inner).chunk(3, dim=-1)[0]
    torch.testing.assert_close(decay, (-F.softplus(forget)).exp())
    delta, count = F.softplus(forget), layer.hidden
    one = torch.ones(1, 11, 1, dtype=torch.float64)
    system = selective_ssm_ltv(enter * inner / delta, delta, -torch.ones(count, 1, dtype=torch.float64), one, one)
    torch.testing.assert_close(system.run(), linear_scan(decay, enter * inner))
    with torch.no_grad():
        layer.alpha.fill_(-1.0)  # relu(alpha) = 0: nothing is forgotten
    assert (layer.parts(x)[0] == 1).all() and as_ltv(layer, x).memory_length().isinf().all()


def test_selective_scan_equals_its_loop():
    torch.manual_seed(0)
    x, delta = torch.randn(2, 6, 3), torch.rand(2, 6, 3)
    a, b, c, d = -torch.rand(3, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(3)
    h, made = torch.zeros(2, 3, 4), []
    for t in range(6):
        h = (delta[:, t, :, None] * a).exp() * h + delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        made.append((h * c[:, t, None]).sum(-1) + d * x[:, t])
    system = selective_ssm_ltv(x, delta, a, b, c, d)
    for mode in ("parallel", "recurrent", "matrix"):
        torch.testing.assert_close(system.run(mode=mode), torch.stack(made, 1), rtol=1e-5, atol=1e-5)
    assert system.state_size == 12


@pytest.mark.parametrize("length", [0, 1, 2, 7, 16, 33])
def test_linear_scan(length):
    torch.manual_seed(length)
    a = torch.randn(2, length, 3, dtype=torch.float64)
    a[:, ::3] = 0
    b = torch.randn(2, length, 3, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.float64)
    h, made = start, []
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        made.append(h)
    expected = torch.stack(made, 1) if made else b
    for form in ("parallel", "recurrent", "auto"):
        torch.testing.assert_close(linear_scan(a, b, start, form=form), expected)
    torch.testing.assert_close(
        linear_scan(a.transpose(0, 1), b.transpose(0, 1), start, dim=0), expected.transpose(0, 1)
    )


def test_linear_scan_gradients_and_half():
    a = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *given: linear_scan(*given[:2], given[2][:, ...].sum() + 0 * b[:, 0]), (a, b, start)
    )
    half = linear_scan(torch.full((1, 600), 0.99, dtype=torch.bfloat16), torch.ones(1, 600, dtype=torch.bfloat16))
    assert (
        half.dtype == torch.bfloat16 and abs(float(half[0, -1]) - 1 / (1 - 0.98828125)) < 0.5
    )  # 0.99 is 0.98828125 there


def test_qlstm_state_is_constant_and_exact():
    torch.manual_seed(0)
    layer = QLSTM(6)
    x = torch.randn(2, 20, 6)
    whole, state, made = layer(x), None, []
    for piece in x.split([7, 1, 0, 1, 11], dim=1):
        y, state = layer(piece, state=state, return_state=True)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, 1), whole)
    assert state.h.shape == (2, 12) and state.before.shape == (2, 3, 12)


def test_bad_arguments():
    x = torch.randn(1, 4, 12)
    for layer, says in (
        (SoftmaxAttention(12, 3, window=2), "window"),
        (SoftmaxAttention(12, 3, causal=False), "causal"),
        (LinearAttention(12, 3, out_norm=True), "out_norm"),
    ):
        with pytest.raises(ValueError, match=says):
            as_ltv(layer, x)
    with pytest.raises(TypeError, match="layer"):
        as_ltv(torch.nn.Linear(12, 12), x)
    with pytest.raises(ValueError, match="order"):
        as_ltv(LinearAttention(12, 3), x, order=2)
    with pytest.raises(ValueError, match="drive"):
        LTV(torch.ones(1, 2, 3), torch.ones(1, 2, 4, 1), torch.ones(1, 2, 1, 3))
    with pytest.raises(ValueError, match="u: "):
        LTV(torch.ones(1, 2, 3), torch.ones(1, 2, 3, 1), torch.ones(1, 2, 1, 3)).run(torch.ones(1, 3, 1))
    with pytest.raises(ValueError, match="initial"):
        linear_scan(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="delta"):
        selective_ssm_ltv(x, x[:, :2], torch.ones(12, 2), torch.ones(1, 4, 2), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match="normalize"):
        NormalizedLinearAttention(12, 3, normalize=True)
    with pytest.raises(ValueError, match="decay"):
        LinearAttention(12, 3, causal=False, decay="token")
    with pytest.raises(TypeError, match="state"):
        QLSTM(6)(torch.randn(1, 2, 6), state=3)
