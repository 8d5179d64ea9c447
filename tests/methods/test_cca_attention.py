"""CCA-Attention on a model: exact when short, decoding equals one forward, cores are pooled hidden states, the cache is small."""

import pytest
import torch
from sparse_models import LENGTH, PADDING, call, generated, logits, padded_batch, prompt

import regard
from regard.methods.caches import CoreContextLayer, kv_bytes
from tiny import tiny_llama

SMALL = {"group": 4, "window": 10}


def decoded(model, ids, first, **kwargs):
    """Logits of all positions: a prefill of `first` tokens, then one by one."""
    with torch.no_grad():
        out = model(ids[:, :first], use_cache=True, **kwargs)
        rows, cache = [out.logits], out.past_key_values
        for t in range(first, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            rows.append(out.logits)
    return torch.cat(rows, 1), cache


def test_prompts_within_the_window_are_exact():
    model, ids = tiny_llama(), prompt()
    want = logits(model, ids)
    for method in (
        regard.CCAAttention(),
        regard.CCAAttention(group=1, window=5),
        regard.CCAAttention(group=200, window=LENGTH),
    ):
        with regard.attach(model, method):
            assert torch.allclose(logits(model, ids), want, atol=1e-4)
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("pool", ["cca", "mean", "max"])
@pytest.mark.parametrize("first", [1, 7, 40])
def test_decoding_equals_one_forward(pool, first):
    model, ids = tiny_llama(), prompt(60)
    with regard.attach(model, regard.CCAAttention(**SMALL, pool=pool)):
        whole = logits(model, ids, use_cache=False)
        assert torch.allclose(logits(model, ids), whole, atol=1e-5)
        assert torch.allclose(decoded(model, ids, first)[0], whole, atol=1e-4)
    assert not torch.allclose(whole, logits(model, ids), atol=1e-3)


def test_a_prompt_in_pieces_equals_one_forward():
    model, ids = tiny_llama(), prompt(61)
    with regard.attach(model, regard.CCAAttention(**SMALL, per_head=True)), torch.no_grad():
        whole = logits(model, ids)
        cache, rows = None, []
        for piece in ids.split([13, 1, 30, 2, 15], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits)
    assert torch.allclose(torch.cat(rows, 1), whole, atol=1e-4)


def test_rows_of_a_padded_batch_are_what_they_are_alone():
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    with regard.attach(model, regard.CCAAttention(**SMALL)):
        for options in ({}, {"use_cache": False}):
            together = logits(model, ids, attention_mask=mask, **options)
            assert torch.allclose(together[:1], logits(model, alone[0]), atol=1e-4)
            assert torch.allclose(together[1:, PADDING:], logits(model, alone[1]), atol=1e-4)
        both = generated(model, ids, tokens=20, attention_mask=mask)
        assert torch.equal(both[:1], generated(model, alone[0], tokens=20))
        assert torch.equal(both[1, LENGTH:], generated(model, alone[1], tokens=20)[0, LENGTH - PADDING :])


def test_very_different_lengths_and_long_decoding():
    model = tiny_llama()
    ids = prompt(30)
    mask = (torch.arange(30) >= 27).long()[None]
    batch, masks = torch.cat([ids, prompt(30, seed=3)]), torch.cat([torch.ones_like(mask), mask])
    with regard.attach(model, regard.CCAAttention(**SMALL)):
        both = generated(model, batch, tokens=60, attention_mask=masks)
        assert torch.equal(both[1:, 30:], generated(model, batch[1:, 27:], tokens=60)[:, 3:])


def test_cores_are_projections_of_pooled_hidden_states():
    model, ids = tiny_llama(), prompt(40)
    layer = model.model.layers[0]
    with regard.attach(model, regard.CCAAttention(**SMALL)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values.layers[0]
        core_k, core_v = cache.cores.view()
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        attn = layer.self_attn
        q, k = (to(x).view(1, 40, -1, 8).transpose(1, 2) for to in (attn.q_proj, attn.k_proj))
        cos, sin = model.model.rotary_emb(x, torch.arange(40)[None])
        half = lambda t: torch.cat([-t[..., 4:], t[..., :4]], -1)  # noqa: E731
        turn = lambda t, c, s: t * c[:, None] + half(t) * s[:, None]  # noqa: E731
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        k = k.repeat_interleave(2, 1)
        for i in range(10):
            own = slice(4 * i, 4 * i + 4)
            weights = (torch.einsum("bhd,bhgd->bhg", q[:, :, 4 * i + 3], k[:, :, own]) / 8**0.5).softmax(-1).mean(1)
            pooled = torch.einsum("bg,bgc->bc", weights, x[:, own])[:, None]
            want_k = attn.k_proj(pooled).view(1, 1, 2, 8).transpose(1, 2)
            want_k = turn(want_k, cos[:, 4 * i + 3 : 4 * i + 4], sin[:, 4 * i + 3 : 4 * i + 4])
            assert torch.allclose(core_k[:, :, i : i + 1], want_k, atol=1e-5)
            want_v = attn.v_proj(pooled).view(1, 1, 2, 8).transpose(1, 2)
            assert torch.allclose(core_v[:, :, i : i + 1], want_v, atol=1e-5)


def test_the_cache_frees_what_it_drops():
    model, ids = tiny_llama(), prompt(400)
    with regard.attach(model, regard.CCAAttention(group=8, window=32)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        entries = 400 // 8 + 32 + 7
        one = 2 * 2 * 8 * 4  # bytes of an entry of a layer
        rounded = sum(-(-n // 32) * 32 for n in (400 // 8, 32 + 7))
        assert kv_bytes(cache.layers[0]) <= rounded * one + 64
        assert kv_bytes(cache.layers[0]) >= entries * one
        for _ in range(100):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert kv_bytes(cache.layers[0]) <= (-(-500 // 8 // 32) * 32 + 96) * one + 64
    assert cache.get_seq_length() == 500


def test_beams_halves_and_layers():
    model, ids = tiny_llama(), prompt(50)
    with regard.attach(model, regard.CCAAttention(**SMALL)):
        beams = generated(model, ids, tokens=12, num_beams=3)
        assert beams.shape == (1, 62)
        greedy = generated(model, ids, tokens=12)
        scores = []
        for row in (beams, greedy):
            found = logits(model, row).log_softmax(-1)[0, 49:-1]
            scores.append(float(found.gather(1, row[0, 50:, None]).sum()))
        assert scores[0] >= scores[1] - 1e-3
    with regard.attach(model, regard.CCAAttention(**SMALL, layers="last:1")), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert [isinstance(layer, CoreContextLayer) for layer in cache.layers] == [False, False, True]
    with regard.attach(model.bfloat16(), regard.CCAAttention(**SMALL)):
        assert bool(torch.isfinite(generated(model, ids).float()).all())


def test_crop_takes_back_what_the_window_still_holds():
    model, ids = tiny_llama(), prompt(45)
    with regard.attach(model, regard.CCAAttention(group=6, window=10)), torch.no_grad():
        whole = logits(model, ids)
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-2)
        again = model(ids[:, 43:], past_key_values=cache, use_cache=True).logits
        assert torch.allclose(again, whole[:, 43:], atol=1e-4)
        with pytest.raises(ValueError, match="crop"):
            cache.crop(-12)
        cache.crop(-45)
        assert torch.allclose(model(ids, past_key_values=cache, use_cache=True).logits, whole, atol=1e-4)


def test_training_reaches_the_weights():
    model, ids = tiny_llama().train(), prompt(50)
    for options in ({"use_cache": False}, {"use_cache": True}):
        with regard.attach(model, regard.CCAAttention(**SMALL)):
            model.zero_grad()
            model(ids, labels=ids, **options).loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)
        found = torch.cat([g.flatten() for g in grads])
        first = found if options["use_cache"] is False else first  # noqa: F821
    assert torch.allclose(found, first, atol=1e-5)


def test_other_masks_are_refused():
    method = regard.CCAAttention(**SMALL)
    odd = call()
    odd.mask, odd.causal = (torch.rand(1, 1, 60, 60) > 0.5) & torch.ones(60, 60).tril().bool(), False
    with pytest.raises(ValueError, match="attention_mask"):
        method.attend(odd)
    assert method.attend(call(window=20)) is None
    right = call(batch=2, padding=[0, 3])
    assert method.attend(right).shape == right.q.shape


def small(kind):
    """A random model with weights large enough that attention is far from uniform."""
    import transformers as hf

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    shared = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if kind == "gemma2":  # every second layer slides, scores are capped
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 2.0}
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, **shared))
    elif kind == "gpt2":  # learned positions, added to the tokens
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=128, **shared)
        )
    else:  # rotary positions in a part of the channels
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, **shared))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) * 0.4)
    return model.eval()


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "gpt_neox"])
def test_other_families(kind):
    model, ids = small(kind), prompt(40)
    want = logits(model, ids)
    with regard.attach(model, regard.CCAAttention(4, 64)):
        assert torch.allclose(logits(model, ids), want, atol=1e-3)
    with regard.attach(model, regard.CCAAttention(4, 6)):
        whole = logits(model, ids)
        assert not torch.allclose(whole, want, atol=1e-2)
        assert torch.allclose(decoded(model, ids, 13)[0], whole, atol=1e-3)


def test_encoder_decoder_models():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=64,
        vocab_size=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model, heard = WhisperForConditionalGeneration(config).eval(), torch.randn(1, 8, 40)
    ids = prompt(30)
    with torch.no_grad():
        want = model(heard, decoder_input_ids=ids).logits
        with regard.attach(model, regard.CCAAttention(4, 64)):
            assert torch.allclose(model(heard, decoder_input_ids=ids).logits, want, atol=1e-4)
        with regard.attach(model, regard.CCAAttention(4, 6)):
            found = model(heard, decoder_input_ids=ids)
            assert bool(torch.isfinite(found.logits).all())


def test_models_that_cannot():
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    with pytest.raises(regard.UnsupportedModelError):
        regard.attach(BertModel(BertConfig(**sizes)), regard.CCAAttention())
    scaled = LlamaForCausalLM(
        LlamaConfig(**sizes, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    )
    with pytest.raises(regard.UnsupportedModelError, match="rotary"):
        regard.attach(scaled, regard.CCAAttention())


def test_bad_fields():
    for options, match in (
        ({"group": 0}, "group"),
        ({"window": 0}, "window"),
        ({"pool": "sum"}, "pool"),
        ({"layers": "all"}, "layers"),
    ):
        with pytest.raises(ValueError, match=match):
            regard.CCAAttention(**options)
