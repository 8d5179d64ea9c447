"""Paths over grids, the scan on maps and the block: orders by hand, symmetries, what a block is at its start, linear cost, bad input."""

import pytest
import torch

import regard
from regard.nn import LaMambaBlock, SelectiveScan2D, scan_paths


def test_paths_are_permutations_and_snakes_never_jump():
    for grid in ((4, 4), (3, 5), (1, 4), (6, 2)):
        for scans in ("continuous", "raster"):
            paths = scan_paths(grid, scans)
            assert paths.shape == (4, grid[0] * grid[1])
            assert all(sorted(path.tolist()) == list(range(grid[0] * grid[1])) for path in paths)
        for path in scan_paths(grid):
            row, column = path // grid[1], path % grid[1]
            assert ((row.diff().abs() + column.diff().abs()) == 1).all()
    assert scan_paths(4)[0].tolist()[:9] == [0, 1, 2, 3, 7, 6, 5, 4, 8]
    assert scan_paths(2, "raster").tolist() == [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]


def randomised(layer, seed=0):
    torch.manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if "A_logs" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def test_a_cell_is_seen_by_all_and_forms_agree():
    layer = randomised(SelectiveScan2D(4, 2))
    x = torch.randn(1, 4, 5, 3, requires_grad=True)
    for row, column in ((0, 0), (2, 1), (4, 2)):
        (grad,) = torch.autograd.grad(layer(x)[0, :, row, column].sum(), x)
        assert (grad.abs().sum(1) > 0).all()
    want = layer(x)
    for form in ("parallel", "chunk", "recurrent"):
        layer.form = form
        assert torch.allclose(layer(x), want, atol=1e-5)


def test_equal_paths_and_weights_turn_with_the_map():
    layer = randomised(SelectiveScan2D(4, 2, scans="raster", kernel=1))
    with torch.no_grad():  # the same scan along rows and columns, there and back
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            getattr(layer, name).copy_(getattr(layer, name)[:1].expand_as(getattr(layer, name)))
        layer.Ds.copy_(layer.Ds[:8].repeat(4))
    x = torch.randn(2, 4, 5, 3)
    assert torch.allclose(layer(x.mT), layer(x).mT, atol=1e-5)
    assert torch.allclose(layer(x.flip(2, 3)), layer(x).flip(2, 3), atol=1e-5)


def test_maps_of_a_batch_do_not_matter_to_each_other_and_layouts_agree():
    layer = randomised(SelectiveScan2D(4, 2))
    x = torch.randn(3, 4, 4, 6)
    assert torch.allclose(layer(x)[1:2], layer(x[1:2]), atol=1e-6)
    assert torch.allclose(layer(x), layer.channels_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert regard.nn.build_mixer("selective_scan_2d", 8, 2, causal=False)(torch.randn(1, 8, 3, 3)).shape == (1, 8, 3, 3)


def test_steps_start_between_a_thousandth_and_a_tenth():
    layer = SelectiveScan2D(8, 3)
    step = torch.nn.functional.softplus(layer.dt_projs_bias)
    assert step.min() > 0.9e-3 and step.max() < 0.11
    assert torch.allclose(layer.A_logs.exp()[5], torch.tensor([1.0, 2.0, 3.0]))


def test_a_new_block_gives_back_its_input():
    block = LaMambaBlock(8, (4, 8), 2, condition_dim=6, window=4, shift=2)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x, torch.randn(2, 6)), x)
    torch.nn.init.normal_(block.adaLN_modulation[1].bias)
    assert not torch.allclose(block(x, torch.randn(2, 6)), x)


def test_parts_alone_look_where_they_may():
    x = torch.randn(1, 8, 8, 8, requires_grad=True)

    def reach(parts, shift=0):
        block = randomised(LaMambaBlock(8, 8, 2, window=4, shift=shift, parts=parts, d_state=2))
        (grad,) = torch.autograd.grad(block(x)[0, 1, 1].sum(), x)
        return grad[0].abs().sum(-1) > 1e-30  # a mask of -100 leaves 1e-43

    mlp = reach(("mlp",))
    assert mlp.sum() == 1 and mlp[1, 1]
    window = reach(("attention",))
    assert window.sum() == 16 and window[:4, :4].all()
    shifted = reach(("attention",), 2)
    assert shifted[:2, :2].all() and shifted.sum() == 4  # what the roll brought beside it stays apart
    assert reach(("scan",)).all()


def test_gradients_reach_all_parameters():
    block = randomised(LaMambaBlock(8, 8, 2, condition_dim=6, window=4, shift=2)).train()
    block(torch.randn(2, 8, 8, 8), torch.randn(2, 6)).square().sum().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in block.parameters()
    )


def test_bad_input():
    for call, name in (
        (lambda: LaMambaBlock(8, 10, 2, window=4), "window"), (lambda: LaMambaBlock(8, 8, 2, window=4, shift=4), "shift"),
        (lambda: LaMambaBlock(8, 8, 2, parts=("scan", "ssm")), "parts"), (lambda: SelectiveScan2D(8, kernel=2), "kernel"),
        (lambda: SelectiveScan2D(8, scans="zigzag"), "scans"), (lambda: SelectiveScan2D(8)(torch.zeros(1, 4, 2, 2)), "x:"),
        (lambda: LaMambaBlock(8, 4, 2)(torch.zeros(1, 4, 5, 8)), "x:"),
        (lambda: LaMambaBlock(8, 4, 2, condition_dim=3)(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4)), "condition"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(TypeError, match="condition"):
        LaMambaBlock(8, 4, 2, condition_dim=3)(torch.zeros(1, 4, 4, 8))
