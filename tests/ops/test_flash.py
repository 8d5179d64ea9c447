"""FlashAttention in tiles (forward, backward, traffic), its conventions, packed sequences, interval masks, the butterfly."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_masks import rebuilt

from regard import masks, scores
from regard.ops import (
    Selection,
    TileTraffic,
    attention,
    attention_varlen,
    flash_attention,
    flash_tiles,
    make_plan,
    merge_lse,
    reference,
    tiled_attention,
)
from regard.ops.select import butterfly

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def qkv(q_len=13, kv_len=17, heads=4, kv_heads=2, dim=4, value_dim=6, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, value_dim))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@QUICK
@given(
    st.sampled_from([(1, 1), (4, 3), (5, 8), (64, 64), (16, 2)]),
    st.sampled_from(["released", "paper"]),
    st.sampled_from(["none", "causal", "window", "padding"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 20),
)
def test_tiles_do_not_change_the_numbers(blocks, variant, kind, modded, biased, q_len):
    inputs = [x.requires_grad_() for x in qkv(q_len)]
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 1, 17, dtype=torch.float64, requires_grad=True)
    options = {"mask": {"none": None, "causal": masks.causal, "window": masks.window(3, 1) & masks.sink(15),
                        "padding": masks.padding(torch.tensor([0, 9]))}[kind]}  # fmt: skip
    leaves = list(inputs)
    if modded:
        options["score_mod"] = scores.soft_cap(2.0) >> scores.alibi(slopes)
        leaves.append(slopes)
    if biased:
        options["bias"] = bias
        leaves.append(bias)
    results = []
    for run in (
        lambda: reference.flash_attention(*inputs, block_q=blocks[0], block_k=blocks[1], variant=variant, return_lse=True, **options),
        lambda: attention(*inputs, return_lse=True, backend="eager", **options),
    ):  # fmt: skip
        out, lse = run()
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        grads = torch.autograd.grad(out.sin().sum() + finite.cos().sum(), leaves, allow_unused=True)
        results.append((out, lse, *(torch.zeros(()) if g is None else g for g in grads)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want.to(got.dtype).expand_as(got), rtol=1e-10, atol=1e-11)


def test_gradcheck_of_the_tiled_backward():
    q, k, v = (x.requires_grad_() for x in qkv(4, 5, heads=2, kv_heads=1, dim=2, value_dim=2, batch=1))
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def op(q, k, v, slopes):
        mod = scores.alibi(slopes) >> scores.soft_cap(1.5)
        return tiled_attention(q, k, v, block_q=3, block_k=2, mask=masks.causal, score_mod=mod, return_lse=True)

    assert torch.autograd.gradcheck(op, (q, k, v, slopes))


def test_extreme_scores_and_half_types():
    q, k, v = qkv()
    out, lse = tiled_attention(1e4 * q, k, v, block_q=4, block_k=4, return_lse=True)
    exact = attention(1e4 * q, k, v, return_lse=True, backend="eager")
    torch.testing.assert_close((out, lse), exact)
    half = tiled_attention(*(x.bfloat16() for x in (q, k, v)), block_q=4, block_k=4, return_lse=True)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32


def test_dropout_is_drawn_again_in_the_backward_pass():
    q, k, v = (x.requires_grad_() for x in qkv(32, 32))
    torch.manual_seed(0)
    dropped = torch.ones(2, 4, 32, 32, dtype=torch.bool)
    dropped[..., ::3] = False
    given = tiled_attention(q, k, v, block_q=8, block_k=8, dropout=0.25, dropout_mask=dropped)
    grouped = reference.attention_scores(q, k, q_offset=0, scale=0.5).softmax(-1) * dropped / 0.75
    torch.testing.assert_close(given, reference.weighted_values(grouped, v))
    torch.manual_seed(0)
    op = lambda v: tiled_attention(q, k, v, block_q=8, block_k=8, dropout=0.5)  # noqa: E731
    # linear in v: if backward drew another mask, the product of gradient and v would not be the output's sum
    state = torch.random.get_rng_state()
    out = op(v)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())
    torch.random.set_rng_state(state)
    assert torch.equal(op(v), out) and not torch.equal(op(v), out)


def test_block_sparse_is_the_block_mask():
    q, k, v = qkv(20, 20)
    kept = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    selection = Selection.from_block_map(kept, block_q=4, block_k=4, q_len=20, kv_len=20)
    traffic = TileTraffic()
    sparse = tiled_attention(q, k, v, block_mask=selection, mask=masks.causal, traffic=traffic)
    torch.testing.assert_close(sparse, attention(q, k, v, selection=selection, mask=masks.causal, backend="eager"))
    assert traffic.tiles == int(kept.any(1).sum())
    everything = Selection.from_block_map(torch.ones_like(kept), block_q=4, block_k=4, q_len=20, kv_len=20)
    torch.testing.assert_close(tiled_attention(q, k, v, block_mask=everything), tiled_attention(q, k, v))
    halves = [tiled_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 7), slice(7, 20))]
    torch.testing.assert_close(merge_lse(*zip(*halves))[0], tiled_attention(q, k, v))


def test_what_is_moved():
    n, d = 24, 4
    q, k, v = (x.requires_grad_() for x in qkv(n, n, heads=1, kv_heads=1, dim=d, value_dim=d, batch=1))
    block_q, block_k = 4, 6
    for variant in ("paper", "released"):
        traffic = TileTraffic()
        out = tiled_attention(q, k, v, block_q=block_q, block_k=block_k, variant=variant, traffic=traffic)
        row_tiles, column_tiles = n // block_q, n // block_k
        if variant == "paper":  # keys once; queries, outputs and statistics for each key tile
            assert traffic.forward_reads == {
                "k": n * d, "v": n * d, "q": column_tiles * n * d, "out": column_tiles * n * d,
                "statistics": column_tiles * 2 * n,
            }  # fmt: skip
            assert traffic.forward_writes == {"out": column_tiles * n * d, "statistics": column_tiles * 2 * n}
        else:  # queries and outputs once; keys for each query tile
            assert traffic.forward_reads == {"q": n * d, "k": row_tiles * n * d, "v": row_tiles * n * d}
            assert traffic.forward_writes == {"out": n * d, "lse": n}
        assert traffic.tiles == row_tiles * column_tiles and traffic.backward == 0
        out.sum().backward()
        assert traffic.backward_reads["q"] == column_tiles * n * d and traffic.backward_writes["dk"] == n * d
        assert traffic.backward > traffic.forward_reads["k"]


def test_traffic_goes_with_n_squared_d_squared_over_the_fast_memory():
    def moved(n, d, sram):
        traffic = TileTraffic()
        q, k, v = qkv(n, n, heads=1, kv_heads=1, dim=d, value_dim=d, batch=1)
        tiled_attention(q, k, v, sram=sram, variant="paper", traffic=traffic)
        return traffic.forward

    assert flash_tiles(1024, 16) == (16, 16) and flash_tiles(256, 16) == (4, 4) and flash_tiles(4096, 16) == (16, 64)
    base = moved(256, 16, 1024)
    assert moved(512, 16, 1024) / base == pytest.approx(4, rel=0.1)
    assert moved(256, 16, 2048) / base == pytest.approx(0.5, rel=0.1)
    assert moved(256, 32, 2048) / base == pytest.approx(2, rel=0.15)  # d^2 / sram


@QUICK
@given(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans(), st.sampled_from([(8, 8), (5, 7), (1, 1)]))
def test_interval_masks_and_their_plans(left, right, batched, one_sided, blocks):
    generator = torch.Generator().manual_seed(left * 10 + right)
    first = torch.randint(-3, 20, (2, 23) if batched else (23,), generator=generator)
    last = first + torch.randint(-2, 12, first.shape, generator=generator)
    for mask in (masks.intervals(first, last), masks.window(left, None if one_sided else right)):
        whole = mask.materialize(23, 29, batch=2, q_offset=0)
        plan = make_plan(mask, None, batch=2, num_heads=1, num_kv_heads=1, q_len=23, kv_len=29, q_offset=0,
                         block_q=blocks[0], block_k=blocks[1])  # fmt: skip
        assert torch.equal(rebuilt(plan, 2, 1), whole.expand(2, -1, -1, -1))
    keys = torch.arange(29)
    assert torch.equal(
        masks.intervals(first, last).materialize(23, 29, batch=2, q_offset=0)[:, 0].expand(2, -1, -1),
        ((first[..., None] <= keys) & (keys <= last[..., None])).expand(2, -1, -1),
    )
    assert torch.equal(
        masks.window(4, 0).materialize(23, 29), (masks.sliding_window(5) & masks.causal).materialize(23, 29)
    )


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (2, 3), "softcap": 2.0}, {"attention_chunk": 3}]
)
def test_packed_sequences_are_their_parts(options):
    lengths_q, lengths_k = [5, 0, 9, 1, 4], [7, 3, 9, 4, 0]
    starts = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (lengths_q, lengths_k)]
    q, k, v = (x[0].transpose(0, 1).requires_grad_() for x in qkv(sum(lengths_q), sum(lengths_k), batch=1))
    slopes = torch.rand(5, 4, dtype=torch.float64)
    sink = torch.randn(4, dtype=torch.float64)
    more = {"alibi_slopes": slopes, "learnable_sink": sink, "return_lse": True}
    out, lse = attention_varlen(q, k, v, *starts, **more, **options)
    parts, lses = [], []
    for s, (a, b, c, d) in enumerate(zip(starts[0], starts[0][1:], starts[1], starts[1][1:])):
        if b > a:
            one = flash_attention(
                q[None, a:b], k[None, c:d], v[None, c:d], **(more | {"alibi_slopes": slopes[s]}), **options
            )
            parts.append(one[0][0])
            lses.append(one[1][0])
    torch.testing.assert_close(out, torch.cat(parts))
    torch.testing.assert_close(lse, torch.cat(lses, dim=1))
    assert bool((out[-4:] == 0).all())
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(torch.cat(parts).square().sum(), (q, k, v))
    for got, want in zip(grads, wanted):
        torch.testing.assert_close(got, want)


def test_limits_of_the_conventions():
    q, k, v = (x.transpose(1, 2) for x in qkv())
    plain = flash_attention(q, k, v)
    torch.testing.assert_close(plain, flash_attention(q, k, v, window_size=(100, 100)))
    torch.testing.assert_close(plain, flash_attention(q, k, v, learnable_sink=torch.full((4,), -1e9)))
    torch.testing.assert_close(
        plain, flash_attention(q, k, v, window_size=(None, -1), qv=torch.zeros_like(plain), softmax_scale=0.5)
    )
    causal = flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(
        causal, attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=masks.causal).transpose(1, 2)
    )
    torch.testing.assert_close(causal, flash_attention(q, k, v, causal=True, backend="tiles"))
    padding = torch.ones(2, 17, dtype=torch.bool)
    torch.testing.assert_close(causal, flash_attention(q, k, v, causal=True, key_padding_mask=padding))
    out, lse = flash_attention(q, k, v, learnable_sink=torch.zeros(4), return_lse=True)
    assert lse.shape == (2, 4, 13) and bool((lse > 0).all()) and out.abs().sum() < plain.abs().sum()
    empty = flash_attention(q[:, :0], k, v, causal=True, query_padding_mask=torch.ones(2, 0, dtype=torch.bool))
    assert empty.shape == (2, 0, 4, 6)


def test_the_butterfly():
    kept = butterfly(8 * 4, 8 * 4, block_q=4, block_k=4).block_map()[0, 0]
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4] and kept[5].nonzero()[:, 0].tolist() == [1, 4, 5, 7]
    assert torch.equal(kept, kept.T) and int(kept.sum()) == 8 * (1 + 3)
    fewer = butterfly(32, 32, block_q=4, block_k=4, levels=1, global_blocks=1).block_map()[0, 0]
    assert fewer[5].nonzero()[:, 0].tolist() == [0, 4, 5] and bool(fewer[0].all())
    wide = butterfly(30, 64, block_q=8, block_k=4)
    assert wide.block_map().shape[2:] == (4, 16) and wide.block_map()[0, 0, 0].nonzero()[:, 0].tolist()[:4] == [
        0,
        1,
        2,
        3,
    ]
    assert bool(butterfly(64, 30, block_q=4, block_k=8).block_map().any(-1).all())
    assert butterfly(0, 5).block_map().shape[2] == 0
    # a product of log2 n factors reaches every block from every block
    power = torch.matrix_power(kept.double(), 3)
    assert bool((power > 0).all()) and math.log2(8) == 3
    with pytest.raises(ValueError, match="levels: got 4, need at most 3"):
        butterfly(32, 32, block_q=4, block_k=4, levels=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 3}, "window_size: got 3, need a pair"),
        ({"window_size": (-2, 1)}, "window_size: got -2, need an int >= -1"),
        (
            {"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)},
            "key_padding_mask: got 'shape .2, 9.', need .2, 17.",
        ),
        ({"key_padding_mask": torch.ones(2, 17)}, "key_padding_mask: got torch.float32, need bool"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes: got 'shape .3,.'"),
        ({"learnable_sink": torch.zeros(2)}, "learnable_sink: got '2 logits', need '4, one a head'|need 4, one a head"),
        ({"qv": torch.zeros(2, 13, 4, 4)}, "qv: got 'shape .2, 13, 4, 4.', need .B, Sq, H, Dv. = .2, 13, 4, 6."),
        ({"key_leftpad": torch.zeros(3, dtype=torch.long)}, "key_leftpad"),
        ({"backend": "tile"}, "backend: unknown name 'tile'; did you mean tiles"),
        ({"dropout_mask": torch.ones(2, 4, 13, 17, dtype=torch.bool), "backend": "cpu"}, "backends draw their own"),
        ({"k_descale": torch.ones(2, 4)}, "k_descale: got 'shape .2, 4.', need .B, Hkv. = .2, 2."),
    ],
)
def test_bad_options(change, message):
    q, k, v = (x.transpose(1, 2).float() for x in qkv())
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attention(q, k, v, **change)


def test_bad_tiles_and_bad_packing():
    q, k, v = qkv()
    selection = butterfly(13, 17, block_q=4, block_k=4)
    with pytest.raises(ValueError, match=r"block_q, block_k: got \(8, 4\), need the tiles of block_mask, \(4, 4\)"):
        tiled_attention(q, k, v, block_q=8, block_mask=selection)
    with pytest.raises(ValueError, match="sram: got 64, need either sram or tile sizes"):
        tiled_attention(q, k, v, block_q=8, sram=64)
    with pytest.raises(ValueError, match="variant: unknown name"):
        tiled_attention(q, k, v, variant="fa3")
    with pytest.raises(ValueError, match="dropout_mask: got 'shape"):
        tiled_attention(q, k, v, dropout_mask=torch.ones(3, 4, 13, 17, dtype=torch.bool))
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    for starts, message in (([0, 5], "rising from 0 to 13"), ([0, 9, 5, 13], "rising"), ([0.0, 13.0], "integers")):
        with pytest.raises(ValueError, match=message):
            attention_varlen(*flat, torch.tensor(starts), torch.tensor([0, 17]))
    with pytest.raises(ValueError, match="cu_seqlens_k: got '1 sequences', need 2"):
        attention_varlen(*flat, torch.tensor([0, 6, 13]), torch.tensor([0, 17]))
    with pytest.raises(ValueError, match="first: got torch.float32, need integers"):
        masks.intervals(torch.zeros(3), torch.zeros(3))
