"""Agent-DeiT, -Swin and -PVT: published sizes, stages of each kind, oblong images, loading, errors."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.models import AgentCSWin, AgentDeiT, AgentPVT, AgentSwin, agent_cswin, agent_deit, agent_pvt, agent_swin
from regard.nn import AgentBlock, InLineBlock, SoftmaxBlock, SpatialReductionAttention
from regard.ops import attention


def millions(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters()) / 1e6


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (lambda: agent_deit("t"), 5.8, 6.2), (lambda: agent_deit("s"), 22.4, 23.0), (lambda: agent_deit("b"), 86, 88),
        (lambda: agent_swin("t"), 28, 30), (lambda: agent_swin("s"), 49, 51), (lambda: agent_swin("b"), 87, 91),
        (lambda: agent_pvt("t"), 11, 12.5), (lambda: agent_pvt("s"), 20, 22), (lambda: agent_pvt("m"), 35, 37),
        (lambda: agent_pvt("l"), 47, 51),
        (lambda: agent_cswin("t"), 20, 24), (lambda: agent_cswin("s"), 32, 34), (lambda: agent_cswin("b"), 71, 75),
    ],
)  # fmt: skip
def test_published_sizes(make, low, high):
    """The paper's parameter counts: 6.0, 22.7, 87.2; 29, 50, 90; 11.6, 20.6, 35.9, 48.7; 21, 33, 73 million."""
    assert low < millions(make) < high


def test_stages_have_the_blocks_they_say():
    deit = AgentDeiT(24, 3, 3, 4, 2, image_size=16, patch_size=4)
    assert [type(block) for block in deit.blocks] == [AgentBlock, AgentBlock, SoftmaxBlock]
    swin = AgentSwin(8, (2, 2), (2, 2), (4, 4), "BM1", image_size=56, window=56)
    kinds = [[type(block) for block in stage["blocks"]] for stage in swin.stages]
    assert kinds == [[InLineBlock, InLineBlock], [AgentBlock, InLineBlock]]
    assert [block.shift for block in swin.stages[0]["blocks"]] == [0, 3]
    pvt = AgentPVT((8, 8), (2, 2), (1, 1), (4, 4), "AB", sr_ratios=(1, 2), mlp_ratios=(2, 2), image_size=16)
    assert [type(stage[0]) for stage in pvt.stages] == [AgentBlock, SoftmaxBlock]


@pytest.mark.parametrize(
    "make",
    [
        lambda: AgentDeiT(24, 2, 3, 4, 1, image_size=(16, 24), patch_size=4, num_classes=5),
        lambda: AgentCSWin(
            8,
            (2, 1),
            (2, 2),
            (4, 4),
            "MA1",
            split_sizes=(2, 2),
            agent_split_sizes=(4, 2),
            image_size=(16, 32),
            num_classes=5,
        ),
        lambda: AgentSwin(
            8, (2, 1), (2, 2), (4, 4), "MB1", image_size=(28, 56), window=56, patch_size=2, num_classes=5
        ),
        lambda: AgentPVT(
            (8, 8),
            (2, 2),
            (1, 1),
            (4, 4),
            "AB",
            sr_ratios=(1, 2),
            mlp_ratios=(2, 2),
            image_size=(16, 24),
            num_classes=5,
        ),
    ],
)
def test_runs_on_oblong_images_and_trains(make):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(2, 3, *model.image_size)
    y = model(x)
    assert y.shape == (2, 5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model.eval()(x)[1:], model(x[1:]), atol=1e-5, rtol=1e-5)
    regard.load_official(make(), model.state_dict())  # ours pass as they are
    with pytest.raises(ValueError, match="x"):
        model(x[:, :, :8])


def test_reduction_of_one_is_plain_attention():
    torch.manual_seed(0)
    layer, x = SpatialReductionAttention(12, 3, (2, 3), 1).double(), torch.randn(2, 7, 12).double()
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (layer.q(x), *layer.kv(x).chunk(2, -1)))
    torch.testing.assert_close(layer(x), layer.proj(attention(q, k, v).transpose(1, 2).flatten(2)))
    reduced = SpatialReductionAttention(12, 3, (4, 6), 0, 2).double()
    assert reduced(torch.randn(2, 24, 12).double()).shape == (2, 24, 12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AgentDeiT(agent_layers=-1), "agent_layers"),
        (lambda: AgentDeiT(image_size=20), "image_size"),
        (lambda: AgentSwin(attn_type="AAM"), "attn_type"),
        (lambda: AgentSwin(attn_type="AAAM"), "attn_type"),
        (lambda: AgentSwin(agent_num=(9,)), "agent_num"),
        (lambda: AgentPVT(attn_type="AAIM"), "attn_type"),
        (lambda: AgentPVT(depths=(1,)), "depths"),
        (lambda: agent_pvt("x"), "size"),
        (lambda: AgentCSWin(split_sizes=(1,)), "split_sizes"),
        (lambda: AgentCSWin(image_size=48), "image_size"),
        (lambda: AgentCSWin(image_size=224, agent_split_sizes=(5, 5, 5, 5)), "stripe"),
        (lambda: SpatialReductionAttention(12, 3, 4, 1, 2), "cls_tokens"),
        (lambda: SpatialReductionAttention(12, 3, 4, 0, 5), "sr_ratio"),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()
