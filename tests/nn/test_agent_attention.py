"""Agent attention: the op against two explicit softmaxes, the layer's symmetries and limits, blocks, windows and stripes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import regard
from regard.nn.spatial.agent_attention import AgentBias
from regard.nn.spatial.grids import from_windows, to_windows
from regard.ops import agent_attention

Agent = regard.nn.AgentAttention
Block = regard.nn.AgentBlock
CSWin = regard.nn.AgentCSWinBlock
Stripe = regard.nn.AgentStripeAttention


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.double, **kwargs)


def explicit(q, k, v, agents, bias1=0.0, bias2=0.0, scale=None, scale2=None, shortcut=0.0):
    """Both softmaxes as matrices."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first = (scale * agents @ k.mT + bias1).softmax(-1)
    second = ((scale if scale2 is None else scale2) * q @ agents.mT + bias2).softmax(-1)
    return second @ first @ v + (shortcut * v if shortcut else 0.0)


# the op


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 2),
    q_len=st.integers(1, 9),
    kv_len=st.integers(1, 9),
    agents=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_op_is_two_softmaxes(batch, kv_heads, group, q_len, kv_len, agents, seed):
    torch.manual_seed(seed)
    heads = kv_heads * group
    q, a = randn(batch, heads, q_len, 4), randn(batch, heads, agents, 4)
    k, v = randn(batch, kv_heads, kv_len, 4), randn(batch, kv_heads, kv_len, 3)
    bias1, bias2 = randn(1, heads, agents, kv_len), randn(heads, q_len, 1)
    shortcut = 0.075 if q_len == kv_len else 0.0
    have = agent_attention(q, k, v, a, bias1, bias2, 0.3, 0.9, shortcut)
    torch.testing.assert_close(have, explicit(q, k, v, a, bias1, bias2, 0.3, 0.9, shortcut))


def test_all_queries_as_agents_give_the_closed_form():
    q, k, v = randn(2, 3, 6, 4), randn(2, 3, 5, 4), randn(2, 3, 5, 4)
    want = (q @ q.mT / 2).softmax(-1) @ (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(agent_attention(q, k, v, q), want)


def test_one_agent_gives_every_query_the_same():
    q, k, v, a = randn(2, 3, 6, 4), randn(2, 3, 5, 4), randn(2, 3, 5, 4), randn(2, 3, 1, 4)
    out = agent_attention(q, k, v, a, bias2=randn(1, 3, 6, 1))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(a, k, v).expand_as(out))


def test_rows_average_the_values():
    q, k, v, a = randn(1, 2, 6, 4), randn(1, 2, 6, 4), torch.full((1, 2, 6, 3), 0.7).double(), randn(1, 2, 3, 4)
    out = agent_attention(q, k, v, a, randn(2, 3, 6), randn(2, 6, 3))
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(agent_attention(q, k, v, a, shortcut=0.5), 1.5 * v)


def test_forbidden_keys_and_empty_rows():
    q, k, v, a = (randn(1, 2, n, 4, requires_grad=True) for n in (6, 5, 5, 3))
    bias1 = torch.zeros(3, 5).double()
    bias1[:, 2] = -torch.inf
    kept = [0, 1, 3, 4]
    want = agent_attention(q, k[:, :, kept], v[:, :, kept], a)
    torch.testing.assert_close(agent_attention(q, k, v, a, bias1), want)
    bias2 = torch.zeros(6, 3).double()
    bias2[4] = -torch.inf
    out = agent_attention(q, k, v, a, bias2=bias2)
    assert not out[:, :, 4].any() and out.isfinite().all()
    out.square().sum().backward()
    assert not q.grad[:, :, 4].any() and all(t.grad.isfinite().all() for t in (q, k, v, a))


def test_op_gradients():
    inputs = [randn(1, 2, n, 3, requires_grad=True) for n in (4, 4, 4, 2)]
    biases = [randn(1, 2, 2, 4, requires_grad=True), randn(1, 2, 4, 2, requires_grad=True)]
    torch.autograd.gradcheck(lambda *t: agent_attention(*t, 0.5, 0.8, 0.1), [*inputs, *biases])


@pytest.mark.parametrize("q_len, kv_len, agents", [(0, 3, 2), (1, 1, 1), (3, 3, 0), (3, 0, 2)])
def test_op_at_its_shortest(q_len, kv_len, agents):
    q, k, v, a = (torch.randn(2, 2, n, 4) for n in (q_len, kv_len, kv_len, agents))
    out = agent_attention(q, k, v, a)
    assert out.shape == (2, 2, q_len, 4) and out.isfinite().all()
    if agents == 0 or kv_len == 0:
        assert not out.any()
    if agents == 0:
        torch.testing.assert_close(agent_attention(q, k, v, a, shortcut=0.5), 0.5 * v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_op_half_types(dtype):
    tensors = [torch.randn(2, 2, n, 8) for n in (6, 9, 9, 3)]
    out = agent_attention(*(t.to(dtype) for t in tensors))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), agent_attention(*tensors), atol=0.02, rtol=0.02)


def test_op_says_what_is_wrong():
    q, k, a = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 2, 3)
    with pytest.raises(ValueError, match="^agents"):
        agent_attention(q, k, k, a[:, :1])
    with pytest.raises(ValueError, match="^agents"):
        agent_attention(q, k, k, a.double())
    with pytest.raises(ValueError, match="^bias1"):
        agent_attention(q, k, k, a, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="^bias2"):
        agent_attention(q, k, k, a, bias2=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="^shortcut"):
        agent_attention(q, k, k, a, shortcut=0.1)
    with pytest.raises(TypeError, match="^q"):
        agent_attention([1.0], k, k, a)


# the layer


def layer(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Agent(*args, **kwargs).double().eval()


def parts_of(module, x):
    """q, k, v with heads, and what the convolution adds, computed apart from the layer's forward (no class token, no reduction)."""
    q, k, v = (
        t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (module.q(x), *module.kv(x).chunk(2, -1))
    )
    image = v.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, module.grid)
    return q, k, v, module.local(image).flatten(2).transpose(1, 2)


def test_an_agent_for_every_token():
    module = layer(8, 2, (3, 4), (3, 4), qkv_bias=True)
    x = randn(2, 12, 8)
    q, k, v, local = parts_of(module, x)
    bias1, bias2 = module.bias()
    out = explicit(q, k, v, q, bias1, bias2).transpose(1, 2).flatten(2) + local
    torch.testing.assert_close(module(x), module.proj(out))


def test_one_agent_leaves_only_the_convolution_to_tell_tokens_apart():
    module = layer(8, 2, (3, 4), 1)
    torch.nn.init.zeros_(module.local.weight)
    out = module(randn(2, 12, 8))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def swap_axes(module, agent_rows, agent_columns):
    """The same layer for images with height and width exchanged."""
    other = layer(module.dim, module.num_heads, module.grid[::-1], (agent_columns, agent_rows))

    def agents(t, axis):
        return t.unflatten(axis, (agent_rows, agent_columns)).transpose(axis, axis + 1).flatten(axis, axis + 1)

    state = {name: t for name, t in module.state_dict().items() if not name.startswith("bias.")}
    state["local.weight"] = state["local.weight"].mT
    bias = module.bias
    state["bias.key_map"], state["bias.query_map"] = agents(bias.key_map.mT, 1), agents(bias.query_map.mT, 1)
    state["bias.key_rows"], state["bias.key_columns"] = agents(bias.key_columns.mT, 2), agents(bias.key_rows.mT, 2)
    state["bias.query_rows"] = agents(bias.query_columns.transpose(2, 3), 4)
    state["bias.query_columns"] = agents(bias.query_rows.transpose(2, 3), 4)
    other.load_state_dict(state)
    return other


def test_height_and_width_are_treated_alike():
    module = layer(8, 2, (6, 4), (3, 2))
    for parameter in module.bias.parameters():
        torch.nn.init.normal_(parameter)
    x = randn(2, 24, 8)
    turned = x.unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2)
    have = swap_axes(module, 3, 2)(turned).unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(have, module(x))


def test_class_token_is_a_key_like_any_other_and_nothing_else():
    module = layer(8, 2, 4, 4, cls_tokens=1)
    x = randn(1, 17, 8)
    with torch.no_grad():
        module.bias.key_class.fill_(-torch.inf)  # now nobody reads it
    out = module(x)
    x2 = torch.cat([randn(1, 1, 8), x[:, 1:]], 1)
    torch.testing.assert_close(module(x2)[:, 1:], out[:, 1:])
    plain = layer(8, 2, 4, 4)
    plain.load_state_dict({name: t for name, t in module.state_dict().items() if "class" not in name})
    torch.testing.assert_close(plain(x[:, 1:]), out[:, 1:])
    assert (module(x2)[:, 0] - out[:, 0]).abs().max() > 1e-6  # it still asks with its own query


def test_two_class_tokens():
    module = layer(8, 2, 3, 4, cls_tokens=2)
    assert module(randn(2, 11, 8)).shape == (2, 11, 8)


def test_reduced_keys():
    module = layer(
        8, 2, (7, 5), 4, sr_ratio=2
    )  # 3 x 2 keys: the odd row and column are cut off, as strided convolutions do
    assert module.bias()[0].shape == (1, 2, 4, 6)
    x = randn(2, 35, 8)
    out = module(x)
    assert out.shape == x.shape
    module.local.weight.data.zero_()
    image = x.unflatten(1, (7, 5)).clone()
    image[:, 6], image[:, :, 4] = 0.0, 0.0
    module.q.weight.data.zero_()  # queries and agents alike: only the keys tell
    torch.testing.assert_close(module(image.flatten(1, 2)), module(x))


def test_the_own_grid_is_the_default():
    module = layer(8, 2, (4, 6), 4, sr_ratio=2)
    x = randn(2, 24, 8)
    assert torch.equal(module(x, grid=(4, 6)), module(x))
    same = layer(8, 2, (4, 6), 4, sr_ratio=2, agent_grid=2)
    assert torch.equal(same(x), module(x))


def test_biases_of_other_grids_are_interpolated():
    bias = AgentBias(2, (2, 2), (4, 4), (4, 4), cls_tokens=1)
    for parameter in bias.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    keys, queries = bias((3, 9), (5, 8), (3, 2))
    assert keys.shape == (1, 2, 6, 1 + 27) and queries.shape == (1, 2, 1 + 40, 6)
    torch.testing.assert_close(keys[..., 1:], torch.full_like(keys[..., 1:], 0.75))  # map + row + column
    torch.testing.assert_close(queries[..., 0, :], torch.full_like(queries[..., 0, :], 0.25))
    torch.nn.init.normal_(bias.key_rows)
    torch.nn.init.zeros_(bias.key_map)
    torch.nn.init.zeros_(bias.key_columns)
    rows = bias((8, 4))[0][..., 1:].unflatten(-1, (8, 4))
    want = F.interpolate(bias.key_rows[0, ..., 0], size=8, mode="linear")
    torch.testing.assert_close(rows, want[None, ..., None].expand_as(rows))


def test_agents_are_interpolated_on_their_own_grid():
    bias = AgentBias(1, (2, 3), (2, 2), (2, 2), cls_tokens=1)
    with torch.no_grad():
        bias.key_class.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])[None, None, :, None])  # the agent's row
    keys, _ = bias(agent_grid=(2, 5))
    torch.testing.assert_close(keys[0, 0, :, 0], torch.tensor([0.0] * 5 + [1.0] * 5))


def test_layer_on_another_grid_and_with_other_agents():
    module = layer(8, 2, 4, 4, agent_grid=(3, 2), cls_tokens=1)
    assert module(randn(1, 1 + 30, 8), grid=(6, 5)).shape == (1, 31, 8)


def test_dropout_only_in_training():
    module = layer(8, 2, 4, 4, attn_drop=0.5, proj_drop=0.5)
    x = randn(1, 16, 8)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_layer_gradients():
    module = layer(4, 2, (2, 3), (1, 2), cls_tokens=1)
    x = randn(1, 7, 4, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    torch.autograd.gradcheck(run, (x, *module.parameters()))


def test_batch_mates_do_not_matter_and_input_is_kept():
    module = layer(8, 2, 4, 4, cls_tokens=1)
    x = randn(3, 17, 8)
    copy = x.clone()
    out = module(x)
    assert torch.equal(x, copy)
    torch.testing.assert_close(module(x[1:2])[0], out[1])


@pytest.mark.parametrize(
    "module",
    [
        Agent(8, 2, 4, 4, cls_tokens=1, qkv_bias=True),
        Agent(8, 2, 4, 4, sr_ratio=2),
        Block(8, 2, 4, 4, window=2),
        CSWin(8, 2, 4, 2, 4, qkv_bias=True),
        Stripe(8, 2, 4, (4, 2), 4),
    ],
)
def test_our_own_state_dict_loads_as_it_is(module):
    regard.load_official(module, module.state_dict())


@pytest.mark.parametrize(
    "args, kwargs, error, named",
    [
        ((8, 3, 4, 4), {}, ValueError, "dim"),
        ((8, 2, 4, 5), {}, ValueError, "agent_num"),
        ((8, 2, 4, 4), {"cls_tokens": 1, "sr_ratio": 2}, ValueError, "cls_tokens"),
        ((8, 2, 4, 4), {"sr_ratio": 5}, ValueError, "sr_ratio"),
        ((8, 2, 4, 4), {"kernel_size": 2}, ValueError, "kernel_size"),
        ((8, 2, 4, 4), {"attn_drop": 1.0}, ValueError, "attn_drop"),
        ((8, 2, (4, 4, 4), 4), {}, TypeError, "grid"),
        ((8, 2, 0, 4), {}, ValueError, "grid"),
    ],
)
def test_bad_arguments(args, kwargs, error, named):
    with pytest.raises(error, match=f"^{named}"):
        Agent(*args, **kwargs)


def test_bad_input():
    with pytest.raises(ValueError, match="^x: "):
        Agent(8, 2, 4, 4)(torch.randn(1, 15, 8))
    with pytest.raises(ValueError, match="^x: "):
        Agent(8, 2, 4, 4)(torch.randn(1, 16, 8), grid=(3, 5))
    with pytest.raises(ValueError, match="^grid"):
        Agent(8, 2, 4, 4, sr_ratio=4)(torch.randn(1, 6, 8), grid=(2, 3))
    with pytest.raises(ValueError, match="^window"):
        Block(8, 2, 8, 4, window=3)
    with pytest.raises(ValueError, match="^shift"):
        Block(8, 2, 8, 4, window=4, shift=4)
    with pytest.raises(ValueError, match="^shift"):
        Block(8, 2, 8, 4, shift=1)
    with pytest.raises(ValueError, match="^grid"):
        Block(8, 2, 8, 4, window=4)(torch.randn(1, 64, 8), grid=8)
    with pytest.raises(ValueError, match="^stripe"):
        Stripe(8, 2, 8, (3, 8), 4)
    with pytest.raises(ValueError, match="^num_heads"):
        CSWin(8, 1, 8, 2, 4)
    with pytest.raises(ValueError, match="^x: "):
        CSWin(8, 2, 8, 2, 4)(torch.randn(1, 63, 8))
    with pytest.raises(ValueError, match="^k: "):
        Stripe(8, 2, 4, (4, 2), 4)(torch.randn(1, 16, 8), torch.randn(1, 15, 8), torch.randn(1, 16, 8))


# windows, blocks, stripes


def test_windows_come_back():
    maps = torch.randn(2, 6, 8, 3)
    windows = to_windows(maps, (3, 2))
    assert windows.shape == (2 * 2 * 4, 6, 3)
    assert torch.equal(windows[1, 0], maps[0, 0, 2])
    assert torch.equal(from_windows(windows, (3, 2), (6, 8)), maps)
    with pytest.raises(ValueError, match="^window"):
        to_windows(maps, (4, 2))


def block(cls, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs).double().eval()


def test_windows_do_not_see_each_other():
    module = block(Block, 8, 2, (8, 4), 4, window=(4, 2))
    x = randn(1, 32, 8)
    near = x.unflatten(1, (8, 4)).clone()
    near[:, 4:, 2:] += 1.0
    moved = (module(near.flatten(1, 2)) - module(x)).abs().amax(-1).unflatten(1, (8, 4))[0] > 1e-12
    assert moved[4:, 2:].all() and moved.sum() == 8


def test_shift_is_a_roll():
    shifted, plain = block(Block, 8, 2, 8, 4, window=4, shift=2), block(Block, 8, 2, 8, 4, window=4)
    x = randn(2, 64, 8)
    rolled = x.unflatten(1, (8, 8)).roll((-2, -2), (1, 2)).flatten(1, 2)
    want = plain(rolled).unflatten(1, (8, 8)).roll((2, 2), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(shifted(x), want)


def test_a_window_as_large_as_the_grid_is_no_window():
    x = randn(2, 16, 8)
    plain = block(Block, 8, 2, 4, 4)
    for window in (4, 7):
        torch.testing.assert_close(block(Block, 8, 2, 4, 4, window=window, shift=3)(x), plain(x))


def test_block_is_attention_then_mlp():
    module = block(Block, 8, 2, 4, 4, cls_tokens=1, mlp_ratio=2.0)
    x = randn(2, 17, 8)
    half = x + module.attn(module.norm1(x))
    want = half + module.mlp.fc2(F.gelu(module.mlp.fc1(module.norm2(half))))
    torch.testing.assert_close(module(x), want)


def test_drop_path_leaves_out_whole_samples():
    module = block(Block, 8, 2, 2, 1, drop_path=0.5)
    torch.nn.init.zeros_(module.mlp.fc2.weight)
    torch.nn.init.zeros_(module.mlp.fc2.bias)
    x = randn(64, 4, 8)
    branch = module(x) - x
    module.train()
    ratio = ((module(x) - x) / branch).flatten(1)
    kept = ratio.mean(1).round()
    assert set(kept.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(ratio, kept[:, None].expand_as(ratio))


def test_a_stripe_over_the_whole_grid_is_the_layer():
    whole = layer(8, 2, (3, 4), 1)
    stripe = block(Stripe, 8, 2, (3, 4), (3, 4), 1)
    stripe.load_state_dict({name: t for name, t in whole.state_dict().items() if name.startswith(("bias.", "local."))})
    x = randn(2, 12, 8)
    k, v = whole.kv(x).chunk(2, -1)
    torch.testing.assert_close(whole.proj(stripe(whole.q(x), k, v)), whole(x))


def test_stripes_do_not_see_each_other():
    module = block(Stripe, 8, 2, (4, 6), (4, 2), 4)
    q, k, v = randn(3, 1, 24, 8)
    out = module(q, k, v)
    v = v.unflatten(1, (4, 6)).clone()
    v[:, 3, 5] += 1.0
    moved = (module(q, k, v.flatten(1, 2)) - out).abs().amax(-1).unflatten(1, (4, 6))[0] > 1e-12
    assert moved[:, 4:].all() and not moved[:, :4].any()


def test_cswin_has_one_branch_in_the_last_stage():
    assert len(CSWin(8, 2, 4, 2, 4).attns) == 2
    assert len(CSWin(8, 2, 4, 4, 4).attns) == 1
    assert len(CSWin(8, 2, 4, 2, 4, last_stage=True).attns) == 1
    assert [branch.stripe for branch in CSWin(8, 2, (4, 6), 2, 4).attns] == [(4, 2), (2, 6)]


def test_biases_start_small():
    bias = Agent(48, 3, 14, 49).bias
    for parameter in bias.parameters():
        assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.2)
