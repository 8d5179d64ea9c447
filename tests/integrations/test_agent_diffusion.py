"""Token merging, and AgentSD in a diffusers U-Net: limits, order, schedule, no trace, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.integrations.agent_diffusion import AGENT_SD_SCHEDULE, AgentDiffusion, merged_attention
from regard.methods.call import UnsupportedModelError
from regard.ops import agent_attention, attention, token_merge


def tokens(b=2, n=48, c=6, seed=0):
    return torch.randn(b, n, c, generator=torch.Generator().manual_seed(seed)).double()


def test_merging_nothing_is_nothing():
    x = tokens()
    made = token_merge(x, (6, 8), 0.0)
    assert made.kept == 48 and made.agents_kept is None and made.agents(x) is None
    assert torch.equal(made.unmerge(made.merge(x)), x)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("stride", [(2, 2), (3, 2), (4, 5)])
def test_merged_tokens_are_means_of_groups(random, stride):
    x = tokens()
    made = token_merge(x, (6, 8), 0.5, 0.7, stride=stride, random=random, generator=torch.Generator().manual_seed(3))
    number = torch.arange(made.kept).double().expand(2, -1)[..., None]
    group = made.unmerge(number)[..., 0].long()
    for b in range(2):
        want = torch.stack([x[b, group[b] == i].mean(0) for i in range(made.kept)])
        torch.testing.assert_close(made.merge(x)[b], want)
    rows, columns = 6 // stride[0], 8 // stride[1]
    assert made.kept == 48 - min(24, 48 - rows * columns) and len(made.targets) == rows * columns
    if not random:
        assert int(made.targets[0]) == 0 and made.targets.tolist() == sorted(made.targets.tolist())


def test_the_most_similar_are_merged_first():
    x = tokens(1, 16)
    x[0, 1] = 3 * x[0, 0]  # a source that points where the first target points
    made = token_merge(x, (4, 4), 1 / 16)
    assert made.kept == 15
    torch.testing.assert_close(made.merge(x)[0, -4], 2 * x[0, 0])
    torch.testing.assert_close(made.unmerge(made.merge(x))[0, 1], 2 * x[0, 0])


def test_agents_only_where_they_are_few():
    assert token_merge(tokens(), (6, 8), 0.5, 0.6).agents_kept is None
    assert token_merge(tokens(), (6, 8), 0.25, 0.75).agents_kept == 12
    assert token_merge(tokens(), (6, 8), 0.25, 1.0).agents_kept == 12  # no more than all sources


def test_samples_are_merged_on_their_own():
    x = tokens()
    both, one = token_merge(x, (6, 8), 0.5), token_merge(x[1:], (6, 8), 0.5)
    torch.testing.assert_close(both.merge(x)[1:], one.merge(x[1:]))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: token_merge(x, (6, 7)), "grid"),
        (lambda x: token_merge(x, (6, 8), 1.5), "ratio"),
        (lambda x: token_merge(x, (6, 8), 0.5, -1.0), "agent_ratio"),
        (lambda x: token_merge(x, (6, 8), stride=(7, 1)), "stride"),
        (lambda x: token_merge(x, (6, 8)).merge(x[:, :4]), "x"),
        (lambda x: token_merge(x, (6, 8)).unmerge(x), "x"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(tokens())


def layer_of(dim=12, heads=2):
    torch.manual_seed(0)
    layer = nn.Module()
    layer.heads, layer.to_out = heads, nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
    for name in ("to_q", "to_k", "to_v"):
        setattr(layer, name, nn.Linear(dim, dim, bias=False))
    return layer.double()


def test_merged_attention_by_hand():
    layer, x = layer_of(), tokens(c=12)

    def heads(t):
        return t.unflatten(-1, (2, 6)).transpose(1, 2)

    def out(t):
        return layer.to_out[0](t.transpose(1, 2).flatten(2))

    q, k, v = (heads(to(x)) for to in (layer.to_q, layer.to_k, layer.to_v))
    torch.testing.assert_close(merged_attention(x, None, layer), out(attention(q, k, v)))
    made = token_merge(x, (6, 8), 0.0, 0.75)
    # with nothing merged the order is another one, and unmerging puts it back
    agents = heads(layer.to_q(made.agents(x)))
    want = out(agent_attention(q, k, v, agents, scale2=6 ** (-0.5 * 0.4), shortcut=0.1))
    torch.testing.assert_close(merged_attention(x, made, layer, 0.4, 0.1), want)
    plain = token_merge(x, (6, 8), 0.5)
    y = plain.merge(x)
    q, k, v = (heads(to(y)) for to in (layer.to_q, layer.to_k, layer.to_v))
    torch.testing.assert_close(merged_attention(x, plain, layer), plain.unmerge(out(attention(q, k, v))))
    half = layer_of().bfloat16()
    assert merged_attention(x.bfloat16(), made, half, precise=True).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=8,
    ).eval()  # fmt: skip


@torch.no_grad()
def run(unet, seed=0):
    g = torch.Generator().manual_seed(seed)
    return unet(torch.randn(2, 4, 8, 8, generator=g), 10, torch.randn(2, 5, 12, generator=g)).sample


def test_leaves_no_trace_and_changes_the_output(unet):
    plain, before = run(unet), {name: type(p) for name, p in unet.attn_processors.items()}
    with AgentDiffusion(unet, 0.25, 0.75) as joined:
        assert not torch.allclose(run(unet), plain, atol=1e-4)
        assert joined.step == 0
        with pytest.raises(ValueError, match="attached"):
            joined.attach()
    assert torch.equal(run(unet), plain)
    assert {name: type(p) for name, p in unet.attn_processors.items()} == before
    assert not unet._forward_pre_hooks


def test_merging_nothing_changes_nothing(unet):
    plain = run(unet)
    with AgentDiffusion(unet, 0.0, None):
        torch.testing.assert_close(run(unet), plain, atol=1e-5, rtol=1e-5)


def test_random_targets_come_again_with_the_seed(unet):
    with AgentDiffusion(unet, 0.5, None, seed=3) as joined:
        first, second = run(unet), run(unet)
        joined.reset()
        assert torch.equal(run(unet), first) and not torch.equal(first, second)
    with AgentDiffusion(unet, 0.5, None, random=False):
        assert torch.equal(run(unet), run(unet))


def test_a_schedule_goes_by_steps(unet):
    schedule = {0: {"ratio": 0.5, "agent_ratio": None}, 2: {"ratio": 0.0}}
    plain = run(unet)
    with AgentDiffusion(unet, schedule=schedule, random=False):
        made = [run(unet) for _ in range(4)]
    assert not torch.allclose(made[0], plain, atol=1e-5) and torch.equal(made[0], made[1])
    torch.testing.assert_close(made[2], plain, atol=1e-5, rtol=1e-5)
    AgentDiffusion(unet, schedule=AGENT_SD_SCHEDULE)


def test_only_blocks_of_large_maps_are_served(unet):
    seen = []
    with AgentDiffusion(unet, 0.5, random=False) as joined:
        merge_of = joined.merge_of
        joined.merge_of = lambda x: seen.append((x.shape[1], merge_of(x))) or seen[-1][1]
        run(unet)
    assert {n for n, made in seen if made is None} == {16} and {n for n, made in seen if made} == {64}


def test_bad_arguments(unet):
    with pytest.raises(TypeError, match="model"):
        AgentDiffusion("unet")
    with pytest.raises(UnsupportedModelError, match="BasicTransformerBlock"):
        AgentDiffusion(nn.Linear(2, 2)).attach()
    with pytest.raises(ValueError, match="agent_ratio"):
        AgentDiffusion(unet, agent_ratio=1.5)
    with pytest.raises(ValueError, match="schedule"):
        AgentDiffusion(unet, schedule={0: {"sx": 4}})
