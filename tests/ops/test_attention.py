"""`attention()`: every backend gives the numbers of the float64 reference, over shapes, dtypes, masks and selections."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regard import masks, ops, scores
from regard.ops import Selection, reference

BACKENDS = ("auto", "sdpa", "cpu", "eager")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def inputs(seed, batch, num_heads, num_kv_heads, q_len, kv_len, dim, value_dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, num_heads, q_len, dim),
        (batch, num_kv_heads, kv_len, dim),
        (batch, num_kv_heads, kv_len, value_dim),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def spec(q, k, v, *, mask=None, score_mod=None, bias=None, selection=None, q_offset=None, scale=None):
    """The definition, in float64, on what the half types hold."""
    q, k, v = (t.double() for t in (q, k, v))
    bias = None if bias is None else bias.double()
    return reference.attention(
        q, k, v, mask=None if mask is None else masks.as_mask(mask), score_mod=score_mod, bias=bias, selection=selection,
        q_offset=k.shape[2] - q.shape[2] if q_offset is None else q_offset,
        scale=q.shape[3] ** -0.5 if scale is None else scale, return_lse=True,
    )  # fmt: skip


def a_mask(kind, batch, num_heads, q_len, kv_len):
    """One of many masks that fit the sizes."""
    rows = torch.arange(batch)
    made = {
        "none": None,
        "causal": masks.causal,
        "window": masks.sliding_window(5) & masks.causal,
        "both sides": masks.sliding_window(4),
        "sinks": (masks.sliding_window(3) | masks.sink(2)) & masks.causal,
        "dilated": masks.dilated(3, window=4) & masks.causal,
        "prefix": masks.prefix(4) | masks.causal,
        "prefix by row": masks.prefix(rows * 3) | masks.causal,
        "block": masks.block(6),
        "not block": ~masks.block(6),
        "lengths": masks.padding((kv_len - 2 * rows).clamp(min=0)),
        "left padding": masks.padding(start=rows * 2) & masks.causal,
        "document": masks.document(torch.arange(max(1, kv_len)) // 7) & masks.causal,
        "document by row": masks.document(torch.arange(max(1, kv_len))[None] // (4 + rows[:, None])),
        "per head": masks.per_head([masks.causal if h % 2 else masks.sink(3) for h in range(num_heads)]),
        "sharded": masks.head_sharded(num_heads, 4, 1, 3),
        "nothing": masks.padding(torch.zeros(batch, dtype=torch.long)),
        "function": lambda b, h, q, kv: (q + 2 * kv + h) % 3 != b % 2,
        "tensor": torch.arange(q_len)[:, None] * 5 % 7 != torch.arange(kv_len) % 4,
    }
    return made[kind]


MASKS = ("none", "causal", "window", "both sides", "sinks", "dilated", "prefix", "prefix by row", "block", "not block", "lengths",
         "left padding", "document", "document by row", "per head", "sharded", "nothing", "function", "tensor")  # fmt: skip


@st.composite
def sizes(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (3, 3)]))
    length = st.sampled_from([0, 1, 2, 7, 17, 33, 64, 65])
    return (
        draw(st.integers(1, 3)),
        kv_heads * group,
        kv_heads,
        draw(length),
        draw(length),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
    )


def forced(q, k, v, backend, **options):
    """Run a backend, or say that it refuses (its reason is an error that names it)."""
    try:
        return ops.attention(q, k, v, backend=backend, **options)
    except ValueError as error:
        assert "backend" in str(error) and backend in str(error), error
        return None


@QUICK
@given(
    sizes(), st.sampled_from(MASKS), st.sampled_from(BACKENDS), st.sampled_from(list(TOLERANCE)), st.integers(0, 999)
)
def test_masks_and_dtypes(size, kind, backend, dtype, seed):
    q, k, v = inputs(seed, *size, dtype)
    mask = a_mask(kind, size[0], size[1], size[3], size[4])
    kept = [t.clone() for t in (q, k, v)]
    out = forced(q, k, v, backend, mask=mask)
    if out is None:
        return
    want, _ = spec(q, k, v, mask=mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v)))


@QUICK
@given(sizes(), st.sampled_from(MASKS), st.sampled_from(["auto", "cpu"]), st.integers(0, 999))
def test_gradients_and_lse(size, kind, backend, seed):
    mask = a_mask(kind, size[0], size[1], size[3], size[4])
    found = []
    for run in (lambda *t: forced(*t, backend, mask=mask, return_lse=True), lambda *t: spec(*t, mask=mask)):
        leaves = [t.requires_grad_() for t in inputs(seed, *size)]
        result = run(*leaves)
        if result is None:
            return
        out, lse = result
        weight = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float64)[: out.numel()].view_as(out)
        (out * weight).sum().add(lse.masked_fill(lse == -torch.inf, 0.0).sum() * 0.3).backward()
        found.append([out, lse, *(leaf.grad for leaf in leaves)])
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *found):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert not got.isnan().any()


MODS = {
    "alibi": lambda heads: scores.alibi(heads),
    "soft cap": lambda heads: scores.soft_cap(2.0),
    "temperature": lambda heads: scores.temperature(torch.linspace(0.5, 2, heads)),
    "relative": lambda heads: scores.relative_bias(torch.linspace(-1, 1, heads * 9).view(heads, 9)),
    "composed": lambda heads: scores.temperature(1.5) >> scores.soft_cap(3.0) >> scores.alibi(heads),
}


@QUICK
@given(
    sizes(),
    st.sampled_from(list(MODS)),
    st.sampled_from(["causal", "none", "sinks"]),
    st.sampled_from(["auto", "cpu"]),
    st.booleans(),
)
def test_score_mods_and_bias(size, name, kind, backend, with_bias):
    q, k, v = inputs(3, *size)
    mask, mod = a_mask(kind, size[0], size[1], size[3], size[4]), MODS[name](size[1])
    bias = None
    if with_bias:
        bias = torch.randn(
            size[0], 1, size[3], size[4], dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        )
        bias = bias.masked_fill(bias > 1.5, -torch.inf)
    out = forced(q, k, v, backend, mask=mask, score_mod=mod, bias=bias, scale=0.7)
    if out is not None:
        torch.testing.assert_close(
            out, spec(q, k, v, mask=mask, score_mod=mod, bias=bias, scale=0.7)[0], rtol=1e-10, atol=1e-10
        )


@QUICK
@given(st.sampled_from([(1, 1), (4, 8), (16, 16), (32, 2)]), st.sampled_from([1, 2, 4]), st.sampled_from(["none", "causal", "lengths"]),
       st.sampled_from(["auto", "cpu", "sdpa"]), st.integers(0, 99))  # fmt: skip
def test_selections(blocks, heads, kind, backend, seed):
    q_len, kv_len = 45, 70
    size = (2, 4, 2, q_len, kv_len, 8, 6)
    generator = torch.Generator().manual_seed(seed)
    num_q, num_k = -(-q_len // blocks[0]), -(-kv_len // blocks[1])
    block_map = torch.rand(2, heads, num_q, num_k, generator=generator) < 0.3
    selection = Selection.from_block_map(block_map, block_q=blocks[0], block_k=blocks[1], q_len=q_len, kv_len=kv_len)
    mask = a_mask(kind, 2, 4, q_len, kv_len)
    found = []
    for run in (
        lambda *t: forced(*t, backend, mask=mask, selection=selection),
        lambda *t: spec(*t, mask=mask, selection=selection)[0],
    ):
        leaves = [t.requires_grad_() for t in inputs(seed, *size)]
        out = run(*leaves)
        if out is None:
            return
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("kind", ["causal", "sinks", "nothing", "document", "per head"])
def test_gradcheck(backend, kind):
    leaves = [t.requires_grad_() for t in inputs(0, 1, 4, 2, 6, 9, 3, 2)]
    mask = a_mask(kind, 1, 4, 6, 9)

    def run(*t):
        out, lse = ops.attention(*t, mask=mask, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradients_reach_bias_and_tables(backend):
    q, k, v = inputs(1, 1, 2, 1, 20, 20, 4, 4)
    found = []
    for name in ("eager", backend):
        bias = torch.randn(
            1, 2, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        ).requires_grad_()
        table = torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 7).requires_grad_()
        out = ops.attention(q, k, v, mask=masks.causal, bias=bias, score_mod=scores.relative_bias(table), backend=name)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((bias.grad, table.grad))
    for got, want in zip(found[1], found[0]):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_limits():
    """Window as long as the context is causal; sinks over everything are dense; temperature 1 changes nothing."""
    q, k, v = inputs(0, 2, 4, 2, 40, 40, 8, 8)
    causal = ops.attention(q, k, v, mask=masks.causal)
    torch.testing.assert_close(ops.attention(q, k, v, mask=masks.sliding_window(40) & masks.causal), causal)
    torch.testing.assert_close(ops.attention(q, k, v, mask=masks.sink(40)), ops.attention(q, k, v))
    torch.testing.assert_close(ops.attention(q, k, v, mask=masks.causal, score_mod=scores.temperature(1.0)), causal)
    torch.testing.assert_close(ops.attention(q[:, :, -5:], k, v, mask=masks.causal), causal[:, :, -5:])
    torch.testing.assert_close(ops.attention(q[:, :, :7], k, v, mask=masks.causal, q_offset=0), causal[:, :, :7])


def test_merging_parts_is_attention_over_their_union():
    q, k, v = inputs(0, 2, 4, 2, 30, 50, 8, 6)
    parts = [slice(0, 3), slice(3, 20), slice(20, 50)]
    outs, lses = zip(*(ops.attention(q, k[:, :, p], v[:, :, p], return_lse=True) for p in parts))
    out, lse = ops.merge_lse(list(outs), list(lses))
    want = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want[1])
    empty = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    torch.testing.assert_close(ops.merge_lse([*outs, empty[0]], [*lses, empty[1]])[0], want[0])


def test_batch_mates_and_padding_do_not_matter():
    q, k, v = inputs(0, 3, 4, 2, 24, 24, 8, 8, torch.float32)
    lengths = torch.tensor([24, 10, 17])
    out = ops.attention(q, k, v, mask=masks.padding(lengths) & masks.causal)
    for row, length in enumerate(lengths.tolist()):
        alone = ops.attention(
            q[row : row + 1, :, :length], k[row : row + 1, :, :length], v[row : row + 1, :, :length], mask=masks.causal
        )
        torch.testing.assert_close(out[row : row + 1, :, :length], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu"])
def test_dropout_keeps_the_mean(backend):
    torch.manual_seed(0)
    q, k, v = inputs(0, 1, 2, 2, 8, 64, 8, 4, torch.float32)
    runs = torch.stack([ops.attention(q, k, v, dropout=0.3, backend=backend) for _ in range(400)])
    want = ops.attention(q, k, v)
    assert (runs.mean(0) - want).abs().max() < 0.12
    assert (runs[0] - runs[1]).abs().max() > 1e-3


def test_long_inputs_take_the_blocked_path_and_agree():
    q, k, v = inputs(0, 1, 2, 1, 2048, 2048, 16, 16, torch.float32)
    mask = (masks.sliding_window(128) | masks.sink(4)) & masks.causal
    assert ops.attention_backend(q, k, v, mask=mask) == "cpu"
    torch.testing.assert_close(
        ops.attention(q, k, v, mask=mask).double(), spec(q, k, v, mask=mask)[0], rtol=1e-5, atol=1e-5
    )
    assert ops.attention_backend(q, k, v) == "sdpa" == ops.attention_backend(q, k, v, mask=masks.causal)


BAD = [
    (lambda q, k, v: ops.attention(q[0], k, v), "q: got 'shape"),
    (lambda q, k, v: ops.attention(q.long(), k, v), "q: got dtype, need a floating"),
    (lambda q, k, v: ops.attention(q, k.half(), v), "k: got torch.float16, need q's dtype torch.float64"),
    (lambda q, k, v: ops.attention(q, k[..., :3], v), "k: got 'head_dim 3', need q's head_dim 8"),
    (lambda q, k, v: ops.attention(q, k[:1], v), "k: got 'batch 1'"),
    (lambda q, k, v: ops.attention(q[:, :3], k, v), "k: got '2 kv heads', need a divisor of q's 3 heads"),
    (lambda q, k, v: ops.attention(q, k, v[:, :, :3]), "v: got 'shape"),
    (lambda q, k, v: ops.attention(q, k, v, mask=torch.ones(3, 3, dtype=torch.bool)), "mask: got 'shape (3, 3)'"),
    (lambda q, k, v: ops.attention(q, k, v, mask=torch.ones(5, 6)), "mask: got torch.float32, need a bool tensor"),
    (lambda q, k, v: ops.attention(q, k, v, mask="causal"), "mask: got str"),
    (lambda q, k, v: ops.attention(q, k, v, bias=torch.ones(7)), "bias: got 'shape (7,)'"),
    (lambda q, k, v: ops.attention(q, k, v, dropout=1.0), "dropout: got 1.0"),
    (lambda q, k, v: ops.attention(q, k, v, selection=3), "selection: got int"),
    (lambda q, k, v: ops.attention(q, k, v, backend="cuda"), "backend: unknown name 'cuda'"),
    (lambda q, k, v: ops.attention(q, k, v, score_mod=scores.soft_cap(1), backend="sdpa"), "backend: got 'sdpa'"),
    (lambda q, k, v: ops.attention_backend(q, k, v, masks=None), "unknown name 'masks'; did you mean mask"),
]


@pytest.mark.parametrize("call, message", BAD, ids=range(len(BAD)))
def test_bad_input(call, message):
    q, k, v = inputs(0, 2, 4, 2, 5, 6, 8, 8)
    with pytest.raises((ValueError, TypeError)) as caught:
        call(q, k, v)
    assert message in str(caught.value), str(caught.value)
