"""Shifted groups: the masks and the op, their limits, and who sees whom."""

import pytest
import torch

from regard import masks, ops


def qkv(heads=4, kv_heads=2, length=24, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    return q, k, v


def by_hand(heads, length, group, shift, sink, moved):
    keep = torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        ahead = group // 2 if h >= heads - moved and shift != "none" else 0
        for i in range(length):
            for j in range(length):
                if shift == "cyclic":
                    a, b = (i - ahead) % length, (j - ahead) % length
                    keep[h, i, j] = a // group == b // group and b <= a
                else:
                    keep[h, i, j] = ((i + ahead) // group == (j + ahead) // group or j < sink) and j <= i
    return keep


@pytest.mark.parametrize(
    ("heads", "kv_heads", "group", "length", "sink", "shift"),
    [
        (4, 2, 8, 24, 0, "clip"),
        (3, 3, 6, 20, 2, "clip"),
        (9, 3, 8, 30, 4, "clip"),
        (6, 2, 7, 30, 1, "clip"),
        (4, 2, 8, 23, 3, "none"),
        (4, 4, 8, 24, 0, "cyclic"),
        (6, 2, 6, 24, 0, "cyclic"),
    ],
)
def test_the_op_and_the_mask_are_the_definition(heads, kv_heads, group, length, sink, shift):
    q, k, v = qkv(heads, kv_heads, length)
    mask = masks.shifted_group(heads, group, shift=shift, sink=sink, length=length)
    keep = by_hand(heads, length, group, shift, sink, moved=heads - heads // 2)
    assert torch.equal(mask.materialize(length, length, num_heads=heads)[0].expand(heads, -1, -1), keep)
    want = ops.attention(q, k, v, mask=keep, backend="eager")
    got = ops.shifted_group_attention(q, k, v, group, shift=shift, sink=sink)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    fast = ops.attention(q.float(), k.float(), v.float(), mask=mask, backend="cpu")
    torch.testing.assert_close(fast.double(), want, rtol=1e-5, atol=1e-5)


def test_limits_are_full_attention():
    q, k, v = qkv()
    want = ops.attention(q, k, v, mask=masks.causal)
    for options in (
        {"group": 24, "shift": "none"},
        {"group": 48},
        {"group": 4, "sink": 24},
        {"group": 24, "shift_heads": 0.0},
    ):
        torch.testing.assert_close(ops.shifted_group_attention(q, k, v, **options), want, rtol=1e-9, atol=1e-9)


def test_only_cyclic_groups_leak_and_only_into_the_first_half_group_of_the_shifted_heads():
    q, k, v = qkv(length=32)
    other = v.clone()
    other[:, :, -1] += 1.0
    for shift, leaks in (("clip", False), ("none", False), ("cyclic", True)):
        one, two = (ops.shifted_group_attention(q, k, values, 8, shift=shift) for values in (v, other))
        changed = (one - two).abs().amax((0, 3)) > 1e-9  # (heads, tokens)
        assert not changed[:2, :-1].any(), shift
        assert changed[2:, :-1].any(1).tolist() == [leaks, leaks]
        if leaks:
            assert changed[2:].any(0).nonzero().flatten().tolist() == [0, 1, 2, 3, 31]


def test_two_layers_reach_one_and_a_half_groups_back():
    keep = masks.shifted_group(2, 8).materialize(32, 32, num_heads=2)[0].any(0)
    reach = (keep.float() @ keep.float()) > 0
    for query in (15, 23, 31):
        assert int(reach[query].nonzero()[0]) <= query - 11


def test_gradients_are_those_of_the_masked_op():
    q, k, v = (t.requires_grad_() for t in qkv(length=24))
    for shift in ("clip", "cyclic"):
        keep = by_hand(4, 24, 8, shift, 0, 2)
        want = torch.autograd.grad(ops.attention(q, k, v, mask=keep, backend="eager").square().sum(), (q, k, v))
        got = torch.autograd.grad(ops.shifted_group_attention(q, k, v, 8, shift=shift).square().sum(), (q, k, v))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_block_local():
    mask = masks.block_local(5, 1) & masks.causal
    i, j = torch.arange(23)[:, None], torch.arange(23)
    want = (j <= i) & (i // 5 - j // 5 <= 1)
    assert torch.equal(mask.materialize(23, 23)[0, 0], want)
    q, k, v = (t.float() for t in qkv(length=23))
    got = ops.attention(q, k, v, mask=mask, backend="cpu")
    torch.testing.assert_close(got, ops.attention(q, k, v, mask=want, backend="eager"), rtol=1e-5, atol=1e-6)
    assert not masks.block_local(4, 0).materialize(8, 8)[0, 0, 3, 4]


def test_per_row():
    kinds = [masks.sliding_window(4), masks.per_head([masks.sink(2), masks.everything])]
    mask = masks.per_row(kinds, torch.tensor([1, 0, 1])) & masks.causal
    got = mask.materialize(70, 70, batch=3, num_heads=2)
    for row, kind in enumerate((1, 0, 1)):
        want = (kinds[kind] & masks.causal).materialize(70, 70, num_heads=2)[0].expand(2, -1, -1)
        assert torch.equal(got[row], want)
    q, k, v = torch.randn(3, 3, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    for backend in ("cpu", "sdpa"):
        one = ops.attention(q, k, v, mask=mask, backend=backend)
        torch.testing.assert_close(one, ops.attention(q, k, v, mask=got, backend="eager"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="masks: got"):
        masks.per_row([], torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "group: got 0"),
        ({"group": 8, "shift": "cyclical"}, "shift: unknown name 'cyclical'"),
        ({"group": 7, "shift": "cyclic"}, "group: got 7, need a divisor of the sequence length, 24"),
        ({"group": 8, "shift": "cyclic", "sink": 2}, "sink: got 2"),
        ({"group": 8, "shift_heads": 1.5}, "shift_heads: got 1.5"),
        ({"group": 8, "sink": -1}, "sink: got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.shifted_group_attention(*qkv(), **options)


def test_cyclic_masks_need_a_length():
    with pytest.raises(ValueError, match="length: got None"):
        masks.shifted_group(4, 8, shift="cyclic")
    with pytest.raises(ValueError, match="length: got 20, need a multiple of the group, 8"):
        masks.shifted_group(4, 8, shift="cyclic", length=20)
    with pytest.raises(ValueError, match="left: got -1"):
        masks.block_local(4, -1)
