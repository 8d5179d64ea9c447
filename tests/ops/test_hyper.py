"""HyperAttention: exact limits, unbiased estimates, causality, and the authors' variant."""

import math

import pytest
import torch

from regard.ops import attention, hyper_attention, masks
from regard.ops.select import angular_lsh, draw_projections


def qkv(n, m=None, heads=2, kv_heads=2, dim=8, batch=1, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=dtype)
    k = torch.randn(batch, kv_heads, m or n, dim, generator=g, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, m or n, dim, generator=g, dtype=dtype)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# the hash


def test_neighbouring_buckets_of_the_paper_differ_in_one_plane():
    count = 5
    signs = torch.tensor([[1.0 if pattern >> i & 1 else -1.0 for i in range(count)] for pattern in range(2**count)])
    bucket = angular_lsh(signs[None, None], torch.eye(count))[0, 0]
    assert sorted(bucket.tolist()) == list(range(2**count))
    in_order = signs[bucket.argsort()]
    assert bool(((in_order[1:] != in_order[:-1]).sum(-1) == 1).all())
    pattern = torch.arange(2**count)
    assert torch.equal(
        angular_lsh(signs[None, None], torch.eye(count), variant="released")[0, 0], pattern ^ pattern >> 1
    )


def test_hash_depends_on_direction_alone_and_planes_on_the_seed():
    x = torch.randn(2, 3, 50, 6, generator=gen())
    planes = draw_projections(6, 9, generator=gen(1))
    assert planes.shape == (1, 1, 6, 9) and torch.equal(planes, draw_projections(6, 9, generator=gen(1)))
    assert torch.equal(angular_lsh(x, planes), angular_lsh(7 * x, planes))
    assert int(angular_lsh(x, planes[..., :0]).abs().sum()) == 0


# exact limits


@pytest.mark.parametrize("m", [64, 61])
def test_one_block_is_exact(m):
    q, k, v = qkv(30, m)
    out, lse = hyper_attention(q, k, v, block_size=64, min_len=1, return_lse=True)
    want, want_lse = attention(q, k, v, return_lse=True)
    assert torch.allclose(out, want, atol=1e-6) and torch.allclose(lse, want_lse, atol=1e-5)


def test_every_key_drawn_once_is_exact():
    q, k, v = qkv(20, 33)
    drawn = torch.stack([torch.randperm(33, generator=gen(i)) for i in range(2)])[None]
    out, lse = hyper_attention(q, k, v, block_size=0, samples=[drawn], min_len=1, return_lse=True)
    want, want_lse = attention(q, k, v, return_lse=True)
    assert torch.allclose(out, want, atol=1e-6) and torch.allclose(lse, want_lse, atol=1e-5)


def test_all_keys_outside_the_block_drawn_once_is_exact():
    # blocks of 8 of 32; the weight of a draw is 32 / m, so draw every key once (m = 32): those of the own block are left out
    q, k, v = qkv(32)
    drawn = torch.arange(32).expand(1, 2, 32)
    out = hyper_attention(q, k, v, block_size=8, samples=[drawn], min_len=1, projections=4, generator=gen())
    assert torch.allclose(out, attention(q, k, v), atol=1e-6)
    counted = hyper_attention(
        q, k, v, block_size=8, samples=[drawn], min_len=1, projections=4, generator=gen(), collision_mask=False
    )
    assert not torch.allclose(counted, out, atol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_short_inputs_are_exact(variant):
    q, k, v = qkv(31)
    for causal, mask in ((False, None), (True, masks.causal)):
        out = hyper_attention(q, k, v, causal=causal, min_len=32, variant=variant)
        assert torch.allclose(out, attention(q, k, v, mask=mask), atol=1e-6)


def test_causal_rows_before_the_first_cut_are_exact_also_at_odd_lengths():
    q, k, v = qkv(61)
    out = hyper_attention(q, k, v, causal=True, min_len=12, block_size=4, samples=3, projections=3, generator=gen())
    want = attention(q, k, v, mask=masks.causal)
    assert torch.allclose(out[:, :, :8], want[:, :, :8], atol=1e-6)
    assert not torch.allclose(out[:, :, 8:], want[:, :, 8:], atol=1e-3)


def test_keys_before_the_queries():
    q, k, v = qkv(20, 50)
    assert torch.allclose(
        hyper_attention(q, k, v, causal=True, min_len=21), attention(q, k, v, mask=masks.causal), atol=1e-6
    )
    drawn = torch.arange(30).expand(1, 2, 30)
    out = hyper_attention(q, k, v, causal=True, min_len=20, block_size=0, samples=[drawn])
    assert torch.allclose(out, attention(q, k, v, mask=masks.causal), atol=1e-6)


# what is random


def test_row_sums_are_unbiased_over_seeds():
    q, k, v = qkv(24, 60, heads=1, kv_heads=1, dtype=torch.float64)
    want = attention(q, k, v, return_lse=True)[1]
    planes = draw_projections(8, 4, generator=gen(3))
    options = {"block_size": 12, "samples": 40, "projections": planes, "min_len": 1, "return_lse": True}
    g = gen(5)
    ratio = torch.stack([(hyper_attention(q, k, v, generator=g, **options)[1] - want).exp() for _ in range(400)])
    error = ratio.std(0) / math.sqrt(400)
    assert bool(((ratio.mean(0) - 1).abs() < 4.5 * error + 1e-3).all())
    counted = torch.stack(
        [(hyper_attention(q, k, v, generator=g, collision_mask=False, **options)[1] - want).exp() for _ in range(50)]
    )
    assert float(counted.mean()) > 1.1  # keys of the own block count twice


def test_the_generator_alone_decides():
    q, k, v = qkv(60)
    options = {"causal": True, "min_len": 10, "block_size": 4, "samples": 3}
    first = hyper_attention(q, k, v, generator=gen(1), **options)
    assert torch.equal(first, hyper_attention(q, k, v, generator=gen(1), **options))
    assert not torch.equal(first, hyper_attention(q, k, v, generator=gen(2), **options))
    torch.manual_seed(4)
    again = hyper_attention(q, k, v, **options)
    torch.manual_seed(4)
    assert torch.equal(again, hyper_attention(q, k, v, **options))


def test_shared_draws_do_not_depend_on_the_batch():
    q, k, v = qkv(60, batch=3)
    options = {"causal": True, "min_len": 10, "block_size": 4, "samples": 3, "share_draws": True}
    whole = hyper_attention(q, k, v, generator=gen(1), **options)
    alone = hyper_attention(q[1:2], k[1:2], v[1:2], generator=gen(1), **options)
    assert torch.allclose(whole[1:2], alone, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_later_keys_and_values_are_never_read(variant):
    q, k, v = qkv(53)
    options = {"causal": True, "min_len": 8, "block_size": 4, "samples": 3, "variant": variant}
    before = hyper_attention(q, k, v, generator=gen(), **options)
    for t in (7, 26, 40):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t], v2[:, :, t] = 3.0, 100.0
        after = hyper_attention(q, k2, v2, generator=gen(), **options)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t], after[:, :, t])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_shared_kv_heads_equal_repeated_ones(causal, variant):
    q, k, v = qkv(50, heads=6, kv_heads=2)
    options = {"causal": causal, "min_len": 8, "block_size": 6, "samples": 5, "variant": variant, "return_lse": True}
    out, lse = hyper_attention(q, k, v, generator=gen(), **options)
    repeated = hyper_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), generator=gen(), **options)
    assert torch.allclose(out, repeated[0], atol=1e-5) and torch.allclose(lse, repeated[1], atol=1e-5)


def test_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(14, heads=1, kv_heads=1, dim=3, dtype=torch.float64))
    for causal in (False, True):

        def run(q, k, v, causal=causal):
            options = {"causal": causal, "min_len": 4, "block_size": 3, "samples": 2, "return_lse": True}
            return hyper_attention(q, k, v, generator=gen(), **options)

        assert torch.autograd.gradcheck(run, (q, k, v))


def test_half_types_and_soft_cap():
    q, k, v = qkv(40)
    options = {"min_len": 8, "block_size": 8, "samples": 8, "projections": 3}
    whole = hyper_attention(q, k, v, generator=gen(), **options)
    half, lse = hyper_attention(*(x.bfloat16() for x in (q, k, v)), generator=gen(), return_lse=True, **options)
    assert half.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.isfinite(half).all()
    capped = hyper_attention(q, k, v, generator=gen(), soft_cap=1e4, **options)
    assert torch.allclose(capped, whole, atol=1e-4)
    assert not torch.allclose(hyper_attention(q, k, v, generator=gen(), soft_cap=0.5, **options), whole, atol=1e-3)


def test_more_blocks_than_queries():
    q, k, v = qkv(3, 64)
    out = hyper_attention(q, k, v, min_len=1, block_size=4, samples=64, generator=gen())
    assert out.shape == q.shape and bool(torch.isfinite(out).all())


def test_bad_input():
    q, k, v = qkv(20)
    with pytest.raises(ValueError, match="k: got '19 keys'"):
        hyper_attention(q, k[:, :, 1:], v[:, :, 1:], causal=True)
    with pytest.raises(ValueError, match="samples: got 0, need at least 1"):
        hyper_attention(q, k, v, block_size=0, samples=0, min_len=1)
    with pytest.raises(ValueError, match="variant"):
        hyper_attention(q, k, v, variant="triton")
    with pytest.raises(ValueError, match="min_len"):
        hyper_attention(q, k, v, min_len=0)
    with pytest.raises(TypeError, match="collision_mask"):
        hyper_attention(q, k, v, collision_mask=3)
    with pytest.raises(ValueError, match="projections"):
        hyper_attention(q, k, v, min_len=1, block_size=4, projections=torch.randn(7, 4))
    with pytest.raises(ValueError, match="too few draws"):
        hyper_attention(q, k, v, min_len=1, block_size=4, samples=[])
    with pytest.raises(ValueError, match="samples: got 'indices"):
        hyper_attention(q, k, v, min_len=1, block_size=4, samples=[torch.full((1, 2, 3), 20)])
    with pytest.raises(TypeError, match="samples"):
        hyper_attention(q, k, v, samples=torch.zeros(1, 2, 3))
