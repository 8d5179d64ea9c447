"""Routing attention: limits that are plain attention, causality, padding, decoding, and centroids that learn."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from regard.nn import KmeansAttention, KmeansSelfAttention, OnlineKMeans, RoutingAttention
from regard.ops import attention, masks


def layer(seed=0, dim=16, heads=4, **options):
    torch.manual_seed(seed)
    sizes = {"num_clusters": 3, "window": 6, "block": 4, "local_heads": 1, "variant": "paper"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RoutingAttention(dim, heads, **(sizes | options)).eval()


def tokens(batch=2, length=24, dim=16, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


EVERY_KIND = {"heads": 8, "dim": 32, "cluster_strided_heads": 1, "strided_heads": 2, "local_heads": 2}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_one_cluster_of_everything_is_causal_attention_of_normalised_vectors(variant):
    m, x = layer(local_heads=0, num_clusters=1, window=24, variant=variant), tokens()
    q = (m.to_q(x) * (16 // 4) ** -0.5).unflatten(-1, (4, 4)).transpose(1, 2)
    v = m.to_v(x).unflatten(-1, (4, 4)).transpose(1, 2)
    unit = F.layer_norm(q, (4,), eps=1e-6)
    want = attention(unit, unit, v, mask=masks.causal, scale=1.0)
    if variant == "released":
        want = m.mix(want) / 1.01
    want = m.proj(want.transpose(1, 2).flatten(2))
    assert torch.allclose(m(x)[0], want, atol=1e-5)


def test_heads_that_see_whole_blocks_are_dense():
    m, x = layer(heads=2, local_heads=2, block=24), tokens()
    q, k, v = (to(x).unflatten(-1, (2, 8)).transpose(1, 2) for to in (m.to_q, m.to_k, m.to_v))
    want = m.proj(attention(q, k, v, mask=masks.causal).transpose(1, 2).flatten(2))
    assert torch.allclose(m(x)[0], want, atol=1e-5)
    strided = layer(heads=2, local_heads=0, strided_heads=2, block=1)
    strided.load_state_dict(m.state_dict())
    assert torch.allclose(strided(x)[0], want, atol=1e-5)


@pytest.mark.parametrize("relative", [(), ("cluster", "cluster_strided", "strided", "local")])
@pytest.mark.parametrize("share_qk", [True, False])
def test_no_gradient_flows_from_later_tokens(share_qk, relative):
    m = layer(**EVERY_KIND, share_qk=share_qk, relative=relative, max_relative=3)
    x = tokens(batch=1, dim=32).requires_grad_()
    y, _ = m(x)
    for t in (0, 7, 20):
        grad = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0]
        assert float(grad[t + 1 :].abs().sum()) == 0.0
        assert float(grad[: t + 1].abs().sum()) > 0.0


def test_the_release_leaks_where_lists_differ_and_says_so():
    with pytest.warns(UserWarning, match="later ones"):
        m = RoutingAttention(16, 4, local_heads=0, num_clusters=3, window=6, block=4, share_qk=False)
    x = tokens(batch=1).requires_grad_()
    grads = [torch.autograd.grad(m(x)[0][0, t].sum(), x)[0][0, t + 1 :].abs().sum() for t in range(12)]
    assert float(torch.stack(grads).max()) > 0.0


def test_bidirectional_layers_see_both_ways():
    m = layer(**EVERY_KIND, causal=False)
    x = tokens(batch=1, dim=32, length=30).requires_grad_()
    grad = torch.autograd.grad(m(x)[0][0, 8].sum(), x)[0][0]
    assert float(grad[9:].abs().sum()) > 0.0 and float(grad[:8].abs().sum()) > 0.0


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal):
    m = layer(**EVERY_KIND, causal=causal)
    long, short = tokens(1, 24, 32), tokens(1, 16, 32, seed=2)
    batch = torch.cat(
        [long, F.pad(short, (0, 0, 8, 0), value=3.0)]
    )  # by two blocks, so that blocks begin where they did
    mask = torch.arange(24) >= torch.tensor([[0], [8]])
    y, loss = m(batch, mask)
    assert torch.allclose(y[:1], m(long)[0], atol=1e-5)
    assert torch.allclose(y[1:, 8:], m(short)[0], atol=1e-5)
    right = torch.cat([long, F.pad(short, (0, 0, 0, 8), value=3.0)])
    assert torch.allclose(m(right, mask.flip(1))[0][1:, :16], m(short)[0], atol=1e-5)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(
    "options", [{}, {"share_qk": False}, {"relative": ("cluster", "strided", "local"), "max_relative": 3}]
)
def test_a_decoded_token_is_the_last_of_the_prefix(variant, options):
    if variant == "released" and options.get("share_qk") is False:
        options = {"relative": ("cluster_strided",)}
    m, x = layer(**EVERY_KIND, variant=variant, **options), tokens(dim=32, length=20)
    state = None
    for t in range(20):
        y, state = m.step(x[:, t : t + 1], state)
        if variant == "paper" or (t + 1) % 4 == 0:
            assert torch.allclose(y, m(x[:, : t + 1])[0][:, -1:], atol=1e-5), t
    with pytest.raises(ValueError, match="causal"):
        layer(causal=False).step(x[:, :1, :16])


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_training_moves_the_centroids_and_evaluation_does_not(variant):
    m, x = layer(variant=variant, decay=0.5), tokens()
    before = {name: value.clone() for name, value in m.clusters.state_dict().items()}
    m(x)
    assert all(torch.equal(value, before[name]) for name, value in m.clusters.state_dict().items())
    m.train()
    y, loss = m(x)
    (y.square().mean() + loss).backward()
    assert all(not torch.equal(value, before[name]) for name, value in m.clusters.state_dict().items())
    assert float(m.to_q.weight.grad.abs().sum()) > 0 and float(loss.detach()) > 0
    again = layer(seed=3, variant=variant, decay=0.5)
    again.load_state_dict(m.state_dict())
    assert torch.equal(again(x)[0], m.eval()(x)[0])


def test_centroids_without_moving_averages_learn_by_gradient():
    m = layer(ema=False).train()
    m(tokens())[1].backward()
    assert float(m.clusters["cluster"].means.grad.abs().sum()) > 0


def test_online_means_follow_the_tokens():
    torch.manual_seed(0)
    means = OnlineKMeans(1, 2, 2, decay=0.5)
    means.means.copy_(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]))
    x = torch.tensor([[2.0, -1.0], [-1.0, 3.0]]).repeat(5, 1)[None, None]
    for _ in range(20):
        means.update([(x, None)], [means.affinity(x).argmax(-1)])
    assert torch.allclose(means.means[0], torch.tensor([[2.0, -1.0], [-1.0, 3.0]]), atol=1e-2)
    assert float(means.loss(x, means.affinity(x).argmax(-1), 1.0)) < 1e-3


def test_hashing_instead_of_centroids():
    m = layer(routing="hash", num_clusters=4)
    y, loss = m(tokens())
    assert torch.isfinite(y).all() and float(loss) == 0.0
    with pytest.raises(ValueError, match="num_clusters"):
        layer(routing="hash", num_clusters=3)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_short_sequences(length):
    for variant in ("paper", "released"):
        y, loss = layer(**EVERY_KIND, variant=variant)(tokens(length=length, dim=32))
        assert y.shape == (2, length, 32) and torch.isfinite(y).all() and torch.isfinite(loss)


def test_bad_input():
    for options, match in (
        ({"local_heads": 5}, "num_heads"),
        ({"flange": 5}, "flange"),
        ({"variant": "tf"}, "variant"),
        ({"relative": ("near",)}, "relative"),
        ({"key_dim": 17}, "key_dim"),
        ({"cluster_strided_heads": 3}, "cluster_strided_heads"),
        ({"window": 0}, "window"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(**options)
    with pytest.raises(ValueError, match="x: got"):
        layer()(tokens(dim=8))
    with pytest.raises(ValueError, match="mask: got"):
        layer()(tokens(), torch.ones(2, 24))


# The community's layer


def kmeans(seed=0, **options):
    torch.manual_seed(seed)
    m = KmeansAttention(2, 8, **({"num_clusters": 3, "window": 6} | options)).eval()
    m.kmeans.means.copy_(F.normalize(m.kmeans.means, dim=-1))
    m.kmeans.initted.fill_(True)
    return m


def heads(seed=0, length=24):
    return torch.randn(2, 2, length, 8, generator=torch.Generator().manual_seed(seed))


def test_one_cluster_of_everything_is_attention():
    q, k, v = heads(0), heads(1), heads(2)
    out, _ = kmeans(num_clusters=1, window=24)(q, k, v)
    assert torch.allclose(out, attention(q, k, v) / (1 + 1e-5), atol=1e-5)
    out, _ = kmeans(num_clusters=1, window=24, shared_qk=True, causal=True)(q, q, v)
    others = masks.from_function(lambda b, h, i, j: (j < i) | ((i == 0) & (j == 0)))
    assert torch.allclose(out, attention(q, F.normalize(q, dim=-1), v, mask=others) / (1 + 1e-5), atol=1e-5)


def test_a_token_in_no_cluster_gets_zeros():
    m = kmeans(num_clusters=1, window=4, shared_qk=True)
    q = heads()
    out = m(q, q, heads(1))[0]
    assert int((out.abs().sum(-1) == 0).sum()) == 2 * 2 * 20


def test_first_data_start_the_centroids():
    m = KmeansAttention(2, 8, num_clusters=3, window=6).eval()
    before = m.kmeans.means.clone()
    first = m(heads(0), heads(1), heads(2))[0]
    assert bool(m.kmeans.initted) and not torch.equal(m.kmeans.means, before)
    assert torch.allclose(m.kmeans.means.norm(dim=-1), torch.ones(2, 3), atol=1e-5)
    assert torch.equal(m(heads(0), heads(1), heads(2))[0], first)


def test_the_backward_pass_moves_the_centroids():
    m = kmeans(decay=0.5).train()
    q = heads().requires_grad_()
    before = m.kmeans.means.clone()
    out, loss = m(q, heads(1), heads(2))
    assert torch.equal(m.kmeans.means, before)
    (out.sum() + loss).backward()
    assert not torch.equal(m.kmeans.means, before)
    with pytest.raises(RuntimeError, match="training"):
        m.update()
    still = kmeans(auto_update=False).train()
    still(q, heads(1), heads(2))[0].sum().backward()
    assert torch.equal(still.kmeans.means, kmeans().kmeans.means)


def test_self_attention_layer_trains_and_respects_time():
    torch.manual_seed(0)
    m = KmeansSelfAttention(32, 4, local_heads=2, num_clusters=3, window=8, causal=True).train()
    x = tokens(dim=32).requires_grad_()
    y, loss = m(x)
    assert y.shape == x.shape
    grad = torch.autograd.grad(y[:, 9].sum() + 0 * loss, x)[0]
    assert float(grad[:, 10:].abs().sum()) == 0.0 and float(grad[:, :10].abs().sum()) > 0.0
    masked = m.eval()(x, torch.arange(24) < torch.tensor([[24], [15]]))[0]
    assert torch.isfinite(masked).all()


def test_bad_input_of_the_community_layer():
    with pytest.raises(ValueError, match="k: got 'length"):
        kmeans()(heads(), heads(length=20), heads(length=20))
    with pytest.raises(ValueError, match="q: got"):
        kmeans()(torch.zeros(1, 3, 4, 8), heads(), heads())
    with pytest.raises(ValueError, match="causal"):
        KmeansAttention(2, 8, causal=True, receives_context=True)
    with pytest.raises(ValueError, match="local_heads"):
        KmeansSelfAttention(32, 4, local_heads=5)
