"""Heads chosen by query length: limits, the rule, skipping, decoding, and the same attached to a pretrained model."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.nn import QueryNormHeadAttention, SoftmaxAttention
from regard.ops import attention, masks, query_norm_routing, selected_rows_attention


def tokens(length=9, dim=24):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_of(**options):
    torch.manual_seed(0)
    return QueryNormHeadAttention(24, 6, num_kv_heads=3, rope_base=50.0, **options).double().eval()


def test_all_heads_active_is_softmax_attention():
    layer = layer_of(shared=2, active=6)
    plain = SoftmaxAttention(24, 6, num_kv_heads=3, rope_base=50.0).double().eval()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(tokens()), plain(tokens()))


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"causal": False}, {"shared": 0, "active": 1}, {"shared": 1, "active": 2}]
)
def test_skipping_is_masking(options):
    x = tokens()
    dense, skipping = layer_of(**options), layer_of(**options, skip_inactive=True)
    torch.testing.assert_close(skipping(x), dense(x))
    grads = [torch.autograd.grad(one(x).square().sum(), list(one.parameters())) for one in (dense, skipping)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)
    there = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    torch.testing.assert_close(skipping(x, padding_mask=there), dense(x, padding_mask=there))


def test_what_is_off_is_off_and_each_token_has_its_number_of_heads():
    layer = layer_of(shared=1, active=3)
    routing = layer.routing(tokens())
    assert torch.equal(routing.selected.sum(1), torch.full((2, 9), 3)) and routing.selected[:, 0].all()
    captured = []
    combine = layer._combine
    layer._combine = lambda out, x: captured.append(out) or combine(out, x)
    layer(tokens())
    assert torch.equal(captured[0].abs().sum(-1) > 0, routing.selected)


@pytest.mark.parametrize("skip", [False, True])
def test_decodes(skip):
    layer, x = layer_of(shared=1, active=3, skip_inactive=skip), tokens()
    state, outs = None, []
    for piece in x.split([4, 1, 1, 3], dim=1):
        y, state = layer(piece, state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))


def test_straight_through_trains_the_choice():
    layer, x = layer_of(shared=1, active=3).train(), tokens()
    torch.testing.assert_close(layer(x), layer.eval()(x))
    with_choice = torch.autograd.grad(layer.train()(x).square().sum(), layer.q_proj.weight)[0]
    without = torch.autograd.grad(layer.eval()(x).square().sum(), layer.q_proj.weight)[0]
    assert not torch.allclose(with_choice, without)


def test_packed_rows_of_grouped_heads():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g).double() for h, n in ((6, 7), (2, 11), (2, 11)))
    selected = torch.rand(2, 6, 7, generator=g) < 0.4
    selected[:, :1] = True
    for mask in (None, masks.causal, masks.sliding_window(4) & masks.causal):
        want = attention(q, k, v, mask=mask) * selected[..., None]
        torch.testing.assert_close(selected_rows_attention(q, k, v, selected, shared=1, mask=mask), want)
    none = torch.zeros_like(selected)
    assert torch.equal(selected_rows_attention(q, k, v, none, mask=masks.causal), torch.zeros_like(q))
    with pytest.raises(ValueError, match="k, v"):
        selected_rows_attention(q, k[:, :1].expand(-1, 4, -1, -1), v, selected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"shared": 3, "active": 3}, "active"),
        ({"shared": 7}, "shared"),
        ({"active": 9}, "active"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        layer_of(**options)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_attached_to_a_model(llama):
    ids = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(0))
    plain = llama(ids).logits
    with regard.attach(llama, regard.QueryNormHeads(active=8, shared=2)):
        torch.testing.assert_close(llama(ids).logits, plain, atol=1e-5, rtol=1e-5)
    found = {}
    for skip in (False, True):
        with regard.attach(llama, regard.QueryNormHeads(skip=skip)):
            found[skip] = llama(ids).logits
            out = llama.generate(ids[:1], max_new_tokens=4, do_sample=False)
            again = llama.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=False)
            assert torch.equal(out, again)
    torch.testing.assert_close(found[True], found[False], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[False], plain, atol=1e-3)
    assert torch.equal(llama(ids).logits, plain)


@torch.no_grad()
def test_attached_rule_is_the_ops(llama):
    ids = torch.randint(40, (1, 9), generator=torch.Generator().manual_seed(0))
    record = regard.record(llama, ids)
    kept = []
    method = regard.QueryNormHeads(shared=2, active=5, layers=[0])
    routing = method.routing
    method.routing = lambda call: kept.append(routing(call)) or kept[-1]
    with regard.attach(llama, method):
        llama(ids)
    assert len(kept) == 1
    assert torch.equal(kept[0].selected, query_norm_routing(record.q(0), shared=2, active=5).selected)


@torch.no_grad()
def test_padding_falls_back_to_masking(llama):
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with regard.attach(llama, regard.QueryNormHeads(skip=True)):
        padded = llama(ids, attention_mask=mask).logits[0, 3:]
        alone = llama(ids[:1, 3:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_attached_with_bad_counts(llama):
    with pytest.raises((ValueError, TypeError), match="shared"):
        regard.QueryNormHeads(shared=1.5)
    with pytest.raises(TypeError, match="active"):
        regard.QueryNormHeads(active="most")
    with (
        regard.attach(llama, regard.QueryNormHeads(shared=4, active=4)),
        pytest.raises(ValueError, match="shared, active"),
    ):
        llama(torch.ones(1, 3, dtype=torch.long))
