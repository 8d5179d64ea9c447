"""Query heads shared among groups: allocations always sum up, limits are GQA, MQA and MHA, conversion, freezing, noise, errors."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.nn import GroupedQueryAttention, convert_to_grouped, pool_heads
from regard.ops import allocate_queries, attention, key_norms, kv_head_of


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=9),
    heads=st.integers(1, 40),
    fix=st.sampled_from(["extremes", "random"]),
)
def test_allocations_sum_to_the_heads(weights, heads, fix):
    torch.manual_seed(0)
    found = allocate_queries(torch.tensor(weights), heads, fix=fix)
    assert sum(found) == heads and min(found) >= 0 and len(found) == len(weights)


def test_allocations_by_hand():
    assert allocate_queries(torch.tensor([1.0, 2.0, 1.0]), 8) == [2, 4, 2]
    assert allocate_queries(torch.tensor([0.0, 3.0, 7.0]), 4) == [0, 1, 3]
    assert allocate_queries(torch.tensor([1.0, 1.0, 1.0]), 4) == [2, 1, 1]  # 1.33 each; the first of the smallest
    assert allocate_queries(torch.tensor([0.0, 0.0]), 4) == [2, 2]
    assert allocate_queries(torch.tensor([float("nan"), 1.0]), 4) == [2, 2]
    assert kv_head_of([0, 3, 1], 4).tolist() == [1, 1, 1, 2]


def test_norms_are_summed_over_the_batch():
    k = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(key_norms(k), torch.stack([k[:, h].flatten(1).norm(dim=1).sum() for h in range(3)]))


def parts(layer, x):
    heads = lambda y, n: y.unflatten(-1, (n, -1)).transpose(1, 2)  # noqa: E731
    kv = layer.num_kv_heads
    return heads(layer.q(x), layer.num_heads), heads(layer.k(x), kv), heads(layer.v(x), kv)


@pytest.mark.parametrize(("groups", "allocation"), [(4, "uniform"), (1, "key_norm"), (2, [2, 2]), (1, "key_norm_diff")])
def test_equal_groups_are_grouped_query_attention(groups, allocation):
    torch.manual_seed(0)
    layer, x = GroupedQueryAttention(16, 4, groups, allocation).eval(), torch.randn(2, 5, 16)
    want = layer.proj(attention(*parts(layer, x)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want)


def test_uneven_groups_read_their_own_keys():
    torch.manual_seed(1)
    layer, x = GroupedQueryAttention(16, 4, 3, [3, 0, 1]).eval(), torch.randn(2, 5, 16)
    q, k, v = parts(layer, x)
    heads = [attention(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1]) for h, g in enumerate((0, 0, 0, 2))]
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, 1).transpose(1, 2).flatten(2)))
    layer(x).sum().backward()
    assert not layer.k.weight.grad[4:8].any() and layer.k.weight.grad[:4].any()


def test_the_largest_keys_get_the_most_queries_and_freezing_holds_them():
    torch.manual_seed(2)
    layer, x = GroupedQueryAttention(32, 8, 4, "key_norm").eval(), torch.randn(1, 6, 32)
    with torch.no_grad():
        layer.k.weight[8:12] *= 5
    layer(x)
    assert layer.allocation.index(max(layer.allocation)) == 2 and sum(layer.allocation) == 8
    kept = list(layer.allocation)
    layer.freeze()
    mate = torch.cat([x, 100 * torch.randn(1, 6, 32)])
    torch.testing.assert_close(layer(mate)[:1], layer(x))  # does not depend on batch mates any more
    assert layer.allocation == kept
    assert layer.freeze([8, 0, 0, 0]).allocation == [8, 0, 0, 0]


def test_same_batch_twice_in_evaluation_returns():
    """|cache - norms| is 0 then: the authors' loop never ends."""
    layer, x = GroupedQueryAttention(8, 4, 2, "key_norm_diff").eval(), torch.randn(1, 3, 8)
    layer(x)
    assert torch.isfinite(layer(x)).all() and layer.allocation == [2, 2]


def test_training_allocates_every_few_steps_only():
    torch.manual_seed(3)
    layer = GroupedQueryAttention(16, 8, 2, "key_norm_ema", every=3).train()
    caches = []
    for i in range(4):
        layer((1 + i) * torch.randn(2, 4, 16))
        caches.append(layer.cache.clone())
    assert torch.equal(caches[0], caches[1]) and torch.equal(caches[1], caches[2])
    assert not torch.equal(caches[2], caches[3]) and layer.step == 4
    assert "cache" in layer.state_dict()


@pytest.mark.parametrize("noise", ["output_uniform", "map_gaussian"])
def test_noise_follows_the_seed_and_has_the_size_of_what_it_perturbs(noise):
    torch.manual_seed(4)
    layer, x = GroupedQueryAttention(16, 4, 2, noise=noise).eval(), torch.randn(2, 6, 16)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(layer(x))
    torch.testing.assert_close(results[0], results[1])
    assert float((results[0] - results[2]).detach().abs().max()) > 1e-3
    results[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert torch.isfinite(layer(x[:, :1])).all()  # a map of one cell has no deviation


def test_conversion_changes_nothing_where_heads_of_a_group_are_equal():
    torch.manual_seed(5)
    sizes = dict(img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=4, mlp_ratio=2.0)
    vit = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    with torch.no_grad():
        for block in vit.blocks:
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                torch.nn.init.normal_(tensor, std=0.3)
                per_head = tensor[16:].unflatten(0, (2, 2, 2, 4))  # k and v, group, head of it, channel
                per_head[:, :, 1] = per_head[:, :, 0]
    x = torch.randn(2, 3, 8, 8)
    before = vit(x)
    assert convert_to_grouped(vit, 2) == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(vit(x), before)
    assert vit.blocks[0].attn.k.weight.shape == (8, 16)


@pytest.mark.parametrize("noise", ["none", "map_gaussian"])
def test_masks_as_timm_passes_them(noise):
    torch.manual_seed(6)
    layer, x = GroupedQueryAttention(16, 4, 2, [1, 3], noise=noise).eval(), torch.randn(2, 5, 16)
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    results = []
    for options in (
        {"is_causal": True},
        {"attn_mask": past},
        {"attn_mask": torch.zeros(5, 5).masked_fill(~past, -1e9)},
    ):
        torch.manual_seed(0)
        results.append(layer(x, **options))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    if noise == "none":
        torch.testing.assert_close(layer(x[:, :3], is_causal=True), results[0][:, :3])


def test_pooled_heads():
    weight = torch.arange(8.0)[:, None]
    assert pool_heads(weight, 4, 2).flatten().tolist() == [1.0, 2.0, 5.0, 6.0]
    assert torch.equal(pool_heads(weight, 4, 4), weight)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: GroupedQueryAttention(10, 4), "dim"),
        (lambda: GroupedQueryAttention(8, 4, 3), "num_kv_heads"),
        (lambda: GroupedQueryAttention(8, 4, 5, "key_norm"), "num_kv_heads"),
        (lambda: GroupedQueryAttention(8, 4, 2, "norms"), "allocation"),
        (lambda: GroupedQueryAttention(8, 4, 2, [1, 2]), "allocation"),
        (lambda: GroupedQueryAttention(8, 4, 2, [1, 2, 1]), "allocation"),
        (lambda: GroupedQueryAttention(8, 4, 2, noise="pink"), "noise"),
        (lambda: GroupedQueryAttention(8, 4, 2).freeze([4]), "allocation"),
        (lambda: GroupedQueryAttention(8, 4, 2)(torch.randn(1, 3, 6)), "x"),
        (lambda: allocate_queries(torch.tensor([-1.0, 1.0]), 4), "weights"),
        (lambda: allocate_queries(torch.ones(2), 4, fix="none"), "fix"),
        (lambda: pool_heads(torch.ones(8, 2), 4, 3), "num_kv_heads"),
        (lambda: convert_to_grouped(torch.nn.Linear(2, 2), 1), "model"),
        (lambda: regard.nn.GroupedQueryAttention(8, 4, 2, every=0), "every"),
    ],
)
def test_errors_name_the_argument(make, names):
    with pytest.raises(ValueError, match=names):
        make()
