"""Packed sequences through the state ops: equal to separate ones in every form, nothing leaks, decoding goes on, bad input is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.nn import LightningAttention
from regard.nn.mixers import build_mixer, can_decode, decode_mixer, mixer_names
from regard.ops.state import LinearState, lightning_attention, linear_attention, linear_attention_decode, linear_scan

LENGTHS = (5, 0, 1, 7, 20, 4)
DECAYS = ("none", "head", "token", "channel")


def made(lengths=LENGTHS, kind="none", heads=4, kv=2, dim=3, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (
        torch.randn(1, h, total, d, generator=g, dtype=torch.float64) for h, d in ((heads, dim), (kv, dim), (kv, width))
    )
    shape = {"none": None, "head": (heads,), "token": (1, heads, total), "channel": (1, heads, total, dim)}[kind]
    decay = None if shape is None else -torch.rand(*shape, generator=g, dtype=torch.float64)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    state = LinearState(torch.randn(len(lengths), heads, dim, width, generator=g, dtype=torch.float64))
    return q, k, v, decay, bounds, state


def one_by_one(q, k, v, decay, bounds, state, **options):
    outs, ends = [], []
    for s, (start, end) in enumerate(zip(bounds.tolist(), bounds[1:].tolist())):
        piece = slice(start, end)
        own = decay if decay is None or decay.dim() == 1 else decay[:, :, piece]
        before = None if state is None else state.select(torch.tensor([s]))
        out, after = linear_attention(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], log_decay=own, state=before, return_state=True, **options
        )
        outs.append(out)
        ends.append(after)
    normaliser = None if ends[0].normaliser is None else torch.cat([end.normaliser for end in ends])
    return torch.cat(outs, 2), LinearState(torch.cat([end.kv for end in ends]), normaliser)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("form", ["parallel", "chunk", "recurrent", "auto"])
@pytest.mark.parametrize("kind", DECAYS)
def test_packed_is_each_on_its_own(kind, form, with_state):
    q, k, v, decay, bounds, state = made(kind=kind)
    state = state if with_state else None
    options = {"form": form, "chunk_size": 3}  # divides none of the lengths
    out, end = linear_attention(q, k, v, log_decay=decay, cu_seqlens=bounds, state=state, return_state=True, **options)
    want, after = one_by_one(q, k, v, decay, bounds, state, **options)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(end.kv, after.kv)
    alone = linear_attention(q, k, v, log_decay=decay, cu_seqlens=bounds, state=state, **options)
    assert torch.equal(alone, out)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=0, max_size=6), causal=st.booleans(), chunk=st.integers(1, 6))
def test_packed_with_a_normaliser(lengths, causal, chunk):
    q, k, v, _, bounds, _ = made(tuple(lengths))
    options = {"feature_map": "elu+1", "normalize": True, "causal": causal, "chunk_size": chunk}
    out, end = linear_attention(q, k, v, cu_seqlens=bounds, return_state=True, **options)
    assert out.shape == (1, 4, sum(lengths), 5) and end.kv.shape[0] == end.normaliser.shape[0] == len(lengths)
    if lengths:
        want, after = one_by_one(q, k, v, None, bounds, None, **options)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(end.kv, after.kv)
        torch.testing.assert_close(end.normaliser, after.normaliser)


@pytest.mark.parametrize("kind", DECAYS)
def test_gradients_are_those_of_each_on_its_own(kind):
    q, k, v, decay, bounds, state = made(kind=kind)
    leaves = [t.requires_grad_() for t in (q, k, v, decay, state.kv) if t is not None]
    g = torch.randn(1, 4, sum(LENGTHS), 5).double()
    grads = []
    for run in (lambda **o: linear_attention(q, k, v, log_decay=decay, cu_seqlens=bounds, state=state, return_state=True, **o),
                lambda **o: one_by_one(q, k, v, decay, bounds, state, **o)):  # fmt: skip
        out, end = run(chunk_size=4)
        grads.append(torch.autograd.grad((out * g).sum() + end.kv.square().sum(), leaves))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_no_state_leaks_into_the_next_sequence():
    q, k, v, decay, bounds, _ = made(kind="token")
    out = linear_attention(q, k, v, log_decay=decay, cu_seqlens=bounds)
    changed = v.clone()
    changed[:, :, :5] = torch.nan  # the first sequence
    spoiled = linear_attention(q, k, changed, log_decay=decay, cu_seqlens=bounds)
    assert torch.equal(spoiled[:, :, 5:], out[:, :, 5:]) and spoiled[:, :, :5].isnan().any()


def test_decoding_goes_on_from_a_packed_prefill():
    q, k, v, decay, bounds, state = made(kind="head")
    _, end = linear_attention(q, k, v, log_decay=decay, cu_seqlens=bounds, state=state, return_state=True)
    g = torch.Generator().manual_seed(4)
    news = [torch.randn(len(LENGTHS), h, 3, d, generator=g).double() for h, d in ((4, 3), (2, 3), (2, 5))]
    outs, running = [], end
    for t in range(3):
        y, running = linear_attention_decode(*(x[:, :, t : t + 1] for x in news), running, log_decay=decay)
        outs.append(y)
    for s, length in enumerate(LENGTHS):
        piece = slice(int(bounds[s]), int(bounds[s]) + length)
        whole = [torch.cat((x[:, :, piece], new[s : s + 1]), 2) for x, new in zip((q, k, v), news)]
        want = linear_attention(*whole, log_decay=decay, state=state.select(torch.tensor([s])))
        torch.testing.assert_close(torch.cat(outs, 2)[s : s + 1], want[:, :, length:])
    # one new token a sequence, packed too
    single = [x[:, :, 0].transpose(0, 1)[None] for x in news]
    packed = linear_attention(*single, log_decay=decay, state=end, cu_seqlens=torch.arange(len(LENGTHS) + 1))
    torch.testing.assert_close(packed[0].transpose(0, 1), outs[0][:, :, 0])


def test_lightning_attention_and_half_types():
    q, k, v, _, bounds, _ = made()
    slope = torch.rand(4).double()
    out = lightning_attention(q, k, v, slope, cu_seqlens=bounds)
    torch.testing.assert_close(out, linear_attention(q, k, v, log_decay=-slope, cu_seqlens=bounds))
    half = lightning_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), slope.float(), cu_seqlens=bounds.int())
    assert half.dtype == torch.bfloat16 and (half.double() - out).abs().max() < 0.1 * out.abs().max()


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("with_initial", [False, True])
def test_packed_scan(form, with_initial):
    g = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    a, b = (torch.randn(2, total, 3, generator=g).double().requires_grad_() for _ in range(2))
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    initial = torch.randn(len(LENGTHS), 2, 3, generator=g).double().requires_grad_() if with_initial else None
    h = linear_scan(a, b, initial, cu_seqlens=bounds, form=form)
    want = torch.cat(
        [
            linear_scan(a[:, start:end], b[:, start:end], None if initial is None else initial[s], form="recurrent")
            for s, (start, end) in enumerate(zip(bounds.tolist(), bounds[1:].tolist()))
        ],
        1,
    )
    torch.testing.assert_close(h, want)
    leaves = [a, b] + ([initial] if with_initial else [])
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in (h, want))):
        torch.testing.assert_close(one, other)


BAD = {
    "packed and padded": ({"lengths": torch.tensor([3])}, "lengths"),
    "start": ({"cu_seqlens": torch.tensor([1, 37])}, "cu_seqlens"),
    "end": ({"cu_seqlens": torch.tensor([0, 5, 36])}, "cu_seqlens"),
    "falling": ({"cu_seqlens": torch.tensor([0, 6, 5, 37])}, "cu_seqlens"),
    "empty": ({"cu_seqlens": torch.zeros(0, dtype=torch.long)}, "cu_seqlens"),
    "two dimensions": ({"cu_seqlens": torch.tensor([[0, 37]])}, "cu_seqlens"),
    "float": ({"cu_seqlens": torch.tensor([0.0, 37.0])}, "cu_seqlens"),
    "one state for all": ({"state": LinearState.zeros(1, 4, 3, 5, dtype=torch.float64)}, "state.kv"),
    "another layer's heads": ({"state": LinearState.zeros(6, 2, 3, 5, dtype=torch.float64)}, "state.kv"),
    "another layer's width": ({"state": LinearState.zeros(6, 4, 3, 4, dtype=torch.float64)}, "state.kv"),
    "another kind of state": ({"state": torch.zeros(6, 4, 3, 5)}, "state"),
    "a growing state": ({"log_decay": torch.full((4,), 0.1).double()}, "log_decay"),
    "no chunk": ({"chunk_size": 0}, "chunk_size"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_named(name):
    q, k, v, _, bounds, _ = made()
    given, says = BAD[name]
    with pytest.raises((ValueError, TypeError), match=says):
        linear_attention(q, k, v, **{"cu_seqlens": bounds, **given})


def test_a_padded_batch_is_not_packed():
    q, k, v, *_ = made()
    with pytest.raises(ValueError, match="batch 1"):
        linear_attention(*(t.expand(2, -1, -1, -1) for t in (q, k, v)), cu_seqlens=torch.tensor([0, 37]))
    with pytest.raises(ValueError, match="initial"):
        linear_scan(torch.ones(2, 5, 3), torch.ones(2, 5, 3), torch.ones(2, 3), cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        linear_scan(torch.ones(2, 5, 3), torch.ones(2, 5, 3), cu_seqlens=torch.tensor([0, 2]))


@pytest.mark.parametrize("options", [{}, {"variant": "transnormer", "lrpe": True}])
def test_a_layer_on_packed_sequences(options):
    """Outputs, the state to decode from, and a second packed piece are those of each sequence alone."""
    torch.manual_seed(0)
    layer, lengths, more = LightningAttention(16, 4, **options).double().eval(), (5, 1, 8), (2, 3, 1)
    rows = [torch.randn(1, a + b + 1, 16).double() for a, b in zip(lengths, more)]
    want = [layer(row)[0] for row in rows]

    def packed(first, last):
        bounds = torch.tensor([0, *(torch.tensor(last) - torch.tensor(first)).cumsum(0).tolist()])
        return torch.cat([row[:, a:b] for row, a, b in zip(rows, first, last)], 1), bounds

    ends = [a + b for a, b in zip(lengths, more)]
    x, bounds = packed((0, 0, 0), lengths)
    y, state = layer(x, cu_seqlens=bounds, return_state=True)
    torch.testing.assert_close(y[0], torch.cat([w[:n] for w, n in zip(want, lengths)]))
    x, bounds = packed(lengths, ends)
    y, state = layer(x, cu_seqlens=bounds, state=state, return_state=True)
    torch.testing.assert_close(y[0], torch.cat([w[a:b] for w, a, b in zip(want, lengths, ends)]))
    assert state.position.tolist() == ends
    y = layer(torch.cat([row[:, -1:] for row in rows]), state=state)
    torch.testing.assert_close(y[:, 0], torch.stack([w[-1] for w in want]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(x, cu_seqlens=bounds, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(x, cu_seqlens=bounds, padding_mask=torch.ones(1, x.shape[1]))
    with pytest.raises(ValueError, match="state"):
        layer(x, cu_seqlens=torch.tensor([0, x.shape[1]]), state=state)


DECODING = [name for name in mixer_names(True) if can_decode(build_mixer(name, 32, 4, causal=True, max_len=64))]


@pytest.mark.parametrize(
    "name", [name for name in DECODING if name != "gated_mlp"]
)  # whose state is a number of tokens
def test_a_state_of_another_layers_shape_is_refused(name):
    """A layer of other width or heads gets the state of this one: an error, never numbers."""
    torch.manual_seed(0)
    layer = build_mixer(name, 32, 4, causal=True, max_len=64).eval()
    _, state = decode_mixer(layer, torch.randn(2, 3, 32))
    other = build_mixer(name, 48, 4, causal=True, max_len=64).eval()
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="state"):
        decode_mixer(other, torch.randn(2, 1, 48), state)
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="state"):
        decode_mixer(layer, torch.randn(3, 1, 32), state)  # another batch


@pytest.mark.parametrize("name", DECODING)
def test_a_state_of_another_kind_is_refused(name):
    layer = build_mixer(name, 32, 4, causal=True, max_len=64).eval()
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="state"):
        decode_mixer(layer, torch.randn(2, 1, 32), {"k": torch.zeros(2, 3)})
