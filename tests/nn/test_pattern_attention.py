"""CAB's layers beyond their recorded numbers: limits in which they are something known, causality, padding, what is refused."""

import pytest
import torch

from regard import ops
from regard.bench.cab import METHODS, causality_test, leaks
from regard.nn import (
    S4D,
    BoundedMemoryAttention,
    CausalLongShortAttention,
    CosformerAttention,
    LinearRandomizedAttention,
    LocalAttention,
    LongShortAttention,
    NystromAttention,
    OpAttention,
    PerformerAttention,
    ProbSparseAttention,
    VanillaAttention,
)
from regard.nn.sequence.long_short_attention import default_chunks
from regard.nn.sequence.pattern_attention import PATTERNS, segment_means

DIM, HEADS = 24, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cases():
    for name, method in METHODS.items():
        for pattern in sorted(method.patterns):
            yield pytest.param(name, pattern, id=f"{name}-{pattern}")


NO_PADDING = ("probsparse-NS", "longshort-CS", *(f"none-{pattern}" for pattern in PATTERNS))


def build(name, pattern, length=64):
    return METHODS[name].layer(DIM, HEADS, pattern[0] == "C", pattern[1] == "C", length)


@pytest.mark.parametrize(("name", "pattern"), cases())
def test_every_pattern_runs_trains_and_repeats(name, pattern):
    layer = build(name, pattern)
    x = torch.randn(2, 21, DIM, requires_grad=True)
    others = (torch.randn(2, 33, DIM),) if pattern[1] == "C" else ()
    layer(x, *others).square().mean().backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    layer.eval()
    out = layer(x, *others)
    assert out.shape == x.shape and out.isfinite().all()
    torch.testing.assert_close(layer(x, *others), out)
    for length in (0, 1, 2, 16, 17):
        assert layer(x[:, :length], *others).shape == (2, length, DIM)
    if pattern[0] == "C":
        assert causality_test(layer, pattern=pattern)


@pytest.mark.parametrize(("name", "pattern"), cases())
def test_half_precision(name, pattern):
    layer = build(name, pattern).eval()
    x, context = torch.randn(2, 20, DIM), torch.randn(2, 24, DIM)
    others = (context,) if pattern[1] == "C" else ()
    whole, half = layer(x, *others), layer.bfloat16()(x.bfloat16(), *(c.bfloat16() for c in others))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    if name != "probsparse":  # which queries are peaked may change with the rounding
        assert (half - whole).abs().mean() <= 0.05 * whole.abs().mean()


@pytest.mark.parametrize(("name", "pattern"), [case for case in cases() if case.values[0] not in ("nystrom", "none")])
def test_rows_do_not_see_each_other(name, pattern):
    layer = build(name, pattern).eval()
    x, context = torch.randn(3, 20, DIM), torch.randn(3, 24, DIM)
    others = [(context,) if pattern[1] == "C" else () for _ in range(2)]
    alone = layer(x[1:2], *(c[1:2] for c in others[0]))
    torch.testing.assert_close(layer(x, *others[1])[1:2], alone, rtol=1e-4, atol=1e-5)


PADDED = [
    (VanillaAttention, {}),
    (LocalAttention, {"window": 4}),
    (BoundedMemoryAttention, {"landmarks": 5}),
    (CosformerAttention, {"cross": True}),
]


@pytest.mark.parametrize(("kind", "options"), PADDED, ids=lambda x: getattr(x, "__name__", ""))
def test_padding_is_as_if_it_were_not_there(kind, options):
    layer = kind(DIM, HEADS, **options).eval()
    x = torch.randn(2, 15, DIM)
    keys = torch.ones(2, 15, dtype=torch.bool)
    keys[:, 11:] = False
    if layer.cross:  # of the context; the longer length is that of the queries
        query = torch.randn(2, 15, DIM)
        torch.testing.assert_close(layer(query, x, keys), layer(query, x[:, :11]), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(layer(x, keys=keys)[:, :11], layer(x[:, :11]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [case for case in cases() if case.values[0] not in ("probsparse", "none") and case.id != "longshort-CS"],
)
def test_rows_of_padding_alone_stay_finite(name, pattern):
    layer = build(name, pattern).eval()
    x, context = torch.randn(2, 20, DIM, requires_grad=True), torch.randn(2, 20, DIM)
    keys = torch.ones(2, 20, dtype=torch.bool)
    keys[0, :6], keys[1] = False, False
    out = layer(x, context, keys) if pattern[1] == "C" else layer(x, keys=keys)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    if pattern[1] == "C":
        assert layer(x, context[:, :0]).shape == x.shape


def test_a_wide_window_is_vanilla():
    for causal in (False, True):
        wide, plain = LocalAttention(DIM, HEADS, causal, window=40), VanillaAttention(DIM, HEADS, causal)
        plain.load_state_dict(wide.state_dict())
        x = torch.randn(2, 30, DIM)
        torch.testing.assert_close(wide(x), plain(x))


def test_nystrom_with_a_landmark_a_token_is_vanilla():
    layer, plain = NystromAttention(DIM, HEADS, landmarks=20, variant="paper"), VanillaAttention(DIM, HEADS)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, DIM)
    torch.testing.assert_close(layer(x), plain(x))
    paper = NystromAttention(DIM, HEADS, landmarks=4, variant="paper")
    paper.load_state_dict(layer.state_dict())
    torch.testing.assert_close(paper(x)[:1], paper(x[:1]), rtol=1e-5, atol=1e-6)


def test_lara_with_a_landmark_a_token_is_near_vanilla_and_training_is_random():
    layer = LinearRandomizedAttention(DIM, HEADS, landmarks=4)
    x = torch.randn(2, 20, DIM)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    for options in ({"antithetic": True}, {"optimal": True}, {"adaptive": True}):
        assert LinearRandomizedAttention(DIM, HEADS, landmarks=4, **options)(x).isfinite().all()


def test_causal_abc_is_the_running_form_of_the_other():
    causal, whole = (BoundedMemoryAttention(DIM, HEADS, causal, landmarks=5) for causal in (True, False))
    whole.load_state_dict(causal.state_dict())
    x = torch.randn(2, 150, DIM)  # more than two chunks
    out = causal(x)
    for place in (0, 1, 63, 64, 149):
        torch.testing.assert_close(out[:, place], whole(x[:, : place + 1])[:, -1], rtol=1e-4, atol=1e-5)
    shifted = causal(x * 60)
    assert shifted.isfinite().all()


def test_causal_abc_goes_around_padding_at_the_front():
    layer = BoundedMemoryAttention(DIM, HEADS, True, landmarks=5)
    x = torch.randn(2, 20, DIM)
    keys = torch.ones(2, 20, dtype=torch.bool)
    keys[:, :6] = False
    out = layer(x, keys=keys)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 6:], layer(x[:, 6:]), rtol=1e-4, atol=1e-5)


def test_performer_nears_vanilla_and_keeps_its_directions():
    plain, x = VanillaAttention(DIM, HEADS), torch.randn(2, 20, DIM)
    errors, layers = [], []
    for features in (32, 4096):
        layer = PerformerAttention(DIM, HEADS, features=features, floor=0.0, eps=0.0).eval()
        layer.load_state_dict(plain.state_dict() | {"projection": layer.projection})
        errors.append(float((layer(x) - plain(x)).detach().abs().mean()))
        layers.append(layer)
    assert errors[1] < errors[0] / 3
    again = PerformerAttention(DIM, HEADS, features=4096, floor=0.0, eps=0.0).eval()
    again.load_state_dict(layers[1].state_dict())
    assert torch.equal(again(x), layers[1](x))
    again.redraw()
    assert not torch.equal(again(x), layers[1](x))


def test_probsparse_with_all_queries_peaked_is_vanilla():
    layer, plain = ProbSparseAttention(DIM, HEADS, factor=20), VanillaAttention(DIM, HEADS)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, DIM)
    torch.testing.assert_close(layer(x), plain(x))
    few = ProbSparseAttention(DIM, HEADS, factor=1).eval()
    q, k, v = torch.randn(3, 1, HEADS, 40, 8)
    out = few.mix(q, k, v, None)
    mean = v.mean(2, keepdim=True).expand_as(out)
    assert ((out - mean).abs().sum(-1) > 1e-6).sum(-1).tolist() == [[4] * HEADS]


def test_s4d_steps_are_its_convolution():
    layer = S4D(DIM, 2, causal=True, d_state=8).eval()
    x = torch.randn(3, 19, DIM)
    state, outs = layer.initial_state(3), []
    for token in x.unbind(1):
        out, state = layer.step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), layer(x), rtol=1e-4, atol=1e-5)
    assert leaks(S4D(DIM, 2)) > 1e-2  # two directions


def test_long_short_sees_its_window_and_its_summaries():
    layer = CausalLongShortAttention(DIM, HEADS, chunk=4, window=3, memory=4).eval()
    x = torch.randn(1, 16, DIM, requires_grad=True)
    # token 9: window 7, 8, 9; earlier chunks 0-3 and 4-7; not 10 and later
    (grad,) = torch.autograd.grad(layer(x)[0, 9].square().sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [True] * 10 + [False] * 6
    both = LongShortAttention(DIM, HEADS, landmarks=3, window=4).eval()
    (grad,) = torch.autograd.grad(both(x)[0, 9].square().sum(), x)
    assert (grad[0].abs().sum(-1) > 0).all()
    keys = torch.ones(1, 16, dtype=torch.bool)
    keys[:, 12:] = False
    torch.testing.assert_close(both(x, keys=keys)[:, :12], both(x[:, :12]), rtol=1e-4, atol=1e-5)


def test_chunks_that_suit_short_sequences():
    for length in (1, 7, 8, 64, 300, 5000):
        chunk, memory = default_chunks(length)
        assert memory % chunk == 0 and chunk <= 32 and memory <= max(length, chunk)


def test_any_op_between_projections():
    layer = OpAttention(DIM, HEADS, op=ops.attention)
    plain = VanillaAttention(DIM, HEADS)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, DIM)
    torch.testing.assert_close(layer(x), plain(x))


def test_segments():
    x = torch.arange(10.0).view(1, 10, 1)
    assert segment_means(x, 4)[0, :, 0].tolist() == [0.5, 2.5, 5.0, 8.0]
    assert segment_means(x, 5)[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert segment_means(x, 12) is x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalAttention(DIM, HEADS, cross=True), "LocalAttention can do"),
        (lambda: PerformerAttention(DIM, HEADS, causal=True), "PerformerAttention can do"),
        (lambda: CosformerAttention(DIM, HEADS, causal=True, cross=True), "CosformerAttention can do"),
        (lambda: VanillaAttention(25, HEADS), "dim"),
        (lambda: VanillaAttention(DIM, HEADS, dropout=1.0), "dropout"),
        (lambda: VanillaAttention(DIM, HEADS)(torch.randn(1, 4, DIM), torch.randn(1, 4, DIM)), "context"),
        (lambda: VanillaAttention(DIM, HEADS, cross=True)(torch.randn(1, 4, DIM)), "context"),
        (lambda: VanillaAttention(DIM, HEADS)(torch.randn(1, 4, DIM + 1)), "x: got"),
        (lambda: VanillaAttention(DIM, HEADS)(torch.randn(1, 4, DIM), keys=torch.ones(1, 5)), "keys"),
        (lambda: ProbSparseAttention(DIM, HEADS)(torch.randn(1, 4, DIM), keys=torch.ones(1, 4)), "padding"),
        (lambda: S4D(DIM, d_state=5), "d_state"),
        (lambda: S4D(DIM, causal=True, bidirectional=True), "bidirectional"),
        (lambda: S4D(DIM).step(torch.randn(1, DIM), torch.zeros(1)), "step"),
        (lambda: CausalLongShortAttention(DIM, HEADS, chunk=4, memory=6, window=2), "memory"),
        (lambda: BoundedMemoryAttention(DIM, HEADS, variant="new"), "variant"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
