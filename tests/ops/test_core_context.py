"""Core-context attention: exact limits, causality, every token once, and what pooling means."""

import math

import pytest
import torch

from regard.ops import attention, core_context_attention, masks
from regard.ops.core_context import pool_groups, visible_cores
from regard.ops.joint import KeySet, joint_attention


def qkv(length=40, heads=4, kv_heads=2, dim=8, batch=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=dtype)
    k = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, length, dim, generator=g, dtype=dtype)


def definition(q, k, v, group, window, scale, pool="cca", per_head=False):
    """By the text, one query at a time."""
    batch, heads, length = q.shape[:3]
    shared = heads // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    cores_k, cores_v = [], []
    for i in range(length // group):
        own = slice(i * group, (i + 1) * group)
        weights = torch.einsum("bhd,bhgd->bhg", q[:, :, (i + 1) * group - 1], k[:, :, own]).mul(scale).softmax(-1)
        weights = (
            weights.unflatten(1, (-1, shared)).mean(2).repeat_interleave(shared, 1)
            if per_head
            else weights.mean(1, keepdim=True)
        )
        if pool == "mean":
            weights = torch.full_like(weights, 1 / group)
        for found, x in ((cores_k, k), (cores_v, v)):
            found.append(x[:, :, own].amax(2) if pool == "max" else (weights[..., None] * x[:, :, own]).sum(2))
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=q.dtype)
    for p in range(length):
        n = max(0, (p + 1 - window) // group)
        keys = torch.cat([x[:, :, None] for x in cores_k[:n]] + [k[:, :, n * group : p + 1]], 2)
        values = torch.cat([x[:, :, None] for x in cores_v[:n]] + [v[:, :, n * group : p + 1]], 2)
        weights = torch.einsum("bhd,bhmd->bhm", q[:, :, p], keys).mul(scale).softmax(-1)
        out[:, :, p] = torch.einsum("bhm,bhmd->bhd", weights, values)
    return out


@pytest.mark.parametrize("pool", ["cca", "mean", "max"])
@pytest.mark.parametrize("group, window", [(4, 8), (3, 7), (5, 1), (16, 2)])
def test_equals_the_definition(pool, group, window):
    q, k, v = qkv()
    out = core_context_attention(q, k, v, group=group, window=window, pool=pool, scale=0.3)
    assert torch.allclose(out, definition(q, k, v, group, window, 0.3, pool), atol=1e-5)
    own = core_context_attention(q, k, v, group=group, window=window, pool=pool, scale=0.3, per_head=True)
    assert torch.allclose(own, definition(q, k, v, group, window, 0.3, pool, per_head=True), atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 7, 33])
def test_a_window_over_everything_and_groups_of_one_are_exact(length):
    q, k, v = qkv(length)
    want, want_lse = attention(q, k, v, mask=masks.causal, return_lse=True)
    for group, window in ((4, max(1, length)), (1, 3)):
        out, lse = core_context_attention(q, k, v, group=group, window=window, return_lse=True)
        assert torch.allclose(out, want, atol=1e-5) and torch.allclose(lse, want_lse, atol=1e-5)


def test_equal_tokens_count_once_a_group_without_a_bias_for_its_size():
    q, k, v = qkv(32)
    k, v = (x[:, :, ::4].repeat_interleave(4, dim=2) for x in (k, v))
    out = core_context_attention(q, k, v, group=4, window=4)
    p = 30  # sees (31 - 4) // 4 = 6 cores, and tokens 24 .. 30
    keys, values = (torch.cat([x[:, :, :24:4], x[:, :, 24:31]], 2) for x in (k, v))
    assert torch.allclose(out[:, :, p : p + 1], attention(q[:, :, p : p + 1], keys, values), atol=1e-5)


def test_every_token_is_seen_exactly_once():
    for group, window in ((4, 6), (7, 3), (16, 32)):
        position = torch.arange(100)
        cores = visible_cores(position, group, window)
        local = position + 1 - cores * group
        assert bool((local >= torch.minimum(position + 1, torch.tensor(window))).all())
        assert bool((local <= window + group - 1).all())


def test_nothing_comes_from_later_tokens():
    q, k, v = (x.requires_grad_() for x in qkv(30, batch=1))
    out = core_context_attention(q, k, v, group=4, window=5)
    for t in (0, 8, 17, 28):
        grads = torch.autograd.grad(out[:, :, t].sum(), (q, k, v), retain_graph=True)
        assert all(float(grad[:, :, t + 1 :].abs().sum()) == 0 for grad in grads)
    far = torch.autograd.grad(out[:, :, 29].sum(), v)[0]
    assert bool((far.abs().sum((0, 1, 3)) > 0).all())  # and from all earlier ones something


def test_left_padding_shifts_the_groups():
    q, k, v = qkv(40, batch=3)
    start = torch.tensor([0, 5, 38])
    out = core_context_attention(q, k, v, group=4, window=6, start=start)
    for row, first in enumerate(start.tolist()):
        alone = core_context_attention(*(x[row : row + 1, :, first:] for x in (q, k, v)), group=4, window=6)
        assert torch.allclose(out[row : row + 1, :, first:], alone, atol=1e-5)
        assert float(out[row, :, :first].abs().sum()) == 0.0


def rotation(keys, by):
    """Rotary positions with one frequency a pair of channels."""
    half = keys.shape[-1] // 2
    angle = by[:, None, :, None] * 10000 ** (-torch.arange(half, dtype=keys.dtype) / half)
    a, b = keys[..., :half], keys[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_pooling_rotated_keys_is_rotating_pooled_ones():
    length, group = 24, 4
    q, k, v = qkv(length, dtype=torch.float64)
    position = torch.arange(length).expand(2, -1)
    q_turned, k_turned = rotation(q, position), rotation(k, position)
    index = torch.arange(length).view(1, -1, group)
    core, _ = pool_groups(q_turned, k_turned, v, index, length=length, rotate=rotation)
    last = q_turned[:, :, group - 1 :: group].unflatten(1, (2, 2))
    own = k_turned.unflatten(2, (-1, group))
    weights = (torch.einsum("bkhmd,bkmgd->bkhmg", last, own) / math.sqrt(8)).softmax(-1).mean((1, 2))
    pooled = (weights[:, None, ..., None] * k.unflatten(2, (-1, group))).sum(3)
    assert torch.allclose(core, rotation(pooled, position[:, group - 1 :: group]), atol=1e-9)


def test_gradients_half_types_and_soft_cap():
    q, k, v = (x.requires_grad_() for x in qkv(9, 2, 1, 3, 1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: core_context_attention(*x, group=2, window=3), (q, k, v))
    q, k, v = qkv()
    whole = core_context_attention(q, k, v, group=4, window=6)
    half = core_context_attention(*(x.bfloat16() for x in (q, k, v)), group=4, window=6)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), whole, atol=0.05)
    assert torch.allclose(core_context_attention(q, k, v, group=4, window=6, soft_cap=1e4), whole, atol=1e-4)
    assert not torch.allclose(core_context_attention(q, k, v, group=4, window=6, soft_cap=0.3), whole, atol=1e-3)


def test_cores_on_request():
    q, k, v = qkv(18)
    out, lse, core_k, core_v = core_context_attention(
        q, k, v, group=4, window=6, pool="mean", return_lse=True, return_cores=True
    )
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert torch.allclose(core_k, k[:, :, :16].unflatten(2, (4, 4)).mean(3), atol=1e-6)
    assert core_v.shape == (2, 2, 4, 8)


def test_joint_softmax_is_that_of_the_union():
    q, k, v = qkv(20)
    keep = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    sets = [
        KeySet(k[:, :, :13], v[:, :, :13], keep[None, None, :, :13]),
        KeySet(k[:, :, 13:], v[:, :, 13:], keep[None, None, :, 13:]),
        KeySet(k[:, :, :0], v[:, :, :0]),
    ]
    out, lse = joint_attention(q, sets, return_lse=True, scale=0.5)
    want, want_lse = attention(q, k, v, mask=keep[None, None], scale=0.5, return_lse=True)
    assert torch.allclose(out, want, atol=1e-5) and torch.allclose(lse, want_lse, atol=1e-5)
    with pytest.raises(ValueError, match="sets"):
        joint_attention(q, [])


def test_bad_input():
    q, k, v = qkv()
    for options, match in (
        ({"group": 0}, "group"),
        ({"window": 0}, "window"),
        ({"pool": "sum"}, "pool"),
        ({"start": torch.zeros(3, dtype=torch.long)}, "start"),
    ):
        with pytest.raises(ValueError, match=match):
            core_context_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="k: got 'length"):
        core_context_attention(q, k[:, :, 1:], v[:, :, 1:])
