"""Neural memory: its definition written with autograd, its two forms, its state, and the delta rule it is in one corner; errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from regard.ops import linear_attention
from regard.ops.state import NeuralMemoryState, memory_gradient, memory_read, neural_memory

DIM, HEADS, BATCH = 5, 2, 2


def weights(depth, residual=False, width=7, seed=0):
    torch.manual_seed(seed)
    widths = [DIM, *[width] * (depth - 1), DIM]
    made = [torch.randn(HEADS, a, b, dtype=torch.float64) * 0.4 for a, b in pairwise(widths)]
    return made + [torch.randn(HEADS, DIM, dtype=torch.float64) * 0.3] * residual


def given(length, seed=1, batch=BATCH):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, batch, HEADS, length, DIM, dtype=torch.float64)
    step, momentum, forget = torch.rand(3, batch, HEADS, length, dtype=torch.float64)
    return q, k, v, 0.1 * step, 0.9 * momentum, 0.3 * forget


def network(parts, x, residual, act=torch.nn.functional.gelu):
    """One memory (no batch, no heads) by torch alone."""
    matrices = parts[:-1] if residual else parts
    out = x
    for place, matrix in enumerate(matrices):
        out = (act(out) if place else out) @ matrix
    return x + torch.layer_norm(out, out.shape[-1:]) * (1 + parts[-1]) if residual else out


def definition(first, data, chunk, residual):
    """The paper's equations for each row and head, gradients by autograd."""
    q, k, v, step, momentum, forget = data
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            now = [w[h].clone() for w in first]
            speed, anchor = [torch.zeros_like(w) for w in now], now
            for t in range(q.shape[2]):
                anchor = now if t % chunk == 0 else anchor
                leaves = [w.detach().requires_grad_() for w in anchor]
                loss = (network(leaves, k[b, h, t : t + 1], residual) - v[b, h, t : t + 1]).square().sum()
                slopes = torch.autograd.grad(loss, leaves)
                speed = [momentum[b, h, t] * s - step[b, h, t] * g for s, g in zip(speed, slopes)]
                now = [(1 - forget[b, h, t]) * w + s for w, s in zip(now, speed)]
                out[b, h, t] = network(now, q[b, h, t : t + 1], residual)[0]
    return out


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_both_forms_are_the_definition(chunk, depth, residual):
    first, data = weights(depth, residual), given(11)
    state = NeuralMemoryState.start(first, BATCH)
    want = definition(first, data, chunk, residual)
    ends = []
    for form in ("chunk", "recurrent"):
        y, end = neural_memory(*data[:3], state, *data[3:], chunk_size=chunk, form=form)
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-10)
        ends.append(end)
    for name in ("weights", "momentum", "anchor"):
        for a, b in zip(getattr(ends[0], name), getattr(ends[1], name)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("split", [[13], [1] * 13, [5, 8], [4, 0, 9], [3, 1, 2, 7]])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_state_continues_anywhere(split, chunk):
    first, data = weights(2, True), given(13)
    whole, _ = neural_memory(*data[:3], NeuralMemoryState.start(first, BATCH), *data[3:], chunk_size=chunk)
    state, made, at = NeuralMemoryState.start(first, BATCH), [], 0
    for count in split:
        q, k, v, *rest = (t[:, :, at : at + count] for t in data)
        y, state = neural_memory(q, k, v, state, *rest, chunk_size=chunk)
        made.append(y)
        at += count
    torch.testing.assert_close(torch.cat(made, dim=2), whole, rtol=1e-9, atol=1e-10)
    assert state.position == 13


@pytest.mark.parametrize("chunk", [None, 6])
def test_shared_steps(chunk):
    """Tokens that share one step: both forms agree, and a step without momentum or decay is the sum of its tokens' own."""
    first, (q, k, v, step, *_) = weights(2), given(12)
    torch.manual_seed(3)
    momentum, forget = torch.rand(2, BATCH, HEADS, 4, dtype=torch.float64)
    start = NeuralMemoryState.start(first, BATCH)
    seen = [0, 0, 1, 1, 1, 2, 2, 4, 4]
    options = {"update_size": 3, "seen": seen, "chunk_size": chunk}
    a, b = (
        neural_memory(q[:, :, :9], k, v, start, step, momentum, forget, form=f, **options)[0]
        for f in ("chunk", "recurrent")
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    _, shared = neural_memory(q[:, :, :0], k, v, start, step, chunk_size=chunk, update_size=3, seen=[])
    _, alone = neural_memory(q, k, v, start, step, chunk_size=chunk)
    for x, y in zip(shared.weights, alone.weights):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_a_matrix_with_gradients_at_zero_is_linear_attention():
    q, k, v, step, *_ = given(10)
    zero = [torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)]
    y, _ = neural_memory(q, k, v, NeuralMemoryState.start(zero, BATCH), step, chunk_size=None)
    want = linear_attention(q, k, 2 * step[..., None] * v, normalize=False, causal=True, scale=1.0)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-10)


def test_one_step_of_a_half_writes_a_unit_key_exactly():
    """The delta rule: with step 1/2 and chunk 1, what was stored under a key of length 1 is read back, whatever stood there."""
    first, (_, k, v, *_) = weights(1), given(6)
    k = torch.nn.functional.normalize(k, dim=-1)
    state = NeuralMemoryState.start(first, BATCH)
    y, _ = neural_memory(k, k, v, state, torch.full(k.shape[:3], 0.5).double(), chunk_size=1)
    torch.testing.assert_close(y, v, rtol=1e-9, atol=1e-10)


def test_forgetting_all_wipes_the_past():
    first, (q, k, v, step, momentum, forget) = weights(2), given(9)
    forget = forget.clone()
    forget[:, :, 5] = 1.0
    momentum = momentum.clone()
    momentum[:, :, 5] = 0.0
    start = NeuralMemoryState.start(first, BATCH)
    y, _ = neural_memory(q, k, v, start, step, momentum, forget, chunk_size=None)
    # with gradients at the first weights nothing of tokens 0 to 4 is left after token 5
    other = torch.cat((torch.randn_like(v[:, :, :5]), v[:, :, 5:]), dim=2)
    moved, _ = neural_memory(q, k, other, start, step, momentum, forget, chunk_size=None)
    torch.testing.assert_close(y[:, :, 5:], moved[:, :, 5:], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(y[:, :, :5], moved[:, :, :5])


def test_no_step_stores_nothing_and_reads_the_first_weights():
    first, (q, k, v, step, momentum, _) = weights(3, True), given(7)
    start = NeuralMemoryState.start(first, BATCH)
    y, end = neural_memory(q, k, v, start, torch.zeros_like(step), momentum, chunk_size=4)
    torch.testing.assert_close(y, memory_read(start.weights, q), rtol=1e-12, atol=1e-12)
    for a, b in zip(end.weights, start.weights):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "tanh"])
def test_gradient_is_autograds(activation):
    first, (_, k, v, step, *_) = weights(3, True), given(6, batch=1)
    state = NeuralMemoryState.start([w.requires_grad_() for w in first], 1)
    loss = (step * (memory_read(state.weights, k, activation) - v).square().sum(-1)).sum()
    want = torch.autograd.grad(loss, first)
    for got, one in zip(memory_gradient(state.weights, k, v, step, activation), want):
        torch.testing.assert_close(got[0], one, rtol=1e-9, atol=1e-10)


def test_outer_gradients_of_both_forms_agree():
    results = []
    for form in ("chunk", "recurrent"):
        first = [w.requires_grad_() for w in weights(2, True)]
        data = [t.requires_grad_() for t in given(9)]
        y, _ = neural_memory(*data[:3], NeuralMemoryState.start(first, BATCH), *data[3:], chunk_size=4, form=form)
        results.append(torch.autograd.grad(y.sin().sum(), [*data, *first]))
    for a, b in zip(*results):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_rows_do_not_matter_to_each_other_and_half_types_run():
    first, data = weights(2), given(10)
    whole, end = neural_memory(*data[:3], NeuralMemoryState.start(first, BATCH), *data[3:])
    one, _ = neural_memory(*(t[1:] for t in data[:3]), NeuralMemoryState.start(first, 1), *(t[1:] for t in data[3:]))
    torch.testing.assert_close(whole[1:], one, rtol=1e-12, atol=1e-12)
    swapped = end.select(torch.tensor([1, 0]))
    torch.testing.assert_close(swapped.weights[0][0], end.weights[0][1])
    half = [t.bfloat16() for t in data]
    y, state = neural_memory(*half[:3], NeuralMemoryState.start([w.bfloat16() for w in first], BATCH), *half[3:])
    assert y.dtype == torch.bfloat16 and state.weights[0].dtype == torch.float32
    torch.testing.assert_close(y.double(), whole, rtol=0.1, atol=0.1)


def test_errors_name_the_argument():
    first, (q, k, v, step, momentum, _) = weights(1), given(6)
    start = NeuralMemoryState.start(first, BATCH)
    cases = [
        ("weights", lambda: NeuralMemoryState.start([], 2)),
        (r"weights\[0\]", lambda: NeuralMemoryState.start([torch.zeros(3, 4)], 2)),
        ("weights", lambda: NeuralMemoryState.start([torch.zeros(2, 4, 5)], 2)),
        ("state", lambda: neural_memory(q, k, v, None, step)),
        ("q", lambda: neural_memory(q[:, :1], k, v, start, step)),
        ("v", lambda: neural_memory(q, k, v[:, :, 1:], start, step)),
        ("step", lambda: neural_memory(q, k, v, start, step[:, :, 1:])),
        ("momentum", lambda: neural_memory(q, k, v, start, step, momentum[:, :1])),
        ("k", lambda: neural_memory(q, k, v, start, step, update_size=4, seen=[0] * 6, chunk_size=4)),
        ("chunk_size", lambda: neural_memory(q, k, v, start, step, update_size=3, chunk_size=4)),
        ("seen", lambda: neural_memory(q, k, v, start, step, update_size=3, chunk_size=3)),
        ("seen", lambda: neural_memory(q, k, v, start, step, seen=[3, 2, 1, 0, 0, 0])),
        ("activation", lambda: neural_memory(q, k, v, start, step, activation="gelo")),
        ("form", lambda: neural_memory(q, k, v, start, step, form="fast")),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            call()
