"""InLine: injectivity, limit cases of the global part, the residual's kernels, windows, blocks, networks, errors."""

import pytest
import torch

import regard
from regard.models import InLineDeiT, InLineSwin, inline_deit
from regard.nn.spatial.window_attention import WindowSoftmaxAttention, shifted_window_bias

Attention = regard.nn.InLineAttention
Block = regard.nn.InLineBlock
CSWin = regard.nn.InLineCSWinBlock
Residual = regard.nn.DynamicLocalResidual


def test_rows_sum_to_one_and_two_queries_of_one_direction_differ():
    torch.manual_seed(0)
    layer = Attention(8, 2, 3, cls_tokens=1, qkv_bias=False).double()
    x = torch.randn(1, 10, 8).double()
    rows = layer.weights(x)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))
    bigger = x.clone()
    bigger[:, 0] *= 2
    assert float((layer.weights(bigger)[:, :, 0, 1:] - rows[:, :, 0, 1:]).detach().abs().max()) > 1e-4


def test_without_queries_the_output_is_the_mean_value():
    torch.manual_seed(1)
    layer = Attention(8, 2, (2, 3), residual=False)
    with torch.no_grad():
        layer.qkv.weight[:8].zero_()
        layer.qkv.bias[:8].zero_()
    x = torch.randn(2, 6, 8)
    mean = layer.proj(layer.qkv(x)[..., 16:].mean(1, keepdim=True)).expand(-1, 6, -1)
    torch.testing.assert_close(layer(x), mean)


def test_residual_kernels_are_those_of_each_sample():
    torch.manual_seed(2)
    residual = Residual(6, 3).double()
    values, mean = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6).double()
    kernels = residual.kernels(mean)
    want = torch.stack(
        [torch.nn.functional.conv2d(values[i : i + 1], kernels[i][:, None], padding=1, groups=6)[0] for i in range(2)]
    )
    torch.testing.assert_close(residual(values, mean), want)
    only = torch.zeros(1, 6).double()
    only[0, 0] = 1.0  # a head's kernels are made from its own channels
    moved = (residual.kernels(only) - residual.kernels(0 * only)).abs().amax((0, 2, 3))
    assert moved[:2].min() > 0 and not moved[2:].any()


def test_class_tokens_get_no_residual_but_shape_its_kernels():
    torch.manual_seed(3)
    layer = Attention(4, 1, 2, cls_tokens=1)
    plain = Attention(4, 1, 2, cls_tokens=1, residual=False)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("residual")})
    x = torch.randn(1, 5, 4)
    moved = (layer(x) - plain(x)).detach().abs().amax(-1)[0]
    assert moved[0] == 0 and moved[1:].min() > 0


def test_another_grid_and_windows():
    torch.manual_seed(4)
    x = torch.randn(2, 12, 8)
    layer = Attention(8, 2, (3, 4)).eval()
    assert layer(x, grid=(2, 6)).shape == x.shape
    assert float((layer(x, grid=(2, 6)) - layer(x)).detach().abs().max()) > 1e-4  # only the residual knows the grid
    whole, cut = Block(8, 2, (4, 4)).eval(), Block(8, 2, (4, 4), window=9, shift=3).eval()
    cut.load_state_dict(whole.state_dict())
    tokens = torch.randn(1, 16, 8).double()
    whole, cut = whole.double(), cut.double()
    torch.testing.assert_close(cut(tokens), whole(tokens))
    small = Block(8, 2, (4, 4), window=2).eval().double()
    small.load_state_dict(whole.state_dict())
    changed = tokens.clone()
    changed[0, 0] = torch.randn(8).double()  # the first window's first cell
    moved = (small(changed) - small(tokens)).detach().abs().amax(-1)[0].unflatten(0, (4, 4)) > 1e-12
    assert moved[:2, :2].all() and moved.sum() == 4


def test_softmax_windows_keep_rolled_borders_apart():
    bias = shifted_window_bias((4, 4), (2, 2), 1)
    assert bias.shape == (4, 4, 4)
    assert not bias[0].any()  # a window of real neighbours
    assert (bias[3] != 0).sum() == 12  # the four corners of the image meet in the last one: each sees itself
    torch.manual_seed(5)
    block = Block(8, 2, (4, 4), window=2, shift=1, linear=False).eval()
    x = torch.randn(1, 16, 8)
    changed = x.clone()
    changed[0, 0] = torch.randn(8)
    moved = (block(changed) - block(x)).detach().abs().amax(-1)[0] > 1e-6
    assert moved.sum() == 1


def test_window_attention_without_bias_is_attention():
    torch.manual_seed(6)
    layer = WindowSoftmaxAttention(8, 2, (2, 3), relative_bias=False)
    x = torch.randn(3, 6, 8)
    q, k, v = layer.qkv(x).reshape(3, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(want))


def test_networks_train_and_tell_their_stages():
    net = InLineSwin(8, (2, 2), (1, 2), "SM1", image_size=28, patch_size=2, window=8, num_classes=3, drop_path=0.1)
    kinds = [[block.linear for block in stage["blocks"]] for stage in net.stages]
    assert kinds == [[False, False], [True, False]]
    net.train()(torch.randn(2, 3, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    deit = InLineDeiT(8, 2, 2, image_size=(8, 12), patch_size=4, num_classes=0)
    assert deit(torch.randn(2, 3, 8, 12)).shape == (2, 8)
    assert CSWin(8, 2, (2, 3))(torch.randn(1, 6, 8)).shape == (1, 6, 8)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Attention(10, 4, 2), "dim"),
        (lambda: Attention(8, 2, 2, feature_map="gelu"), "feature_map"),
        (lambda: Attention(8, 2, 2)(torch.randn(1, 5, 8)), "x"),
        (lambda: Residual(8, 2, kernel_size=2), "kernel_size"),
        (lambda: Residual(8, 2)(torch.randn(1, 4, 2, 2), torch.randn(1, 8)), "values"),
        (lambda: Block(8, 2, 4, cls_tokens=1, window=2), "cls_tokens"),
        (lambda: Block(8, 2, 4, window=3), "window"),
        (lambda: Block(8, 2, 4, shift=1), "shift"),
        (lambda: Block(8, 2, 4, linear=False), "window"),
        (lambda: InLineSwin(8, (1, 1), (1, 1), "IM", image_size=16), "attn_type"),
        (lambda: InLineSwin(8, (1, 1), (1, 1), "III", image_size=16), "attn_type"),
        (lambda: InLineSwin(8, (1, 1), (1, 1), image_size=12), "image_size"),
        (lambda: InLineDeiT(8, 1, 1, image_size=20), "image_size"),
        (lambda: InLineDeiT(8, 1, 1, image_size=16)(torch.randn(1, 3, 32, 32)), "x"),
        (lambda: inline_deit("huge"), "size"),
    ],
)
def test_errors_name_the_argument(make, names):
    with pytest.raises(ValueError, match=names):
        make()
