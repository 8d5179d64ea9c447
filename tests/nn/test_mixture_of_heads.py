"""Mixture-of-Head attention: its gates, its limits (plain attention), its skipping path, and the two-dimensional forms."""

import math

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.nn.spatial.mixture_of_heads_2d import log_relative_positions
from regard.ops import head_balance_loss, query_norm_routing, route_by_query_norm, route_heads, selected_rows_attention

Moh = regard.nn.MixtureOfHeadAttention
Cosine = regard.nn.MixtureOfHeadCosineAttention
Aggregated = regard.nn.MixtureOfHeadAggregatedAttention


def silence_router(module):
    for parameter in module.router.parameters():
        torch.nn.init.zeros_(parameter)


def layer(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Moh(*args, **kwargs).double().eval()


# the definition


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_layer_is_the_gated_sum_over_heads(variant):
    module = layer(10, 4, 2, 3, head_dim=3, qkv_bias=True, variant=variant)
    x = torch.randn(2, 5, 10, dtype=torch.double)
    want = torch.zeros(2, 5, 10, dtype=torch.double) + module.proj.bias
    for b in range(2):
        for t in range(5):
            token = x[b, t]
            shared = (module.router.shared.weight @ token).softmax(0)
            routed = (module.router.routed.weight @ token).softmax(0)
            alpha = (module.router.groups.weight @ token).softmax(0)
            best = int(routed.argmax())
            gates = torch.zeros(4, dtype=torch.double)
            if variant == "released":
                gates[:2] = 2 * alpha[0] * 2 * shared
                gates[2 + best] = 2 * alpha[1] * 1
            else:
                gates[:2] = alpha[0] * shared
                gates[2 + best] = alpha[1] * routed[best]
            qkv = module.qkv(x[b]).reshape(5, 3, 4, 3)
            for h in range(4):
                q, k, v = qkv[t, 0, h], qkv[:, 1, h], qkv[:, 2, h]
                head = ((k @ q) / math.sqrt(3)).softmax(0) @ v
                want[b, t] += gates[h] * (module.proj.weight[:, 3 * h : 3 * h + 3] @ head)
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_equal_logits_and_all_heads_give_plain_attention(shared):
    module = layer(12, 3, shared, 3)
    silence_router(module)
    x = torch.randn(2, 7, 12, dtype=torch.double)
    q, k, v = module.qkv(x).reshape(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.proj(plain))


@pytest.mark.parametrize("shared, active", [(0, 2), (1, 3), (2, 3), (3, 5), (0, 6)])
def test_gates_of_each_group_have_their_sum(shared, active):
    module = layer(12, 6, shared, active)
    aux = module(torch.randn(2, 9, 12, dtype=torch.double), return_aux=True)[1]
    assert aux.gates.shape == aux.selected.shape == (2, 6, 9)
    assert (aux.selected.sum(1) == active).all() and aux.selected[:, :shared].all()
    assert ((aux.gates > 0) == aux.selected).all()
    routed = aux.gates[:, shared:].sum(1) / (active - shared)
    if shared:
        torch.testing.assert_close(aux.gates[:, :shared].sum(1) / shared + routed, torch.full_like(routed, 2.0))
    else:
        torch.testing.assert_close(routed, torch.ones_like(routed))


def test_paper_gates_are_plain_probabilities():
    logits = [torch.randn(2, 5, n) for n in (4, 2, 2)]
    released = route_heads(*logits, shared=2, active=4)
    paper = route_heads(*logits, shared=2, active=4, variant="paper")
    assert torch.equal(released.selected, paper.selected)
    assert (paper.gates.sum(1) < 1).all()
    everything = route_heads(*logits, shared=2, active=6, variant="paper")
    torch.testing.assert_close(everything.gates.sum(1), torch.ones(2, 5))
    torch.testing.assert_close(released.balance_loss, 4 * paper.balance_loss)


def test_a_head_that_is_off_does_not_touch_the_token():
    module = layer(12, 4, 1, 2)
    x = torch.randn(1, 6, 12, dtype=torch.double)
    before, aux = module(x, return_aux=True)
    with torch.no_grad():
        module.proj.weight[:, 9:12] += 1.0  # head 3
    changed = (module(x) - before).abs().amax(-1)[0] > 1e-12
    assert torch.equal(changed, aux.selected[0, 3])


# the balance loss


def test_balance_loss_is_smallest_when_balanced():
    even = torch.full((4, 8, 8), -20.0)
    even[torch.arange(4)[:, None], torch.arange(8), torch.arange(8)] = 20.0  # every head wanted equally often
    one = torch.zeros(4, 8, 8)
    one[..., 0] = 40.0
    balanced = route_heads(even, shared=0, active=1).balance_loss
    collapsed = route_heads(one, shared=0, active=1).balance_loss
    torch.testing.assert_close(balanced, torch.tensor(1.0))
    torch.testing.assert_close(collapsed, torch.tensor(8.0))


def test_balance_loss_spreads_the_load():
    torch.manual_seed(0)
    router = regard.nn.HeadRouter(8, 6, 0, 1)
    with torch.no_grad():
        router.routed.weight[0] += 2.0  # with positive inputs, everybody wants head 0
    x = torch.rand(4, 64, 8)
    start = router(x)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        loss = router(x).balance_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    end = router(x)
    busiest = [routing.selected.float().mean((0, 2)).max() for routing in (start, end)]
    assert busiest[0] > 0.95 and busiest[1] < 0.6 and end.balance_loss < start.balance_loss


def test_head_balance_loss_averages_the_layers_that_route():
    x = torch.randn(1, 4, 8)
    routings = [
        Moh(8, 4, 1, 2)(x, return_aux=True)[1],
        Moh(8, 2, 2, 2)(x, return_aux=True)[1],
        Moh(8, 4, 0, 3)(x, return_aux=True)[1],
    ]
    assert routings[1].balance_loss is None
    want = 0.5 * (routings[0].balance_loss + routings[2].balance_loss) / 2
    torch.testing.assert_close(head_balance_loss(routings, 0.5), want)
    assert head_balance_loss([routings[1]]) == 0
    with pytest.raises(TypeError, match="routings"):
        head_balance_loss([x])


# computing only what is used


@pytest.mark.parametrize("mask", [None, "causal", "window", "tensor", "per_head"])
@pytest.mark.parametrize("shared, active", [(0, 2), (2, 3), (3, 5)])
def test_skipping_inactive_pairs_changes_nothing(mask, shared, active):
    module = layer(12, 6, shared, active, qkv_bias=True)
    x = torch.randn(2, 11, 12, dtype=torch.double, requires_grad=True)
    mask = {
        "causal": regard.masks.causal,
        "window": regard.masks.sliding_window(3),
        "tensor": torch.rand(2, 1, 11, 11) > 0.4,
        "per_head": regard.masks.per_head([regard.masks.sliding_window(h + 1) for h in range(6)]),
    }.get(mask)
    results = []
    for skip in (False, True):
        module.skip_inactive = skip
        out = module(x, mask)
        results.append((out, torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(results[1][0], results[0][0])
    for have, want in zip(results[1][1], results[0][1]):
        torch.testing.assert_close(have, want)


def test_selected_rows_attention_computes_the_marked_rows():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 6)
    selected = torch.rand(2, 3, 5) > 0.5
    selected[1, 2] = False
    causal = torch.arange(8) <= torch.arange(3, 8)[:, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=causal) * selected[..., None]
    torch.testing.assert_close(selected_rows_attention(q, k, v, selected, mask=regard.masks.causal), want)
    nothing = selected_rows_attention(q, k, v, torch.zeros_like(selected))
    assert nothing.shape == (2, 3, 5, 6) and not nothing.any()
    with pytest.raises(ValueError, match="selected"):
        selected_rows_attention(q, k, v, selected[:1])
    with pytest.raises(ValueError, match="^k, v: "):
        selected_rows_attention(q, k[:, :2], v[:, :2], selected)


# routing a pretrained model by the length of its queries


def test_query_norm_takes_the_longest_queries():
    q = torch.randn(2, 7, 5, 4)
    routing = query_norm_routing(q, shared=2, active=5)
    norms = q[:, 2:].norm(dim=-1)
    threshold = norms.sort(1, descending=True).values[:, 2:3]
    assert routing.selected[:, :2].all()
    assert torch.equal(routing.selected[:, 2:], norms >= threshold)
    assert torch.equal(routing.gates, routing.selected.to(q.dtype))


def test_query_norm_rule_limits():
    q, out = torch.randn(2, 6, 5, 4), torch.randn(2, 6, 5, 3)
    assert torch.equal(route_by_query_norm(q, out, shared=1, active=6), out)  # everything on
    assert torch.equal(route_by_query_norm(q, out, shared=6, active=6), out)
    only_shared = route_by_query_norm(q, out, shared=2, active=2)
    assert torch.equal(only_shared[:, :2], out[:, :2]) and not only_shared[:, 2:].any()
    assert query_norm_routing(q, shared=5, active=6).selected.all()  # one routed head has no spread
    alike = query_norm_routing(torch.ones(1, 4, 2, 3), shared=1, active=2, straight_through=True)  # equal norms
    assert alike.selected.sum(1).eq(2).all() and alike.gates.isfinite().all() and alike.balance_loss.isfinite()


def test_query_norm_rule_ignores_rotation_and_scale():
    q = torch.randn(2, 8, 5, 4, dtype=torch.double)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.double)).Q
    want = query_norm_routing(q, shared=4, active=6).selected
    assert torch.equal(query_norm_routing(q @ turn, shared=4, active=6).selected, want)
    assert torch.equal(query_norm_routing(q * 7.0, shared=4, active=6).selected, want)


def test_straight_through_keeps_values_and_adds_gradients():
    q = torch.randn(1, 6, 4, 3, dtype=torch.double, requires_grad=True)
    plain = query_norm_routing(q, shared=2, active=4)
    through = query_norm_routing(q, shared=2, active=4, straight_through=True)
    torch.testing.assert_close(plain.gates, through.gates)
    assert not plain.gates.requires_grad
    weights = torch.randn(1, 4, 4, dtype=torch.double)
    (have,) = torch.autograd.grad((through.gates[:, 2:] * weights).sum(), q)
    norms = q[:, 2:].norm(dim=-1)
    (want,) = torch.autograd.grad(((norms / norms.std(1, keepdim=True)).softmax(1) * weights).sum(), q)
    torch.testing.assert_close(have, want)


# numerics and input


def test_gradients():
    module = layer(6, 3, 1, 2, head_dim=2)
    x = torch.randn(1, 4, 6, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(lambda t: (lambda out, aux: (out, aux.balance_loss))(*module(t, return_aux=True)), x)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("skip", [False, True])
def test_short_sequences(length, skip):
    out, aux = Moh(8, 4, 1, 3, skip_inactive=skip)(torch.randn(2, length, 8), return_aux=True)
    assert out.shape == (2, length, 8) and out.isfinite().all() and aux.balance_loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    torch.manual_seed(0)
    module = Moh(16, 4, 1, 3)
    x = torch.randn(2, 6, 16)
    want, aux = module(x, return_aux=True)
    out, half = module.to(dtype)(x.to(dtype), return_aux=True)
    assert out.dtype == half.gates.dtype == dtype
    same = half.selected == aux.selected  # a near tie may fall the other way
    assert same.float().mean() > 0.9
    torch.testing.assert_close(out.float()[same.all(1)], want[same.all(1)], atol=0.02, rtol=0.05)


def test_batch_mates_do_not_matter_and_input_is_kept():
    module = layer(12, 4, 1, 3)
    x = torch.randn(3, 5, 12, dtype=torch.double)
    copy = x.clone()
    out = module(x)
    assert torch.equal(x, copy)
    torch.testing.assert_close(module(x[1:2])[0], out[1])


def test_heads_is_a_spelling_of_num_heads():
    module = Moh(dim=768, heads=12, shared=3, active=9)
    assert (module.num_heads, module.router.num_shared, module.router.num_active) == (12, 3, 9)
    assert module(torch.randn(1, 2, 768)).shape == (1, 2, 768)
    assert Moh(8, 4, 1, 2, heads=4).num_heads == 4


@pytest.mark.parametrize(
    "module", [Moh(8, 4, 2, 3, qk_norm=True), Cosine(8, 3, 2, 1, 2), Aggregated(8, 4, 4, 2, 3, sr_ratio=2)]
)
def test_our_own_state_dict_loads_as_it_is(module):
    regard.load_official(module, module.state_dict())


@pytest.mark.parametrize(
    "kwargs, error, named",
    [
        ({"num_heads": 4, "active": None}, TypeError, "active"),
        ({"num_heads": None, "active": 2}, TypeError, "num_heads"),
        ({"num_heads": 4, "heads": 5, "active": 2}, ValueError, "heads"),
        ({"num_heads": 4, "active": 5}, ValueError, "active"),
        ({"num_heads": 4, "shared": 3, "active": 2}, ValueError, "active"),
        ({"num_heads": 4, "shared": 3, "active": 3}, ValueError, "active"),
        ({"num_heads": 4, "shared": 5, "active": 5}, ValueError, "shared"),
        ({"num_heads": 4, "shared": -1, "active": 2}, ValueError, "shared"),
        ({"num_heads": 5, "active": 2}, ValueError, "dim"),
        ({"num_heads": 4, "active": 2, "variant": "papper"}, ValueError, "variant"),
        ({"num_heads": 4, "active": 2, "attn_drop": 1.5}, ValueError, "attn_drop"),
    ],
)
def test_bad_arguments(kwargs, error, named):
    with pytest.raises(error, match=f"^{named}"):
        Moh(8, **kwargs)


def test_bad_input():
    with pytest.raises(ValueError, match="^x: "):
        Moh(8, 4, 0, 2)(torch.randn(2, 3, 9))
    with pytest.raises(ValueError, match="^x: "):
        Cosine(8, (2, 3), 4, 0, 2)(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="^group_logits|^routed_logits"):
        route_heads(torch.randn(1, 2, 3), torch.randn(1, 2, 1), torch.randn(1, 2, 3), shared=1, active=2)
    with pytest.raises(ValueError, match="^active"):
        query_norm_routing(torch.randn(1, 4, 2, 3), shared=2, active=5)
    with pytest.raises(ValueError, match="^head_outputs"):
        route_by_query_norm(torch.randn(1, 4, 2, 3), torch.randn(1, 3, 2, 3), shared=2, active=3)
    with pytest.raises(ValueError, match="^window"):
        Aggregated(8, 4, 4, 0, 2, window=2)
    with pytest.raises(ValueError, match="^pool_grid"):
        Aggregated(8, 4, 4, 0, 2, pool_grid=5)
    with pytest.raises(ValueError, match="^sr_ratio"):
        Aggregated(8, 4, 4, 0, 2, sr_ratio=5)
    with pytest.raises(TypeError, match="^grid"):
        Cosine(8, "4", 4, 0, 2)


# on grids


def test_relative_positions_are_odd_in_the_distance():
    index, table = log_relative_positions((3, 4), (3, 4))
    coordinates = table[index]
    assert coordinates.shape == (12, 12, 2)
    torch.testing.assert_close(coordinates, -coordinates.transpose(0, 1))
    torch.testing.assert_close(coordinates.amax(), torch.tensor(math.log2(9) / 3))
    assert (coordinates.diagonal() == 0).all()
    assert log_relative_positions((1, 1), (1, 1))[1].isfinite().all()
    near = log_relative_positions((3, 3), (3, 3), (5, 5))[1]
    torch.testing.assert_close(near.amax(), torch.tensor(math.log2(5) / 3))


def test_cosine_attention_ignores_the_length_of_queries_and_keys():
    torch.manual_seed(0)
    module = Cosine(12, (3, 4), 3, 1, 2, qkv_bias=False).double()
    x = torch.randn(2, 12, 12, dtype=torch.double)
    want = module(x)
    with torch.no_grad():
        module.qkv.weight[:12] *= 5.0
        module.qkv.weight[12:24] *= 0.1
    torch.testing.assert_close(module(x), want)


def test_aggregated_attention_by_its_definition():
    torch.manual_seed(0)
    height, width, heads, dim = 3, 4, 2, 3
    module = Aggregated(6, (height, width), heads, 0, 2, pool_grid=(1, 2)).double()
    silence_router(module)
    for parameter in module.parameters():
        if parameter is not module.router.routed.weight:
            torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, height * width, 6, dtype=torch.double)
    image = x[0].reshape(height, width, 6)
    activated = F.gelu(module.pool_proj(image.permute(2, 0, 1)[None]))[0]
    pooled = torch.stack([activated[:, :, :2].mean((1, 2)), activated[:, :, 2:].mean((1, 2))])
    pool_kv = module.kv(module.pool_norm(pooled))
    bias, temperature = module.position(), F.softplus(module.temperature)
    heads_out = torch.zeros(height * width, heads, dim, dtype=torch.double)
    for r in range(height):
        for c in range(width):
            for h in range(heads):
                part = slice(h * dim, (h + 1) * dim)
                unit = F.normalize(module.q(image[r, c])[part], dim=0)
                cells = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if 0 <= r + i < height and 0 <= c + j < width]
                slots = [3 * (i + 1) + j + 1 for i, j in cells]
                keys = [module.kv(image[r + i, c + j])[:6][part] for i, j in cells] + [row[:6][part] for row in pool_kv]
                values = torch.stack(
                    [module.kv(image[r + i, c + j])[6:][part] for i, j in cells] + [row[6:][part] for row in pool_kv]
                )
                query = (unit + module.query_embedding[h, 0]) * temperature[h, 0, 0] * math.log(len(keys))
                extra = torch.cat([module.local_bias[h, slots], bias[h, r * width + c]])
                scores = torch.stack([query @ F.normalize(key, dim=0) for key in keys]) + extra
                weights = scores.softmax(0)
                learned = (unit @ module.local_tokens[h] + module.local_token_bias[h, 0])[slots]
                heads_out[r * width + c, h] = weights @ values + learned @ values[: len(cells)]
    torch.testing.assert_close(module(x)[0], module.proj(heads_out.flatten(1)))


def test_aggregated_attention_averages_values():
    torch.manual_seed(0)
    module = Aggregated(8, (5, 3), 2, 0, 1, sr_ratio=2, window=5)
    for parameter in (module.local_tokens, module.local_token_bias):
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        module.kv.weight[8:] = 0.0  # every value is the bias
        module.router.routed.weight.zero_()
    out, aux = module(torch.randn(2, 15, 8), return_aux=True)
    want = module.proj((aux.gates.transpose(1, 2)[..., None] * module.kv.bias[8:].reshape(2, 4)).flatten(2))
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    "build", [lambda: Cosine(8, (2, 3), 2, 1, 2), lambda: Aggregated(8, (2, 3), 2, 1, 2, window=5)]
)
def test_grid_layers_train(build):
    module = build()
    x = torch.randn(2, 6, 8, requires_grad=True)
    out, aux = module(x, return_aux=True)
    (out.square().sum() + head_balance_loss([aux])).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
