"""Run by test_triton_linear.py in a process with TRITON_INTERPRET=1 (the flag must be set before triton is imported)."""

import pytest
import torch

from regard.ops import LinearState
from regard.ops.backends.triton_linear import chunk_triton
from regard.ops.state import alibi_slopes, linear_attention, linear_attention_backend, linear_attention_reference


def inputs(dtype=torch.float32, heads=4, kv_heads=2, length=45, dim=12, value_dim=20, batch=1):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, length, dim)
    k, v = torch.randn(batch, kv_heads, length, dim), torch.randn(batch, kv_heads, length, value_dim)
    state = torch.randn(batch, heads, dim, value_dim)
    return [(x / 2).to(dtype).requires_grad_() for x in (q, k, v)] + [state.requires_grad_()]


def compare(leaves, log_decay, tolerance, run):
    """Outputs, end state and the gradients of everything, the incoming state included, against float64 eager."""
    results = []
    for wide in (False, True):
        q, k, v, state = [(x.detach().double() if wide else x.detach()).requires_grad_() for x in leaves]
        if wide:
            decay = None if log_decay is None else log_decay.double()
            out, end = linear_attention_reference(q, k, v, log_decay=decay, state=LinearState(state))
            end = end.kv
        else:
            out, end = run(q, k, v, log_decay, state)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        ((out.double() * weight).sum() + (end.double() * 0.3).sum()).backward()
        results.append([out, end, q.grad, k.grad, v.grad, state.grad])
    for name, got, want in zip(("out", "end", "dq", "dk", "dv", "dstate"), *results):
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def whole(q, k, v, log_decay, state, **options):
    out, end = linear_attention(
        q, k, v, log_decay=log_decay, state=LinearState(state), return_state=True, backend="triton", **options
    )
    return out, end.kv


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("kv_heads,length", [(1, 33), (2, 45), (4, 16), (2, 1)])
def test_equals_the_reference(decay, kv_heads, length):
    log_decay = -alibi_slopes(4) if decay else None
    leaves = inputs(kv_heads=kv_heads, length=length, batch=2 if length < 40 else 1)
    compare(leaves, log_decay, 5e-6, lambda *x: whole(*x, chunk_size=16, form="chunk"))


@pytest.mark.parametrize("segment", [1, 2])
def test_segments(segment):
    run = lambda q, k, v, log_decay, state: chunk_triton(q, k, v, log_decay, state, 16, q.dtype, segment)  # noqa: E731
    compare(inputs(length=75), -alibi_slopes(4), 5e-6, run)


@pytest.mark.parametrize("dim,value_dim", [(64, 65), (80, 16), (3, 130)])
def test_widths_beyond_one_block(dim, value_dim):
    leaves = inputs(heads=2, kv_heads=1, batch=1, length=20, dim=dim, value_dim=value_dim)
    compare(leaves, torch.tensor([-0.5, -0.01]), 5e-6, lambda *x: whole(*x, chunk_size=32))


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_types(dtype, tolerance):
    compare(inputs(dtype), -alibi_slopes(4), tolerance, lambda *x: whole(*x, chunk_size=16))


def test_forgetting_at_once_and_extreme_decay():
    compare(inputs(), torch.tensor([-1e5, -80.0, -1e-6, 0.0]), 5e-6, lambda *x: whole(*x, chunk_size=16))
    q, k, v, state = inputs()
    out, _ = whole(q, k, v, torch.full((4,), float("-inf")), state, chunk_size=16)
    own = (q * k.repeat_interleave(2, 1)).sum(-1, keepdim=True) * v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, own, rtol=1e-5, atol=1e-5)


def test_normaliser_lengths_and_feature_map():
    q, k, v, _ = inputs(length=30, batch=2)
    options = dict(log_decay=-alibi_slopes(4), feature_map="elu+1", normalize=True, lengths=torch.tensor([0, 17]))
    out, end = linear_attention(q, k, v, backend="triton", return_state=True, chunk_size=16, **options)
    want, want_end = linear_attention_reference(q, k, v, **options)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.kv, want_end.kv, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.normaliser, want_end.normaliser, rtol=1e-5, atol=1e-5)


def test_strided_inputs():
    q, k, v = (torch.randn(2, 33, 4, 16).transpose(1, 2) for _ in range(3))
    out = linear_attention(q, k, v, backend="triton", chunk_size=16)
    torch.testing.assert_close(out, linear_attention_reference(q, k, v)[0], rtol=1e-5, atol=2e-5)


def test_auto_stays_with_torch_on_the_cpu():
    q, k, v, _ = inputs()
    assert linear_attention_backend(q, k, v).backend == "torch"
