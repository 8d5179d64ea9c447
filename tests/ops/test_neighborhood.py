"""Neighborhoods: the window rule, the mask's bounds, and the tiled CPU way against the mask's."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_masks import rebuilt

from regard import masks
from regard.ops import attention, make_plan, neighborhood_attention, neighborhood_attention_backend
from regard.ops.backends import cpu_halo
from regard.ops.backends.cpu_frame import Geometry
from regard.ops.mask_neighborhood import grid_axes, tile_order

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def windows(draw, longest=(40, 12, 6)):
    """(grid, kernel_size, stride, dilation, is_causal), whatever is allowed."""
    dims = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(1, longest[dims - 1])) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, max(1, length // 2))) for length in grid)
    kernel = tuple(draw(st.integers(1, length // step)) for length, step in zip(grid, dilation))
    stride = tuple(draw(st.integers(1, size)) for size in kernel)
    return grid, kernel, stride, dilation, tuple(draw(st.booleans()) for _ in grid)


def qkv(grid, batch=2, heads=4, kv_heads=2, dim=4, value_dim=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, *grid, heads, dim), (batch, *grid, kv_heads, dim), (batch, *grid, kv_heads, value_dim))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def rows(*window):
    mask = masks.neighborhood(*window)
    return ["".join(".x"[int(x)] for x in row) for row in mask.materialize(mask.tokens, mask.tokens)[0, 0]]


def test_the_rule_along_one_axis():
    assert rows(5, 3) == ["xxx..", "xxx..", ".xxx.", "..xxx", "..xxx"]  # shifted at the borders, not cut
    assert rows(5, 4) == ["xxxx.", "xxxx.", "xxxx.", ".xxxx", ".xxxx"]  # even: one more on the left
    assert rows(5, 3, 1, 1, True) == ["x....", "xx...", "xxx..", ".xxx.", "..xxx"]
    assert rows(6, 3, 3) == ["xxx...", "xxx...", "xxx...", "...xxx", "...xxx", "...xxx"]
    assert rows(6, 3, 2, 1, True) == ["x.....", "xx....", ".xx...", ".xxx..", "...xx.", "...xxx"]
    assert rows(5, 2, 1, 2) == ["x.x..", ".x.x.", "x.x..", ".x.x.", "..x.x"]


@QUICK
@given(windows(), st.sampled_from([None, 1, 3, 4]), st.sampled_from([(8, 8), (5, 7), (16, 4)]), st.integers(0, 3))
def test_a_plan_is_its_mask(window, tile, blocks, extra):
    mask = masks.neighborhood(*window, tile=tile)
    sizes = {"q_len": mask.tokens, "kv_len": mask.tokens + extra, "q_offset": 0}
    whole = mask.materialize(**sizes)
    plan = make_plan(mask, None, batch=1, num_heads=1, num_kv_heads=1, block_q=blocks[0], block_k=blocks[1], **sizes)
    assert torch.equal(rebuilt(plan, 1, 1), whole)
    assert bool(whole[..., mask.tokens :].all())
    if tile is not None:  # the same pairs, in another order
        plain = masks.neighborhood(*window).materialize(mask.tokens, mask.tokens)
        assert sorted(mask.order.tolist()) == list(range(mask.tokens))
        assert torch.equal(plain[:, :, mask.order][:, :, :, mask.order], whole[..., : mask.tokens])


@QUICK
@given(windows())
def test_every_query_sees_itself_and_the_whole_kernel(window):
    grid, kernel, _, _, causal = window
    mask = masks.neighborhood(*window)
    seen = mask.materialize(mask.tokens, mask.tokens)[0, 0]
    assert bool(seen.diagonal().all())
    if not any(causal):
        assert set(seen.sum(-1).tolist()) == {math.prod(kernel)}
    else:
        assert int(seen.sum(-1).max()) <= math.prod(kernel)
        coordinates = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
        for axis, flag in enumerate(causal):
            later = coordinates[axis][None, :] > coordinates[axis][:, None]
            assert not flag or not bool((seen & later).any())


@QUICK
@given(windows((40, 9, 4)), st.booleans(), st.integers(0, 2), st.booleans())
def test_tiles_are_the_mask(window, biased, extra, split):
    grid, kernel = window[:2]
    inputs = qkv(grid)
    options = {}
    if biased:
        options["rel_pos_bias"] = torch.randn(4, *(2 * size - 1 for size in kernel), dtype=torch.float64)
    if extra:
        options["extra_kv"] = tuple(x.flatten(1, -3)[:, :1].repeat(1, extra, 1, 1) * 1.5 for x in inputs[1:])
    leaves = [*inputs, *options.get("extra_kv", ()), *([options["rel_pos_bias"]] if biased else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    found = []
    for backend in ("tiled", "eager", "cpu"):
        with pytest.MonkeyPatch.context() as patch:
            if split:  # several pieces where one would do
                patch.setattr(cpu_halo, "SCORES", 64)
                cpu_halo.lower.cache_clear()
            out, lse = neighborhood_attention(*inputs, *window[1:], return_lse=True, backend=backend, **options)
            grads = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves)
        cpu_halo.lower.cache_clear()
        found.append((out, lse, *grads))
    for other in found[1:]:
        for got, want in zip(found[0], other):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_piece_masks_what_the_mask_forbids():
    axes = grid_axes((9, 10), (4, 3), (2, 1), (1, 2), (False, True))
    mask = masks.neighborhood((9, 10), (4, 3), (2, 1), (1, 2), (False, True))
    geometry = Geometry(2, 4, 2, 90, 93, 0, 90, 93)
    covered = torch.zeros(2, 4, 90, dtype=torch.long)
    for piece in cpu_halo.lower(axes, geometry, 8, torch.float32, False, 1):
        places = piece.positions(geometry)
        scores = torch.zeros(piece.shape)
        piece.forbid(scores, None)
        assert torch.equal(scores == 0, mask.keep(*places).expand(piece.shape))
        b, h, qi, _ = (place[..., 0] for place in places)
        covered.index_put_((b, h, qi), torch.tensor(1), accumulate=True)
    assert bool((covered == 1).all())


def test_limits_are_other_attention():
    q, k, v = qkv((6, 5))
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]

    def dense(**options):
        return attention(*flat, **options).transpose(1, 2).unflatten(1, (6, 5))

    torch.testing.assert_close(neighborhood_attention(q, k, v, (6, 5)), dense())
    torch.testing.assert_close(neighborhood_attention(q, k, v, (6, 5), backend="tiled"), dense())
    q, k, v = qkv((12,))
    flat = [x.transpose(1, 2) for x in (q, k, v)]
    causal = attention(*flat, mask=masks.causal).transpose(1, 2)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 12, is_causal=True), causal)
    blocked = attention(*flat, mask=masks.block(4)).transpose(1, 2)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 4, 4), blocked)
    band = attention(*flat, mask=masks.sliding_window(3) & masks.causal).transpose(1, 2)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 3, is_causal=True), band)


def test_the_interior_moves_with_the_tokens():
    q, k, v = qkv((16, 14), batch=1)
    out = neighborhood_attention(q, k, v, (5, 3))
    moved = neighborhood_attention(*(x.roll((2, 1), (1, 2)) for x in (q, k, v)), (5, 3))
    torch.testing.assert_close(moved[:, 5:13, 3:12], out[:, 3:11, 2:11])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_accumulate_in_float32(dtype):
    q, k, v = qkv((9, 8), dtype=dtype)
    out, lse = neighborhood_attention(q, k, v, 5, return_lse=True)
    exact = neighborhood_attention(*(x.double() for x in (q, k, v)), 5)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out.double() - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()


def test_second_derivatives_and_dropout():
    q, k, v = (x.requires_grad_() for x in qkv((3, 3), batch=1, heads=1, kv_heads=1, dim=2, value_dim=2))
    table = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)

    def op(*x):
        return neighborhood_attention(*x[:3], (2, 3), rel_pos_bias=x[3], backend="tiled")

    assert torch.autograd.gradcheck(op, (q, k, v, table))
    assert torch.autograd.gradgradcheck(op, (q, k, v, table))
    torch.manual_seed(0)
    ones = torch.ones(1, 40, 40, 1, 1, dtype=torch.float64)
    dropped = neighborhood_attention(ones, ones, ones, 7, dropout=0.25)
    assert abs(float(dropped.mean()) - 1) < 0.01 and dropped.std() > 0.05


def test_inputs_are_left_alone_and_batch_mates_do_not_matter():
    inputs = qkv((7, 9), dtype=torch.float32)
    before = [x.clone() for x in inputs]
    out = neighborhood_attention(*inputs, 3, dilation=2)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))
    alone = neighborhood_attention(*(x[1:] for x in inputs), 3, dilation=2)
    torch.testing.assert_close(alone, out[1:])


def test_which_backend():
    q, k, v = qkv((8, 8))
    assert neighborhood_attention_backend(q, k, v, 3) == "tiled"
    assert neighborhood_attention_backend(q, k, v, 3, stride=2, backend="cpu") == "cpu"
    assert neighborhood_attention_backend(q, k, v, 8, return_lse=False) in ("sdpa", "cpu")
    meta = [x.to("meta") for x in (q, k, v)]
    with pytest.raises(ValueError, match="backend: got 'tiled', need tensors on the cpu"):
        neighborhood_attention(*meta, 3, backend="tiled")
    assert neighborhood_attention(*(x[:0] for x in (q, k, v)), 3).shape == (0, 8, 8, 4, 6)


def test_tiles_follow_the_windows():
    extents = cpu_halo.tile_extents(grid_axes((64, 64), 13))
    assert 32 <= math.prod(extents) <= 256
    assert cpu_halo.tile_extents(grid_axes((4, 4), (4, 4))) == (4, 4)
    order = tile_order(grid_axes((4, 4), 2), (2, 2)).view(4, 4)
    assert order[0].tolist() == [0, 1, 4, 5] and order[3].tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 9}, "kernel_size: got '9 .with dilation 1. on axis 0', need kernel_size . dilation <= 8"),
        ({"kernel_size": 3, "dilation": (1, 4)}, "kernel_size . dilation <= 8"),
        ({"stride": 4}, "stride: got '4 on axis 0', need at most kernel_size = 3"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size: got .3, 3, 3., need an int, or 2 of them"),
        ({"kernel_size": 0}, "kernel_size: got 0, need an int >= 1"),
        ({"is_causal": (True,)}, "is_causal"),
        ({"is_causal": 1}, "is_causal: got int, need a bool"),
        ({"backend": "tilde"}, "backend: unknown name 'tilde'; did you mean tiled"),
        ({"dropout": 1.0}, "dropout"),
        ({"rel_pos_bias": torch.zeros(4, 5, 3)}, "rel_pos_bias: got .4, 5, 3., need shape .4, 5, 5."),
        ({"extra_kv": torch.zeros(2, 1, 2, 4)}, "extra_kv: got Tensor, need a pair"),
        ({"extra_kv": (torch.zeros(2, 1, 2, 4), torch.zeros(2, 2, 2, 6))}, "extra values: got .shape .2, 2, 2, 6."),
        ({"k": torch.zeros(2, 8, 7, 2, 4)}, "k: got 'shape .2, 8, 7, 2, 4.', need q's batch and grid"),
        ({"v": torch.zeros(2, 8, 8, 1, 6)}, "v: got '1 heads', need k's 2 heads"),
        ({"k": torch.zeros(2, 8, 8, 3, 4), "v": torch.zeros(2, 8, 8, 3, 4)}, "k: got '3 kv heads', need a divisor"),
        ({"q": torch.zeros(2, 8, 4)}, "q: got 'shape .2, 8, 4.', need .B, .grid, H, D."),
    ],
)
def test_bad_input(change, message):
    q, k, v = qkv((8, 8), dtype=torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        neighborhood_attention(**{"q": q, "k": k, "v": v, "kernel_size": 3} | change)
    with pytest.raises(ValueError, match="tile"):
        masks.neighborhood((4, 4), 2, tile=(2, 2, 2))
