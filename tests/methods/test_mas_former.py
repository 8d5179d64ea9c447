"""MASFormer: the base model in the limit, receptive fields, what sparse layers keep, and the paper's cost."""

import pytest
import torch
from sparse_models import generated, logits, padded_batch, prompt
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import regard
from regard import MASFormer
from regard.methods.caches import kv_bytes
from tiny import tiny_llama


def gpt_neo(kinds):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=128,
        hidden_size=32,
        num_layers=len(kinds),
        num_heads=4,
        attention_types=[[[kind], 1] for kind in kinds],
        max_position_embeddings=256,
        window_size=16,
        intermediate_size=48,
    )
    return GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize(
    "method", [MASFormer(0, block=128), MASFormer(3, block=4), MASFormer([0, 1, -1], block=4), MASFormer(0, 200, 0)]
)
def test_it_is_the_base_model_when_blocks_or_full_layers_reach_everything(method):
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    with regard.attach(model, method):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids), told)


def test_each_sparse_layer_is_dense_attention_with_the_block_mask():
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, MASFormer([1], block=16)):
        got = logits(model, ids, use_cache=False)
    i, j = torch.arange(90)[:, None], torch.arange(90)
    local = (j <= i) & (i // 16 - j // 16 <= 1)
    for number, layer in enumerate(model.model.layers):
        if number != 1:
            attention = layer.self_attn
            original = attention.forward
            attention.forward = lambda *args, original=original, **kwargs: original(
                *args, **{**kwargs, "attention_mask": torch.zeros(1, 1, 90, 90).masked_fill(~local, float("-inf"))}
            )
    torch.testing.assert_close(got, logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("full", "left", "first"), [([], 1, 32), ([], 0, 80), ([1], 1, 0)])
def test_receptive_fields(full, left, first):
    """Three sparse layers of blocks of 16 reach three blocks back (with own blocks only: none); one full layer reaches everything."""
    model = tiny_llama()
    reached = []
    with regard.attach(model, MASFormer(full, block=16, left_blocks=left)):
        ids = prompt()
        base = logits(model, ids)[0, -1]
        for token in range(90):
            other = ids.clone()
            other[0, token] = 1 + (other[0, token] % 127)
            if not torch.equal(logits(model, other)[0, -1], base):
                reached.append(token)
    assert reached == list(range(first, 90))


def test_it_is_gpt_neo_with_global_layers_when_the_block_reaches_everything():
    """The paper's base. Its attention has no 1 / sqrt(d), and does not go through transformers' attention interface."""
    model, ids = gpt_neo(["global", "local"]), prompt(60)
    states = model.transformer.ln_f(model.transformer.wte(ids))
    rules = MASFormer(0, block=64).rules_of(0, 2, 4, 4), MASFormer(0, block=8, left_blocks=0).rules_of(1, 2, 4, 4)
    for number, (rule, *_) in enumerate(rules):
        attention = model.transformer.h[number].attn.attention
        q, k, v = (
            getattr(attention, f"{name}_proj")(states).unflatten(-1, (4, 8)).transpose(1, 2) for name in ("q", "k", "v")
        )
        out = regard.ops.attention(q, k, v, mask=rule.mask() & regard.masks.causal, scale=1.0)
        out = attention.out_proj(out.transpose(1, 2).flatten(2))
        same = torch.allclose(out, attention(states)[0], rtol=1e-5, atol=1e-6)
        assert same == (number == 0)
    with pytest.raises(regard.UnsupportedModelError, match="does not go through transformers' AttentionInterface"):
        regard.attach(model, MASFormer())


def test_cached_decoding_is_the_full_forward_and_sparse_layers_keep_two_blocks():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    method = MASFormer(1, block=16)
    with regard.attach(model, method) as session:
        told = generated(model, ids, 20, attention_mask=mask)
        for row, text in zip(told, alone):
            want = text
            for _ in range(20):
                want = torch.cat([want, logits(model, want, use_cache=False)[:, -1:].argmax(-1)], 1)
            assert torch.equal(row[-20:], want[0, -20:])
        cache = session.new_cache()
        with torch.no_grad():
            model(prompt(500), past_key_values=cache)
    sizes = [kv_bytes(layer) for layer in cache.layers]
    one, rest = (
        2 * 2 * 8 * 4,
        64,
    )  # keys and values of 2 heads, 8 numbers of 4 bytes; numbers of heads, starts and kinds of rows
    assert sizes[1] == sizes[2] == 32 * one + rest and 500 * one <= sizes[0] - rest <= 512 * one
    assert sum(method.plan(3).tokens(500)) == 500 + 2 * 32


def test_it_trains():
    model, ids = tiny_llama().train(), prompt(64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with regard.attach(model, MASFormer([0], block=8)):
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_papers_cost():
    method = MASFormer(4, block=1024, left_blocks=0)
    assert method.cost(8192, 24) == pytest.approx(0.27, abs=0.005)  # "up to 75 %" less
    assert MASFormer(4, block=1024).cost(8192, 24) == pytest.approx((20 * 2048 + 4 * 8192) / (24 * 8192))
    assert MASFormer(24).cost(8192, 24) == 1.0 and MASFormer(0, block=9000).cost(8192, 24) == 1.0
    assert [len(rules) for rules in MASFormer(0.25).plan(12).layers] == [1] * 12
    assert [i for i, (rule,) in enumerate(MASFormer(0.25).plan(12).layers) if rule.kind == "full"] == [2, 6, 10]
    exact = method.plan(24).density(8192)  # causal pairs counted one by one
    assert exact == pytest.approx((20 / 8 + 4) / 24, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MASFormer(block=0), "block: got 0"),
        (lambda: MASFormer(left_blocks=-1), "left_blocks: got -1"),
        (lambda: MASFormer(-1), "full_layers: got -1"),
        (lambda: MASFormer(1.5), "full_layers: got 1.5"),
        (lambda: MASFormer("2"), "full_layers: got str"),
        (lambda: MASFormer(True), "full_layers: got bool"),
        (lambda: MASFormer([0.5]), "full_layers: got list"),
        (
            lambda: regard.attach(tiny_llama(), MASFormer(4)),
            r"full_layers: got 4, need layers of the model, which has 3",
        ),
        (lambda: regard.attach(tiny_llama(), MASFormer([-4])), r"full_layers: got \[-4\]"),
        (lambda: MASFormer().cost(0, 4), "length: got 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
