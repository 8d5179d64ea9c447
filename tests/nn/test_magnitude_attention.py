"""MALA's layer, block and network: what positions and sums of rows are, which parts are linear, sizes, errors."""

import pytest
import torch

import regard
from regard.models import MAViT, mavit
from regard.nn.spatial.block_parts import LayerNorm2d, interleaved_rotary_2d, rotate_pairs

Attention = regard.nn.MagnitudeAwareAttention
Block = regard.nn.MagnitudeAwareBlock


def test_rows_sum_to_one_without_rotation_only():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 5)
    with torch.no_grad():
        turned = Attention(16, 2).weights(x)
    still = Attention(16, 2, rotary=False).weights(x)
    assert still.shape == (2, 2, 15, 15)
    torch.testing.assert_close(still.sum(-1), torch.ones(2, 2, 15))
    assert float((turned.sum(-1) - 1).abs().max()) > 1e-3


def test_cells_without_positions_can_be_permuted():
    torch.manual_seed(1)
    layer, x = Attention(8, 2, rotary=False).double(), torch.randn(1, 8, 4, 4).double()
    with torch.no_grad():
        layer.lepe.weight.zero_()
    torch.testing.assert_close(layer(x.transpose(2, 3)), layer(x).transpose(2, 3))
    turned = Attention(8, 2).double()
    turned.load_state_dict(layer.state_dict())
    assert float((turned(x.transpose(2, 3)) - turned(x).transpose(2, 3)).detach().abs().max()) > 1e-4


def test_rotation_keeps_lengths_and_depends_on_distance():
    table = interleaved_rotary_2d((4, 6), 8)
    q, k = (torch.randn(8).expand(1, 1, 24, 8) for _ in range(2))
    turned_q, turned_k = rotate_pairs(q, table), rotate_pairs(k, table)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = (turned_q @ turned_k.mT)[0, 0].unflatten(0, (4, 6)).unflatten(2, (4, 6))
    torch.testing.assert_close(scores[0, 1, 1, 3], scores[2, 3, 3, 5])  # one row down, two columns to the right


def test_norm_and_sizes_and_gradients():
    x = torch.randn(2, 8, 1, 7, requires_grad=True)
    norm = LayerNorm2d(8)(x)
    torch.testing.assert_close(norm.mean(1), torch.zeros(2, 1, 7), atol=1e-5, rtol=0)
    block = Block(8, 1, layer_scale=0.5, drop_path=0.3).train()
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*block.parameters(), x])


def test_linear_stages_choose_where_attention_is_linear():
    net = MAViT((8, 8, 8), (1, 1, 1), (1, 1, 2), linear_stages=1, projection=8, num_classes=0, drop_path=0.2)
    assert [stage["blocks"][0].attn.linear for stage in net.stages] == [True, False, False]
    assert [stage["blocks"][0].drop_path for stage in net.stages] == pytest.approx([0.0, 0.1, 0.2])
    maps = net.eval().feature_maps(torch.randn(1, 3, 33, 40))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 9, 10), (1, 8, 5, 5), (1, 8, 3, 3)]
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 8)


def test_published_sizes():
    with torch.device("meta"):
        counts = {size: sum(p.numel() for p in mavit(size).parameters()) for size in "tsbl"}
    assert counts["t"] == 16_449_128
    assert counts["t"] < counts["s"] < counts["b"] < counts["l"]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Attention(10, 4), "dim"),
        (lambda: Attention(12, 2), "dim"),
        (lambda: Attention(12, 2, rotary=False)(torch.randn(1, 8, 2, 2)), "x"),
        (lambda: Attention(8, 2, linear=False).weights(torch.randn(1, 8, 2, 2)), "linear"),
        (lambda: Block(8, 2, drop_path=1.0), "drop_path"),
        (lambda: Block(8, 2, mlp_ratio=0), "mlp_ratio"),
        (lambda: MAViT((8, 8), (1,), (1, 1)), "depths"),
        (lambda: MAViT((8,), (1,), (1,), linear_stages=2), "linear_stages"),
        (lambda: mavit("x"), "size"),
    ],
)
def test_errors_name_the_argument(make, names):
    with pytest.raises(ValueError, match=names):
        make()
