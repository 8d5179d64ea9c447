"""L2ViT: what the floor and the temperature do, which parts see the grid, padding of windows, the network's stages, errors."""

import pytest
import torch

import regard
from regard.models import L2ViT, l2vit

Attention = regard.nn.ReluLinearAttention
Global = regard.nn.LinearGlobalBlock
Local = regard.nn.LocalWindowBlock


def test_sums_of_rows_are_the_temperature_above_the_floor_and_less_below():
    torch.manual_seed(0)
    layer, x = Attention(8, 2, floor=3.0), 2 * torch.randn(1, 20, 8)
    with torch.no_grad():
        layer.temperature.copy_(torch.tensor([0.5, 2.0])[:, None, None])
        sums = layer.weights(x).sum(-1)
        q, k, _ = layer.qkv(x).reshape(1, 20, 3, 2, 4).permute(2, 0, 3, 1, 4)
        size = (q.relu() @ k.relu().sum(2)[..., None])[..., 0]
    torch.testing.assert_close(sums, layer.temperature[None, :, :, 0].detach() * (size / 3.0).clamp(max=1))
    assert (size < 3.0).any() and (size > 3.0).any()


def test_output_is_the_weights_times_the_values_and_tokens_can_be_permuted():
    torch.manual_seed(1)
    layer, x = Attention(8, 2).double(), torch.randn(2, 9, 8).double()
    v = layer.qkv(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer.proj((layer.weights(x) @ v).transpose(1, 2).flatten(2)))
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_without_a_floor_rows_sum_to_one_and_dead_rows_give_zeros():
    layer = Attention(4, 1, floor=None, qkv_bias=False)
    with torch.no_grad():
        layer.temperature.fill_(1.0)
        layer.qkv.weight[:8].copy_(torch.eye(4).repeat(2, 1))
    x = torch.rand(1, 5, 4) + 0.1
    x[0, 2] *= -1  # its query is zero everywhere after the relu
    sums = layer.weights(x).sum(-1)[0, 0].detach()
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(layer(x)[0, 2], layer.proj.bias)


def test_only_position_encoding_and_concentration_see_the_grid():
    torch.manual_seed(2)
    x = torch.randn(1, 12, 8)
    block = Global(8, 2, concentrate=False).eval()
    with torch.no_grad():
        for part in block.cpe:
            part.proj.weight.zero_()
    torch.testing.assert_close(block(x, (3, 4)), block(x, (2, 6)))
    with_focus = Global(8, 2).eval()
    with_focus.load_state_dict(block.state_dict(), strict=False)
    assert float((with_focus(x, (3, 4)) - with_focus(x, (2, 6))).detach().abs().max()) > 1e-4


def test_windows_are_padded_with_zeros_that_are_attended_to():
    torch.manual_seed(3)
    block = Local(8, 2, window=3).eval()
    tokens = torch.randn(1, 4 * 2, 8)
    maps = torch.nn.functional.pad(tokens.unflatten(1, (4, 2)), (0, 0, 0, 1, 0, 2))
    want = torch.cat([block.attn(maps[:, i : i + 3].flatten(1, 2)).unflatten(1, (3, 3)) for i in (0, 3)], dim=1)
    torch.testing.assert_close(block._attend(tokens, (4, 2)), want[:, :4, :2].flatten(1, 2))
    fitting = torch.randn(2, 9, 8)
    torch.testing.assert_close(block._attend(fitting, (3, 3)), block.attn(fitting))


def test_network_stages_sizes_and_gradients():
    net = L2ViT((8, 16), (1, 2), (2, 3), 3, num_classes=0, drop_path=0.4)
    kinds = [[type(block).__name__ for block in stage] for stage in net.stages]
    assert kinds[1] == ["LocalWindowBlock", "LinearGlobalBlock", "LocalWindowBlock"]
    assert [block.drop_path for stage in net.stages for block in stage] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    maps = net.eval().feature_maps(torch.randn(1, 3, 21, 34))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 6, 9), (1, 16, 3, 5)]
    net.train()(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in l2vit("tiny").parameters()) == pytest.approx(28.6e6, rel=0.01)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Attention(9, 2), "dim"),
        (lambda: Attention(8, 2, floor=-1.0), "floor"),
        (lambda: Attention(8, 2)(torch.randn(1, 4, 6)), "x"),
        (lambda: regard.nn.LocalConcentration(8, kernel_size=4), "kernel_size"),
        (lambda: Global(8, 2)(torch.randn(1, 5, 8), (2, 2)), "x"),
        (lambda: Local(8, 2, drop_path=1.5), "drop_path"),
        (lambda: L2ViT((8, 8), (1,), (1, 1)), "num_heads"),
        (lambda: L2ViT((8,), (1,), (1,))(torch.randn(1, 4, 8, 8)), "x"),
        (lambda: l2vit("huge"), "size"),
    ],
)
def test_errors_name_the_argument(make, names):
    with pytest.raises(ValueError, match=names):
        make()
