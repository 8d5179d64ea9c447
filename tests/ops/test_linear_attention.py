"""linear_attention: every form against the float64 specification, states, gradients, limit cases, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.bench.ops_state import measure_linear
from regard.ops import LinearState, linear_attention, linear_attention_backend, linear_attention_decode
from regard.ops.state import (
    alibi_slopes,
    feature_maps,
    layer_log_decay,
    lightning_attention,
    linear_attention_reference,
)
from regard.ops.state.chunk import chunk_fixed

FORMS = ("parallel", "chunk", "recurrent")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(seed=0, batch=2, heads=4, kv_heads=2, length=13, dim=5, value_dim=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, value_dim)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def decay_of(kind, q, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = q.shape
    shape = {
        "head": (heads,),
        "token": (batch, heads, length),
        "shared": (1, heads, length),
        "channel": (batch, heads, length, dim),
    }
    return None if kind == "none" else -torch.rand(shape[kind], generator=generator, dtype=torch.float64) * 2


def state_of(q, v, normalize=False, seed=2):
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(q.shape[0], q.shape[1], q.shape[3], v.shape[3], generator=generator, dtype=torch.float64)
    normaliser = torch.rand(kv.shape[:3], generator=generator, dtype=torch.float64) if normalize else None
    return LinearState(kv, normaliser)


def error(got, want):
    """Largest difference relative to the largest wanted number (NaN, which passes no comparison, where there is one).

    Terms are of size one, so a result below 0.1 is what is left of a sum that cancels: its error is measured against 0.1 then.
    """
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=0.1))


KINDS = ("none", "head", "token", "shared", "channel")


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(0, 40),
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    kind=st.sampled_from(KINDS),
    normalize=st.booleans(),
    with_state=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    chunk_size=st.sampled_from([1, 4, 7, 16, None]),
    seed=st.integers(0, 5),
)
def test_every_form_is_the_specification(
    length, groups, widths, batch, kind, normalize, with_state, padded, dtype, chunk_size, seed
):
    q, k, v = make(seed, batch, *groups, length, *widths, dtype)
    options = {
        "log_decay": decay_of(kind, q, seed),
        "feature_map": "elu+1" if normalize else None,
        "normalize": normalize,
        "state": state_of(q, v, normalize, seed) if with_state else None,
        "lengths": torch.randint(0, length + 1, (batch,)) if padded else None,
        "scale": 0.7,
    }
    want, want_state = linear_attention_reference(q.double(), k.double(), v.double(), **options)
    for form in (*FORMS, "auto"):
        got, state = linear_attention(q, k, v, form=form, chunk_size=chunk_size, return_state=True, **options)
        assert got.dtype == dtype
        assert state.kv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(got, want) <= TOLERANCE[dtype], form
        assert error(state.kv, want_state.kv) <= TOLERANCE[dtype], form
        if normalize:
            assert error(state.normaliser, want_state.normaliser) <= TOLERANCE[dtype], form


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("q_len,kv_len", [(7, 7), (3, 11), (5, 0), (0, 4)])
@pytest.mark.parametrize("normalize", [False, True])
def test_non_causal(q_len, kv_len, with_state, normalize):
    q, (_, k, v) = make(length=q_len)[0], make(length=kv_len, seed=3)
    options = {
        "causal": False,
        "normalize": normalize,
        "feature_map": "elu+1",
        "lengths": torch.tensor([kv_len, kv_len // 2]),
    }
    options["state"] = state_of(q, v, normalize) if with_state else None
    want, want_state = linear_attention_reference(q, k, v, **options)
    got, state = linear_attention(q, k, v, return_state=True, **options)
    assert error(got, want) < 1e-12
    assert error(state.kv, want_state.kv) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [0, 1, 6, 13])
def test_two_calls_with_a_carried_state_are_one(kind, form, cut):
    q, k, v = make()
    decay = decay_of(kind, q)
    whole, end = linear_attention(q, k, v, log_decay=decay, normalize=True, feature_map="elu+1", return_state=True)
    outs, state = [], None
    for part in (slice(0, cut), slice(cut, None)):
        piece = decay if decay is None or decay.dim() == 1 else decay[:, :, part]
        out, state = linear_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], log_decay=piece, normalize=True, feature_map="elu+1",
            state=state, return_state=True, form=form, chunk_size=4,
        )  # fmt: skip
        outs.append(out)
    assert error(torch.cat(outs, 2), whole) < 1e-12
    assert error(state.kv, end.kv) < 1e-12
    assert error(state.normaliser, end.normaliser) < 1e-12


@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(kind, form, normalize):
    """Numerical gradients of outputs and end state with respect to q, k, v, the incoming state and a learned decay."""
    q, k, v = make(batch=1, heads=2, kv_heads=1, length=7, dim=3, value_dim=2)
    decay, state = decay_of(kind, q), state_of(q, v, normalize)
    leaves = [q, k, v, state.kv] + ([state.normaliser] if normalize else [])
    if kind in ("token", "channel"):
        leaves.append(decay)
    leaves = [x.clone().requires_grad_() for x in leaves]

    def run(q, k, v, kv, *rest):
        carried = LinearState(kv, rest[0] if normalize else None)
        log_decay = rest[-1] if kind in ("token", "channel") else decay
        out, end = linear_attention(
            q, k, v, log_decay=log_decay, state=carried, return_state=True, normalize=normalize,
            feature_map="elu+1", form=form, chunk_size=3, scale=0.5,
        )  # fmt: skip
        return (out, end.kv, end.normaliser) if normalize else (out, end.kv)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("length,chunk_size", [(33, 8), (1, 8), (9, 1), (16, 16)])
def test_hand_written_backward_at_odd_lengths(length, chunk_size):
    q, k, v = (x.requires_grad_() for x in make(batch=1, heads=2, kv_heads=2, length=length, dim=3, value_dim=2))
    decay = torch.tensor([-0.4, -2.0], dtype=torch.float64)
    run = lambda q, k, v: linear_attention(q, k, v, log_decay=decay, form="chunk", chunk_size=chunk_size)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("heads,kv_heads,length", [(1, 1, 300), (6, 2, 95), (70, 70, 20)])
@pytest.mark.parametrize("decay", [False, True])
def test_many_chunks_at_once(heads, kv_heads, length, decay):
    """The chunk form takes several chunks together, fewer the more heads there are: values and gradients across all seams."""
    inputs = make(batch=1, heads=heads, kv_heads=kv_heads, length=length, dim=3, value_dim=4)
    log_decay = decay_of("head", inputs[0]) / 8 if decay else None
    results = []
    for form in ("chunk", "parallel"):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        state = state_of(q, v)
        state.kv.requires_grad_()
        out, end = linear_attention(
            q, k, v, log_decay=log_decay, state=state, return_state=True, form=form, chunk_size=4
        )
        (out.sin().sum() + end.kv.cos().sum()).backward()
        results.append([out, end.kv, q.grad, k.grad, v.grad, state.kv.grad])
    for got, want in zip(*results):
        assert error(got, want) < 1e-11


def test_learned_decay_per_head_has_a_gradient_in_every_form():
    q, k, v = make()
    grads = []
    for form in FORMS:
        decay = decay_of("head", q).requires_grad_()
        linear_attention(q, k, v, log_decay=decay, form=form, chunk_size=4).square().sum().backward()
        grads.append(decay.grad)
    assert error(grads[1], grads[0]) < 1e-11
    assert error(grads[2], grads[0]) < 1e-11
    assert torch.autograd.gradcheck(lambda g: linear_attention(q, k, v, log_decay=g, chunk_size=4), decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_low_precision_inputs(dtype):
    grads = []
    for wide in (False, True):
        leaves = [x.double() if wide else x for x in make(length=50, dtype=dtype)]
        leaves = [x.requires_grad_() for x in leaves]
        out = linear_attention(*leaves, log_decay=-alibi_slopes(4), chunk_size=16, form="parallel" if wide else "chunk")
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype))
        grads.append([x.grad for x in leaves])
    for got, want in zip(*grads):
        assert got.dtype == dtype
        assert error(got, want) <= TOLERANCE[dtype]


def test_zero_decay_is_no_decay_and_equals_the_cumulative_sum():
    q, k, v = make(kv_heads=4)
    want = torch.einsum("bhnd,bhnde->bhne", q, (k[..., None] * v[..., None, :]).cumsum(2))
    for form in FORMS:
        assert error(linear_attention(q, k, v, form=form), want) < 1e-12
        assert error(linear_attention(q, k, v, form=form, log_decay=torch.zeros(4)), want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_forgetting_everything_leaves_the_token_itself(form, kind):
    q, k, v = make(kv_heads=4)
    decay = torch.full_like(decay_of(kind, q), float("-inf"))
    state = state_of(q, v)
    out, end = linear_attention(q, k, v, log_decay=decay, form=form, chunk_size=4, state=state, return_state=True)
    assert error(out, (q * k).sum(-1, keepdim=True) * v) < 1e-12
    assert error(end.kv, k[:, :, -1, :, None] * v[:, :, -1, None]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_reset_in_the_middle_starts_a_new_sequence_exactly(form):
    """Strong decays beside weak ones: sums of exponents must not cost precision (float32, 300 tokens)."""
    q, k, v = make(length=300, dtype=torch.float32)
    decay = torch.full((2, 4, 300), -1e-3)
    decay[:, :, 150] = float("-inf")
    whole = linear_attention(q, k, v, log_decay=decay, form=form, chunk_size=128)
    fresh = linear_attention(*(x[:, :, 150:] for x in (q, k, v)), log_decay=decay[:, :, 150:], form=form)
    assert error(whole[:, :, 150:], fresh) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_feature_gives_the_running_mean(form):
    _, _, v = make(kv_heads=4)
    ones = torch.ones(2, 4, 13, 5, dtype=torch.float64)
    out = linear_attention(ones, ones, v, normalize=True, form=form, chunk_size=4, eps=0.0)
    assert error(out, v.cumsum(2) / torch.arange(1, 14)[:, None]) < 1e-12


def test_last_causal_row_is_the_non_causal_one():
    q, k, v = make()
    causal = linear_attention(q, k, v, normalize=True, feature_map="softmax")
    everything = linear_attention(q, k, v, normalize=True, feature_map="softmax", causal=False)
    assert error(causal[:, :, -1], everything[:, :, -1]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "head", "token"])
def test_padding_reaches_nothing(form, kind):
    """Whatever stands in the padding, NaN included: outputs, states and gradients are those of the short sequences alone."""
    lengths = [0, 1, 9]
    q, k, v = make(batch=3, length=12)
    decay, state = decay_of(kind, q), state_of(q, v, True)
    for x in (q, k, v):
        for b, n in enumerate(lengths):
            x[b, :, n:] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"feature_map": "elu+1", "normalize": True, "form": form, "chunk_size": 4, "return_state": True}
    out, end = linear_attention(*leaves, log_decay=decay, lengths=torch.tensor(lengths), state=state, **options)
    (out.square().sum() + end.kv.square().sum()).backward()
    for b, n in enumerate(lengths):
        mine = [x.detach()[b : b + 1, :, :n].clone().requires_grad_() for x in (q, k, v)]
        mine_decay = decay if decay is None or decay.dim() == 1 else decay[b : b + 1, :, :n]
        start = LinearState(state.kv[b : b + 1], state.normaliser[b : b + 1])
        alone, last = linear_attention(*mine, log_decay=mine_decay, state=start, **options)
        (alone.square().sum() + last.kv.square().sum()).backward()
        assert error(out[b : b + 1, :, :n], alone) < 1e-12
        assert out[b, :, n:].abs().sum() == 0
        assert error(end.kv[b : b + 1], last.kv) < 1e-12
        assert error(end.normaliser[b : b + 1], last.normaliser) < 1e-12
        for x, y in zip(leaves, mine):
            assert error(x.grad[b : b + 1, :, :n], y.grad) < 1e-12
            assert x.grad[b, :, n:].abs().sum() == 0


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_row_gives_zeros(form):
    q, k, v = make()
    out = linear_attention(q.relu() * 0, k, v, normalize=True, form=form)
    assert out.abs().sum() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch,dim,value_dim", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_sizes_of_zero(form, batch, dim, value_dim):
    q, k, v = make(batch=batch, dim=dim, value_dim=value_dim)
    options = {"log_decay": -alibi_slopes(4), "form": form, "return_state": True}
    out, state = linear_attention(q, k, v, **options)
    assert out.shape == (batch, 4, 13, value_dim) and out.abs().sum() == 0
    assert state.kv.shape == (batch, 4, dim, value_dim)


def test_nothing_is_modified():
    q, k, v = make()
    decay, state, lengths = decay_of("token", q), state_of(q, v), torch.tensor([3, 13])
    before = [x.clone() for x in (q, k, v, decay, state.kv, lengths)]
    for form in FORMS:
        for log_decay in (decay, decay_of("head", q), None):
            options = {"log_decay": log_decay, "state": state, "form": form, "return_state": True}
            _, end = linear_attention(q, k, v, lengths=lengths, **options)
            end.kv.zero_()  # a returned state is the caller's own, also where there was nothing to add
            _, end = linear_attention(*(x[:, :, :0] for x in (q, k, v)), **(options | {"log_decay": None}))
            end.kv.zero_()
    for old, new in zip(before, (q, k, v, decay, state.kv, lengths)):
        assert torch.equal(old, new)


def test_decoding_keeps_one_state_of_one_size():
    q, k, v = make(length=20, dtype=torch.bfloat16)
    decay = -alibi_slopes(4)
    want, end = linear_attention(q, k, v, log_decay=decay, normalize=True, feature_map="elu+1", return_state=True)
    state = LinearState.zeros(2, 4, 5, 3, normalize=True)
    size, outs = state.nbytes, []
    for t in range(20):
        token = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = linear_attention_decode(*token, state, log_decay=decay, normalize=True, feature_map="elu+1")
        outs.append(out)
        assert state.nbytes == size == 4 * (2 * 4 * 5 * 3 + 2 * 4 * 5)
    assert error(torch.cat(outs, 2), want) < 1e-2
    assert error(state.kv, end.kv) < 1e-6


def test_state_operations():
    state = LinearState.zeros(3, 2, 4, normalize=True, dtype=torch.float64)
    state.kv[:] = torch.arange(3.0)[:, None, None, None]
    picked = state.select(torch.tensor([2, 0]))
    assert picked.kv[:, 0, 0, 0].tolist() == [2.0, 0.0] and picked.normaliser.shape == (2, 2, 4)
    assert state.to(torch.float32).kv.dtype == torch.float32
    assert not LinearState(torch.zeros(1, 1, 1, 1, requires_grad=True)).detach().kv.requires_grad


def test_half_types_accumulate_in_float32():
    ones = torch.ones(1, 1, 3000, 1, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    for form in ("chunk", "recurrent"):
        out, state = linear_attention(ones, ones, ones, form=form, return_state=True)
        assert state.kv.item() == 3000
        assert out[0, 0, -1].item() == torch.tensor(3000.0).bfloat16().item()


def test_autocast_does_not_reach_the_accumulation():
    q, k, v = (x.requires_grad_() for x in make(length=40, dtype=torch.float32))
    want = linear_attention(q, k, v, chunk_size=8)
    want_grad = torch.autograd.grad(want.square().sum(), q)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_attention(q, k, v, chunk_size=8)
        got_grad = torch.autograd.grad(got.float().square().sum(), q)[0]
    assert torch.equal(got, want)
    assert torch.equal(got_grad, want_grad)


def test_the_chunk_form_saves_its_inputs_and_nothing_else():
    """Memory of one chunk: nothing that grows with the number of chunks is kept for the backward pass."""
    q, k, v = (x.requires_grad_() for x in make(length=512, dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        chunk_fixed(q, k, v, -alibi_slopes(4), None, 16, torch.float32)
    assert {x.data_ptr() for x in saved} >= {x.data_ptr() for x in (q, k, v)}
    assert sum(x.nbytes for x in saved) == q.nbytes + k.nbytes + v.nbytes + 16


def test_the_measurement_and_the_measured_memory():
    """Beside inputs and results, the chunk form allocates the same at every length."""
    rows = measure_linear(96, num_heads=2, head_dim=8, repeats=1, scaling=(2048, 6144))
    assert [row["kind"] for row in rows] == ["speed"] * 4 + ["scaling"] * 4 + ["memory"] * 4
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows[:4])
    short_forward, long_forward, short_both, long_both = (row["extra_bytes"] for row in rows[8:])
    assert 0 < short_forward == long_forward < 1e6
    assert 0 < short_both == long_both < 1e6


@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(form):
    plain = make(length=21)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    decay = -alibi_slopes(4)
    want = linear_attention(*plain, log_decay=decay, form=form, chunk_size=8)
    assert error(linear_attention(*strided, log_decay=decay, form=form, chunk_size=8), want) < 1e-13


def test_feature_maps():
    q, k, v = make()
    by_name = linear_attention(q, k, v, feature_map="relu")
    assert torch.equal(by_name, linear_attention(q, k, v, feature_map=torch.relu))
    assert torch.equal(by_name, linear_attention(q, k, v, feature_map=("relu", torch.relu)))
    assert error(linear_attention(q, k, v, feature_map=("relu", "exp")), linear_attention(q.relu(), k.exp(), v)) < 1e-12
    wide = linear_attention(q, k, v, feature_map="symmetric_softmax", return_state=True)[1]
    assert wide.kv.shape == (2, 4, 10, 3)
    for name, feature_map in feature_maps.FEATURE_MAPS.items():
        assert feature_map(q).shape[:3] == q.shape[:3], name
    feature_maps.register("negative", torch.neg)
    try:
        assert torch.equal(linear_attention(q, k, v, feature_map="negative"), linear_attention(-q, -k, v))
        with pytest.raises(ValueError, match="not taken"):
            feature_maps.register("negative", torch.neg)
    finally:
        del feature_maps.FEATURE_MAPS["negative"]
    with pytest.raises(TypeError, match="feature_map"):
        feature_maps.register("number", 3)


def test_lightning_attention_is_linear_attention_with_slopes():
    q, k, v = make()
    slopes = alibi_slopes(4).double()
    want, end = linear_attention(q, k, v, log_decay=-slopes, return_state=True)
    got, state = lightning_attention(q, k, v, slopes[:, None, None], return_state=True)
    assert torch.equal(got, want) and torch.equal(state.kv, end.kv)
    assert torch.equal(lightning_attention(q, k, v), linear_attention(q, k, v))
    for slope in (-slopes, slopes[:3], slopes[None]):
        with pytest.raises(ValueError, match="slope"):
            lightning_attention(q, k, v, slope)


def test_decay_schedules():
    released = layer_log_decay(4, 0, 5)
    assert torch.allclose(released, -torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) * (1 + 1e-5))
    assert torch.allclose(layer_log_decay(4, 4, 5), -alibi_slopes(4) * 1e-5)
    assert torch.equal(layer_log_decay(4, 0, 1), released)
    assert torch.allclose(layer_log_decay(4, 1, 4, "paper"), -torch.tensor([2.0, 4.0, 6.0, 8.0]) * 0.75)
    for arguments in ((0, 0, 1), (4, 5, 5), (4, -1, 5), (4, 0, 0)):
        with pytest.raises(ValueError):
            layer_log_decay(*arguments)


def test_backend_tells_what_runs():
    q, k, v = make(dtype=torch.float32)
    assert linear_attention_backend(q, k, v)[:2] == ("chunk", "torch")
    assert linear_attention_backend(q[:, :, :1], k[:, :, :1], v[:, :, :1]).form == "recurrent"
    assert linear_attention_backend(q, k, v, chunk_size=7, backend="eager") == ("chunk", "eager", 7)
    eager = linear_attention(q, k, v, backend="eager", return_state=True)
    fast = linear_attention(q, k, v, return_state=True)
    assert error(fast[0], eager[0]) < 1e-5 and error(fast[1].kv, eager[1].kv) < 1e-5


def bad(**change):
    q, k, v = make()
    return {"q": q, "k": k, "v": v} | change


Q, K, V = make()
BAD = {
    "q dims": (bad(q=Q[0]), ValueError, "q: .*4 dimensions"),
    "q type": (bad(q=Q.long()), TypeError, "q: "),
    "no tensor": (bad(v=None), TypeError, "v: "),
    "dtype": (bad(k=K.float()), ValueError, "k: .*dtype of q"),
    "width": (bad(k=K[..., :2]), ValueError, "k: .*width of q"),
    "heads": (bad(k=K[:, :1].repeat(1, 3, 1, 1), v=V[:, :1].repeat(1, 3, 1, 1)), ValueError, "k: .*divides"),
    "v length": (bad(v=V[:, :, 1:]), ValueError, "v: .*length of k"),
    "batch": (bad(v=V[:1]), ValueError, "v: .*batch"),
    "causal lengths": (bad(k=K[:, :, 1:], v=V[:, :, 1:]), ValueError, "k: 12 tokens|k: got '12 tokens'"),
    "decay shape": (bad(log_decay=-torch.ones(3)), ValueError, "log_decay: .*shape"),
    "decay sign": (bad(log_decay=torch.tensor([0.1, -1, -1, -1])), ValueError, "log_decay: .*<= 0"),
    "decay nan": (bad(log_decay=torch.full((4,), float("nan"))), ValueError, "log_decay: .*<= 0"),
    "decay without order": (bad(log_decay=-torch.ones(4), causal=False), ValueError, "log_decay: .*causal"),
    "decay channels": (bad(log_decay=-torch.ones(2, 4, 13, 2)), ValueError, "log_decay: .*channel"),
    "form": (bad(form="chunks"), ValueError, "form: .*chunk"),
    "backend": (bad(backend="cuda"), ValueError, "backend: "),
    "chunk": (bad(chunk_size=0), ValueError, "chunk_size: "),
    "lengths dtype": (bad(lengths=torch.ones(2)), TypeError, "lengths: "),
    "lengths shape": (bad(lengths=torch.ones(3).long()), ValueError, "lengths: "),
    "lengths range": (bad(lengths=torch.tensor([1, 14])), ValueError, "lengths: .*0 to 13"),
    "state type": (bad(state=torch.zeros(2, 4, 5, 3)), TypeError, "state: "),
    "state shape": (bad(state=LinearState.zeros(2, 4, 5, 4)), ValueError, "state.kv: "),
    "state normaliser": (bad(state=LinearState.zeros(2, 4, 5, 3), normalize=True), ValueError, "state.normaliser: "),
    "feature name": (bad(feature_map="rellu"), ValueError, "feature_map: .*relu"),
    "feature type": (bad(feature_map=3), TypeError, "feature_map: "),
    "feature shape": (bad(feature_map=lambda x: x.sum(2)), ValueError, "feature_map"),
    "feature widths": (bad(feature_map=("relu", "symmetric_softmax")), ValueError, "feature_map: .*width"),
    "scale": (bad(scale="large"), TypeError, "scale: "),
    "flag": (bad(normalize=1), TypeError, "normalize: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        linear_attention(**arguments)


def test_bad_states_are_named():
    with pytest.raises(ValueError, match=r"state.normaliser: .*\(1, 2, 3\)"):
        LinearState(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="head_dim"):
        LinearState.zeros(1, 2, -3)
    q, k, v = make(length=2)
    with pytest.raises(ValueError, match="one token"):
        linear_attention_decode(q, k, v, state_of(q, v))
    with pytest.raises(TypeError, match="state: .*LinearState"):
        linear_attention_decode(q[:, :, :1], k[:, :, :1], v[:, :, :1], None)
