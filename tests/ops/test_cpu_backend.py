"""The blocked CPU backend: its pieces, gradients, memory, what it keeps between calls, and the products it borrows."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regard import masks, ops, scores
from regard.bench.timing import peak_bytes
from regard.ops import Selection
from regard.ops.attention import _check
from regard.ops.backends import cpu, cpu_products
from regard.ops.backends.cpu_pieces import Gather, Slice

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def inputs(batch=2, heads=4, kv_heads=2, q_len=150, kv_len=200, dim=12, value_dim=20, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def selection_of(batch, heads, q_len, kv_len, block_q, block_k, share=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-q_len // block_q), -(-kv_len // block_k))
    kept = torch.rand(shape, generator=generator) < share
    return Selection.from_block_map(kept, block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len)


def work_of(q, k, v, **options):
    defaults = dict(mask=None, score_mod=None, bias=None, selection=None, q_offset=None, scale=None, dropout=0.0)
    request = _check(q, k, v, *{**defaults, **options, "return_lse": False}.values())
    return cpu._work(request)


def compare(tensors, extra=(), **options):
    """Output, lse and all gradients, one through the lse included, against float64 eager; `extra`: tensors that options read."""
    dtype = tensors[0].dtype
    found = []
    for backend, kind in (("cpu", dtype), ("eager", torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in tensors]
        out, lse = ops.attention(*leaves, return_lse=True, backend=backend, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        value = (out.double() * weight).sum() + (finite.double() * 0.3).sum()
        grads = torch.autograd.grad(value, [*leaves, *extra], materialize_grads=True)
        found.append([out, lse, *grads])
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv", "extra 1", "extra 2"), *found):
        assert not got.isnan().any(), name
        finite = want.detach()[want.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 1.0
        torch.testing.assert_close(
            got.double(),
            want.double(),
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * max(1.0, size),
            msg=lambda m, n=name: f"{n}: {m}",
        )


WIDE = {
    "causal": masks.causal,
    "window": masks.sliding_window(70) & masks.causal,
    "sinks": (masks.sliding_window(40) | masks.sink(5)) & masks.causal,
    "documents": masks.document(torch.arange(200) // 45) & masks.causal,
    "lengths": masks.padding(torch.tensor([90, 200])) & masks.causal,
    "per head": masks.per_head([masks.causal, masks.causal, masks.block(64), masks.sink(3)]),
    "sharded": masks.head_sharded(4, 16, 2, 3),
    "dilated": masks.dilated(3),
    "nothing": masks.sink(0),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_several_blocks(name, dtype):
    compare(inputs(dtype=dtype), mask=WIDE[name])


@pytest.mark.parametrize("products", ["torch", "auto"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_kinds_of_products(products, kv_heads, monkeypatch):
    if products == "torch":
        monkeypatch.setattr(cpu_products, "onednn_is_better", lambda: False)
        monkeypatch.setattr(cpu, "onednn_is_better", lambda: False)
    cpu._work_of.clear()
    tensors = inputs(kv_heads=kv_heads, dtype=torch.float32)
    compare(tensors, mask=masks.sliding_window(70) & masks.causal)
    compare(tensors, mask=(masks.sliding_window(40) | masks.sink(5)) & masks.causal)
    compare(tensors, selection=selection_of(1, 4, 150, 200, 16, 16), mask=masks.causal)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    blocks=st.sampled_from([(8, 8), (5, 7), (1, 1), (4, 1), (16, 4), (64, 64)]),
    heads=st.sampled_from([(4, 2), (4, 4), (3, 1), (1, 1)]),
    lengths=st.sampled_from([(37, 50), (64, 64), (1, 50), (50, 37), (40, 1)]),
    own=st.sampled_from(["shared", "by batch", "by kv head", "by head"]),
    share=st.sampled_from([0.0, 0.2, 0.8]),
    extras=st.booleans(),
)
def test_selections_with_everything(blocks, heads, lengths, own, share, extras):
    of = {"shared": (1, 1), "by batch": (2, 1), "by kv head": (2, heads[1]), "by head": (1, heads[0])}[own]
    options = {"selection": selection_of(*of, *lengths, *blocks, share=share)}
    extra = []
    if extras:
        bias = torch.randn(1, heads[0], 1, lengths[1], dtype=torch.float64, requires_grad=True)
        table = torch.randn(heads[0], 7, dtype=torch.float64, requires_grad=True)
        extra = [bias, table]
        mod = scores.relative_bias(table) >> scores.soft_cap(2.0)
        options |= {"mask": masks.sliding_window(30) & masks.causal, "bias": bias, "score_mod": mod}
    compare(inputs(2, *heads, *lengths, dim=6, value_dim=5), extra, **options)


@pytest.mark.parametrize("name", ["dilated", "per head", "documents", "sharded"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 200), (1, 4, 150, 1), (1, 1, 150, 200), (2, 4, 150, 200)])
def test_mask_asked_while_running_and_shapes_of_bias(name, shape, monkeypatch):
    """More distinct tiles than are kept: the same numbers; and a bias over every choice of axes gets its gradient."""
    monkeypatch.setattr(cpu, "_MAX_TILES", 0)
    cpu._work_of.clear()
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    work = work_of(*inputs(), mask=WIDE[name])
    assert any(piece.ask_mask for piece in work.pieces)
    compare(inputs(), [bias], mask=WIDE[name], bias=bias)
    compare(inputs(), [bias], mask=WIDE[name], bias=bias, selection=selection_of(1, 4, 150, 200, 16, 16))
    cpu._work_of.clear()


def test_pieces_are_what_they_should_be():
    """Adjacent keys are read in place and skipped keys are not read at all."""
    q, k, v = inputs(1, 4, 4, 1024, 1024, 8, 8)
    window = work_of(q, k, v, mask=masks.sliding_window(128) & masks.causal).pieces
    assert all(isinstance(piece, Slice) and len(piece.runs) == 1 for piece in window)
    assert max(piece.shape[3] for piece in window) == 192
    sinks = work_of(q, k, v, mask=(masks.sliding_window(128) | masks.sink(4)) & masks.causal).pieces
    assert max(len(piece.runs) for piece in sinks) == 2
    selection = selection_of(1, 4, 1024, 1024, 64, 64)
    random = work_of(q, k, v, selection=selection).pieces
    assert all(isinstance(piece, Gather) for piece in random)
    pairs = sum(n * g * r * w for n, g, r, w in (piece.shape for piece in random))
    assert pairs == selection.materialize().sum()
    chunk = work_of(q[:, :, -64:], k, v, mask=masks.causal).pieces  # one chunk of a prefill
    assert sum(n * g * r * w for n, g, r, w in (piece.shape for piece in chunk)) == 4 * 64 * 1024


@pytest.mark.parametrize("block_q, block_k", [(1, 1), (4, 2)])
def test_gradcheck_of_gathered_blocks(block_q, block_k):
    leaves = [t.requires_grad_() for t in inputs(1, 4, 2, 7, 9, 3, 2)]
    bias = torch.randn(1, 4, 1, 9, dtype=torch.float64, requires_grad=True)
    table = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    selection = selection_of(1, 4, 7, 9, block_q, block_k, share=0.5)

    def run(q, k, v, bias, table):
        mod = scores.relative_bias(table) >> scores.soft_cap(3.0)
        out, lse = ops.attention(
            q, k, v, selection=selection, bias=bias, score_mod=mod, return_lse=True, backend="cpu", scale=0.9
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, [*leaves, bias, table])


@pytest.mark.parametrize("sparse", [False, True])
def test_dropout_is_the_same_on_the_way_back(sparse):
    leaves = [t.requires_grad_() for t in inputs(1, 2, 1, 6, 8, 3, 2)]
    selection = selection_of(1, 2, 6, 8, 2, 2, share=0.6) if sparse else None

    def run(*tensors):
        torch.manual_seed(3)
        return ops.attention(*tensors, dropout=0.4, selection=selection, backend="cpu")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.equal(run(*leaves), run(*leaves))
    torch.manual_seed(4)
    assert not torch.equal(run(*leaves), ops.attention(*leaves, dropout=0.4, selection=selection, backend="cpu"))


def test_only_what_is_asked_for_gets_a_gradient():
    q, k, v = inputs()
    for number in range(3):
        leaves = [t.detach().requires_grad_(i == number) for i, t in enumerate((q, k, v))]
        ops.attention(*leaves, mask=masks.causal, backend="cpu").sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == number for i in range(3)]
    assert ops.attention(q, k, v, mask=masks.causal, backend="cpu").grad_fn is None


def test_score_mods_that_read_trained_tensors():
    q, k, v = inputs()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def mod(score, b, h, q_idx, kv_idx):
        return score + (2 * weight)[h] * (kv_idx % 3)

    with pytest.raises(ValueError, match=r"backend: got 'cpu'.*does not name"):
        ops.attention(q, k, v, score_mod=mod, backend="cpu")
    assert ops.attention_backend(q, k, v, score_mod=mod) == "eager"
    with torch.no_grad():
        ops.attention(q, k, v, score_mod=mod, backend="cpu")
    named = scores.from_function(mod, weight)
    compare([q, k, v], [weight], score_mod=named)
    hidden = 3 * weight  # not a leaf: the graph behind it goes on
    inner = scores.from_function(lambda score, b, h, q_idx, kv_idx: score * hidden[h], hidden)
    out = ops.attention(q, k, v, score_mod=inner, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), [weight], retain_graph=True)
    want = torch.autograd.grad(
        ops.attention(q, k, v, score_mod=inner, backend="eager").square().sum(), [weight], retain_graph=True
    )[0]
    torch.testing.assert_close(grad, want)


def test_score_mods_that_ignore_or_forbid():
    compare(inputs(), score_mod=lambda score, b, h, q_idx, kv_idx: (q_idx - kv_idx).to(score.dtype) / 10)
    forbid = lambda score, b, h, q_idx, kv_idx: torch.where((q_idx % 5 == 0) | (kv_idx > 90), -torch.inf, score)  # noqa: E731
    compare(inputs(), score_mod=forbid)
    compare(inputs(), score_mod=forbid, mask=masks.sliding_window(50) & masks.causal)


def test_layouts_autocast_and_inference():
    q, k, v = inputs(dtype=torch.float32)
    want = ops.attention(q, k, v, mask=masks.causal, backend="cpu")
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # (B, N, H, D) in memory
    torch.testing.assert_close(ops.attention(*turned, mask=masks.causal, backend="cpu"), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.attention(q, k, v, mask=masks.causal, backend="cpu"), want)
    with torch.inference_mode():
        selection = selection_of(1, 1, 150, 200, 64, 64, share=1.0)
        torch.testing.assert_close(
            ops.attention(q, k, v, mask=masks.causal, selection=selection, backend="cpu"), want, rtol=1e-5, atol=1e-6
        )


def test_memory_does_not_grow_with_the_square():
    q, k, v = (t.requires_grad_() for t in inputs(1, 4, 4, 4096, 4096, 32, 32, torch.float32))
    size = q.numel() * q.element_size()
    mask = masks.sliding_window(256) & masks.causal
    selection = selection_of(1, 4, 4096, 4096, 64, 64, share=0.1)

    def step(**options):
        out = ops.attention(q, k, v, backend="cpu", **options)
        return out.detach(), torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    for options in ({"mask": mask}, {"mask": masks.causal}, {"selection": selection}):
        step(**options)
        peak, kept = peak_bytes(lambda options=options: step(**options))
        assert peak - kept < 12 * size < 4 * 4096 * 4096, (options, (peak - kept) / size)


def test_plans_are_kept_for_what_cannot_change_only():
    q, k, v = inputs(dtype=torch.float32)
    window = masks.sliding_window(70) & masks.causal
    assert work_of(q, k, v, mask=window) is work_of(q, k, v, mask=window)
    assert work_of(q, k, v, mask=window) is not work_of(q, k, v, mask=window, q_offset=3)
    ids = torch.arange(200) // 45
    documents = masks.document(ids)
    before = ops.attention(q, k, v, mask=documents, backend="cpu")
    ids.zero_()
    after = ops.attention(q, k, v, mask=documents, backend="cpu")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, ops.attention(q, k, v), rtol=1e-5, atol=1e-5)
    selection = selection_of(1, 1, 150, 200, 64, 64, share=1.0)
    full = ops.attention(q, k, v, selection=selection, backend="cpu")
    selection.indices[..., 1:] = -1
    assert not torch.equal(full, ops.attention(q, k, v, selection=selection, backend="cpu"))


def test_what_is_kept_goes_with_its_mask_or_selection():
    q, k, v = inputs()
    mask, selection = masks.sliding_window(30) & masks.causal, selection_of(1, 1, 150, 200, 16, 16)
    ops.attention(q, k, v, mask=mask, backend="cpu")
    ops.attention(q, k, v, mask=mask, selection=selection, backend="cpu")
    gone = [weakref.ref(mask), weakref.ref(selection)]
    del mask, selection
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_products_leave_no_trace():
    """The permission that products are given is taken back, also after an error and by the last of concurrent calls."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="stop"), cpu_products.fast_products(torch.float32):
        raise RuntimeError("stop")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    q, k, v = inputs(dtype=torch.float32)
    want = ops.attention(q, k, v, mask=masks.causal, backend="cpu")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ops.attention(q, k, v, mask=masks.causal, backend="cpu")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and torch.backends.mkldnn.matmul.fp32_precision == before
    for got in found:
        torch.testing.assert_close(got, want)


def test_products_can_be_left_to_torch(monkeypatch):
    monkeypatch.setenv("REGARD_CPU_PRODUCTS", "torch")
    cpu_products.onednn_is_better.cache_clear()
    try:
        assert cpu_products.onednn_is_better() is False
    finally:
        cpu_products.onednn_is_better.cache_clear()


def test_gradients_of_gradients():
    """By the reference, so they are there; not under dropout, whose noise is not kept."""
    leaves = [t.requires_grad_() for t in inputs(1, 2, 1, 5, 6, 3, 2)]
    table = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, table):
        out, lse = ops.attention(
            q, k, v, mask=masks.causal, score_mod=scores.relative_bias(table), return_lse=True, backend="cpu"
        )
        return out, lse

    assert torch.autograd.gradgradcheck(run, [*leaves, table])
    out = ops.attention(*leaves, dropout=0.2, backend="cpu")
    with pytest.raises(RuntimeError, match="create_graph=True with dropout"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)
