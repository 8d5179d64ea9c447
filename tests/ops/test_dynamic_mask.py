"""Dynamic mask attention: the interval form against the definition, limits, gradients, smoothing, and errors."""

import pytest
import torch

from regard import masks
from regard.ops import attention, dynamic_mask_attention
from regard.ops.select import block_smooth, relu_bias_mask, topk_bias_mask, topk_expiry
from regard.ops.select.bias_masks import LiveKeys


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(rows=21, keys=21, batch=2, seed=0):
    return (
        randn(batch, 4, rows, 8, seed=seed),
        randn(batch, 2, keys, 8, seed=seed + 1),
        randn(batch, 2, keys, 5, seed=seed + 2),
    )


@pytest.mark.parametrize("keep", [1, 3, 40, 200])
@pytest.mark.parametrize("length", [1, 5, 100, 300])
def test_expiry_is_the_prefix_topk(keep, length):
    values = randn(3, length, seed=length)
    expiry = topk_expiry(values, keep)
    for i in range(length):
        kept = values[:, : i + 1].topk(min(keep, i + 1), dim=-1).indices
        wanted = torch.zeros(3, i + 1, dtype=torch.bool).scatter(-1, kept, True)
        assert torch.equal(i < expiry[:, : i + 1], wanted)


def test_equal_values_keep_a_sliding_window():
    expiry = topk_expiry(torch.zeros(1, 1, 50), 7)
    live = LiveKeys(expiry, 1) & masks.causal
    window = (masks.sliding_window(7) & masks.causal).materialize(50, 50)
    assert torch.equal(live.materialize(50, 50), window)


def test_bounds_never_lie():
    expiry = topk_expiry(randn(2, 2, 64), 9)
    mask = LiveKeys(expiry, 4)
    full = mask.materialize(64, 64, batch=2, num_heads=4)
    lo, hi = torch.arange(0, 64, 8).view(1, 1, -1, 1), torch.arange(7, 64, 8).view(1, 1, -1, 1)
    b, h = torch.arange(2).view(-1, 1, 1, 1), torch.arange(4).view(1, -1, 1, 1)
    some, every = mask.bounds(b, h, lo, hi, lo.transpose(2, 3), hi.transpose(2, 3))
    tiles = full.unflatten(3, (8, 8)).unflatten(2, (8, 8))
    assert torch.equal(every, tiles.all(-1).all(3)) and bool((some | ~tiles.any(-1).any(3)).all())
    assert not bool(some.all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("select", ["topk", "relu"])
@pytest.mark.parametrize("block", [None, 1, 4])
@pytest.mark.parametrize("sizes", [(21, 21), (6, 21), (1, 21)])
def test_bias_per_key_is_bias_per_query(causal, select, block, sizes):
    q, k, v = given(*sizes)
    bias = randn(2, 2, sizes[1], seed=9)
    exists = torch.ones(2, sizes[1], dtype=torch.bool)
    exists[1, :7] = False
    for key_mask in (None, exists):
        options = {"causal": causal, "select": select, "block": block, "key_mask": key_mask, "return_lse": True}
        fast = dynamic_mask_attention(q, k, v, bias, 5, **options)
        plain = dynamic_mask_attention(q, k, v, bias[:, :, None].expand(-1, -1, sizes[0], -1), 5, **options)
        for a, b in zip(fast, plain):
            torch.testing.assert_close(a, b)


def test_limits():
    q, k, v = given()
    zero = torch.zeros(2, 2, 21, dtype=torch.float64)
    dense = attention(q, k, v, mask=masks.causal)
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, zero, 21), dense)
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, zero, 21, causal=False), attention(q, k, v))
    window = attention(q, k, v, mask=masks.causal & masks.sliding_window(4))
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, zero, 4), window)
    bias = randn(2, 2, 21, seed=3)
    by_head = bias.repeat_interleave(2, 1)[:, :, None]
    torch.testing.assert_close(
        dynamic_mask_attention(q, k, v, bias, 99), attention(q, k, v, mask=masks.causal, bias=by_head)
    )
    torch.testing.assert_close(
        dynamic_mask_attention(q, k, v, bias, 5), dynamic_mask_attention(q, k, v, bias + 3.0, 5)
    )  # only differences count
    future = bias.clone()
    future[..., 15:] += 10.0
    torch.testing.assert_close(
        dynamic_mask_attention(q, k, v, bias, 5)[:, :, :15], dynamic_mask_attention(q, k, v, future, 5)[:, :, :15]
    )
    empty = dynamic_mask_attention(q, k, v, bias, 5, key_mask=torch.zeros(2, 21, dtype=torch.bool))
    assert not empty.any()
    assert dynamic_mask_attention(q[:, :, :0], k, v, bias, 5).shape == (2, 4, 0, 5)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradients_reach_kept_biases_only(backend):
    q, k, v = (x.requires_grad_() for x in given(80, 80, 1))
    bias = randn(1, 2, 80, seed=4).requires_grad_()
    out = dynamic_mask_attention(q, k, v, bias, 6, backend=backend)
    found = torch.autograd.grad(out.square().sum(), (q, k, v, bias))
    plain = dynamic_mask_attention(q, k, v, bias[:, :, None].expand(-1, -1, 80, -1), 6, backend="eager")
    for a, b in zip(found, torch.autograd.grad(plain.square().sum(), (q, k, v, bias))):
        torch.testing.assert_close(a, b)
    never = topk_expiry(bias.detach(), 6) <= torch.arange(80)
    assert bool(never.any()) and not found[3][never].any()


def test_masks_of_query_heads():
    q, k, v = given()
    bias = randn(2, 2, 21, seed=5)
    own = torch.rand(2, 4, 21, 21, generator=torch.Generator().manual_seed(1)) < 0.5
    found = dynamic_mask_attention(q, k, v, bias, 3, mask=own)
    by_head = bias.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 21, -1)
    kept = topk_bias_mask(by_head, 3, own & torch.ones(21, 21, dtype=torch.bool).tril())
    torch.testing.assert_close(found, attention(q, k, v, mask=kept, bias=by_head))
    shared = own[:, :2]
    kept = topk_bias_mask(
        bias[:, :, None].expand(-1, -1, 21, -1), 3, shared & torch.ones(21, 21, dtype=torch.bool).tril()
    )
    wanted = attention(q, k, v, mask=kept.repeat_interleave(2, 1), bias=by_head)
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, bias, 3, mask=shared), wanted)


def test_smoothing_by_hand():
    kept = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    assert block_smooth(kept, 3).int().tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert block_smooth(kept, 4).int().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert torch.equal(block_smooth(kept, 1), kept)
    assert relu_bias_mask(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep: got 0"),
        ({"select": "top"}, "select: unknown name 'top'"),
        ({"block": 0}, "block: got 0"),
        ({"key_bias": torch.zeros(2, 4, 21)}, r"key_bias: got 'shape \(2, 4, 21\)'"),
        ({"key_mask": torch.ones(2, 20, dtype=torch.bool)}, "key_mask: got"),
        ({"mask": torch.ones(2, 3, 21, 21, dtype=torch.bool)}, "mask: got"),
    ],
)
def test_bad_input(change, message):
    q, k, v = given()
    options = {"key_bias": torch.zeros(2, 2, 21, dtype=torch.float64), "keep": 4} | change
    with pytest.raises((ValueError, TypeError), match=message):
        dynamic_mask_attention(q, k, v, options.pop("key_bias"), options.pop("keep"), **options)
