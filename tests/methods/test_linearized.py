"""Pretrained models with linear attention in place of their softmax."""

import pytest
import torch
from torch import nn

import regard
from regard.methods import LinearizedEncoder, linear_maps, load_linear_maps, save_linear_maps
from regard.ops import linear_attention
from tiny import tiny_llama


def _maps(model, kind="hedgehog", seed=0, **options):
    maps = linear_maps(model, kind, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in maps.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return maps


def _ids(*shape, seed=0):
    return torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share_kv", [False, True])
def test_it_is_the_op_on_the_models_own_queries_and_keys(share_kv):
    model, seen = tiny_llama(), []
    maps = _maps(model, share_kv=share_kv, feature_dim=5)
    with regard.attach(model, regard.Linearized(maps)) as session, torch.no_grad():
        session.observers.append(lambda call: seen.append((call, call.run(session.methods))))
        model(_ids(2, 13), use_cache=False)
    assert len(seen) == 3
    for call, out in seen:
        pair = maps[str(call.layer)]
        k, v = call.k, call.v
        if not share_kv:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        want = linear_attention(call.q, k, v, feature_map=(pair.q, pair.k), normalize=True, eps=1e-12)
        torch.testing.assert_close(out, want)


def test_decoding_from_the_state_equals_reading_at_once():
    model = tiny_llama()
    method = regard.Linearized(_maps(model))
    ids = _ids(2, 20)
    with regard.attach(model, method) as session, torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = session.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 6, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        held = [layer.nbytes for layer in cache.layers]
        model(_ids(2, 30, seed=5), past_key_values=cache)
        assert [layer.nbytes for layer in cache.layers] == held == [2 * 4 * 16 * (8 + 1) * 4] * 3
        with pytest.raises(ValueError, match="state cannot"):
            cache.crop(3)


def test_generation_beams_and_left_padding():
    model = tiny_llama()
    method = regard.Linearized(_maps(model))
    prompt = _ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    both = torch.cat([padded, _ids(1, 13, seed=3)])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with regard.attach(model, method):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 9:]
        batch = model.generate(both, attention_mask=mask, **options)
        assert torch.equal(batch[0, 13:], alone)
        slow = both[1:]
        for _ in range(6):
            with torch.no_grad():
                slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(batch[1], slow[0])
        beams = model.generate(both, attention_mask=mask, num_beams=3, **options)
        mates = model.generate(both[1:], attention_mask=mask[1:], num_beams=3, **options)
        assert torch.equal(beams[1], mates[0])


def test_padding_without_a_cache_and_other_masks():
    model = tiny_llama()
    method = regard.Linearized(_maps(model))
    ids = _ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with regard.attach(model, method), torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(got[0, 5:], model(ids[:1, 5:], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], model(ids[1:], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)
        # two documents in a row: a mask that no state can honour
        blocks = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).bool().tril()[None, None]
        place = torch.cat([torch.arange(5), torch.arange(7)])[None]
        got = model(ids[1:], attention_mask=blocks, position_ids=place, use_cache=False).logits
        torch.testing.assert_close(got[:, 5:], model(ids[1:, 5:], use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_layers_without_maps_stay_and_detaching_leaves_no_trace():
    model, ids = tiny_llama(), _ids(1, 10)
    with torch.no_grad():
        before = model(ids).logits
        maps = _maps(model, layers=[1])
        with regard.attach(model, regard.Linearized(maps)) as session:
            kinds = [type(layer).__name__ for layer in session.new_cache().layers]
            changed = model(ids, use_cache=True).logits
        assert kinds == ["DynamicLayer", "LinearizedLayer", "DynamicLayer"]
        assert not torch.allclose(changed, before) and torch.equal(model(ids).logits, before)


def test_a_map_without_weights_is_the_baseline_by_the_same_path(tmp_path):
    model = tiny_llama()
    maps = linear_maps(model, "elu+1")
    assert not list(maps.parameters())
    path = save_linear_maps(maps, tmp_path / "elu.safetensors")
    with torch.no_grad():
        with regard.attach(model, regard.Linearized(maps)):
            one = model(_ids(1, 8)).logits
        with regard.attach(model, regard.Linearized(path)):
            assert torch.equal(model(_ids(1, 8)).logits, one)


def test_files(tmp_path):
    model = tiny_llama()
    maps = _maps(model, "hedgehog_exp", layers="odd", feature_dim=3, tie=True)
    again = load_linear_maps(save_linear_maps(maps, tmp_path / "maps.safetensors"))
    assert list(again) == ["1"] and again["1"].q is again["1"].k
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in maps.state_dict().items())
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    for path, names in ((tmp_path / "none", "that is there"), (tmp_path / "broken.safetensors", "whole safetensors")):
        with pytest.raises(ValueError, match=names):
            load_linear_maps(path)


def test_a_bidirectional_model():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    ).eval()
    maps = _maps(model)
    ids = torch.randint(1, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with regard.attach(model, LinearizedEncoder(maps)), torch.no_grad():
        got = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got[0, :5], model(ids[:1, :5]).last_hidden_state[0], rtol=1e-4, atol=1e-5)
        last = ids.clone()
        last[1, -1] = 3
        assert not torch.allclose(model(last).last_hidden_state[1, 0], got[1, 0])  # it sees what comes later
    with pytest.raises(ValueError, match="causal model for Linearized"):
        regard.attach(model, regard.Linearized(maps))


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))


def _hybrid():
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (_mamba, "no softmax attention"),
        (_hybrid, r"layers \[1\].*linear_attention"),
        (lambda: nn.Linear(2, 2), "no softmax"),
    ],
)
def test_models_that_are_no_softmax_attention(make, names):
    model = make()
    with pytest.raises(regard.UnsupportedModelError, match=names):
        linear_maps(model)
    with pytest.raises(regard.UnsupportedModelError, match=names + "|no attention layer"):
        regard.attach(model, regard.Linearized(linear_maps(tiny_llama())))


def test_bad_input():
    model = tiny_llama()
    other = tiny_llama(num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(regard.UnsupportedModelError, match="4 query and 2 kv heads of 8"):
        regard.attach(model, regard.Linearized(linear_maps(other)))
    with pytest.raises(regard.UnsupportedModelError, match="maps for"):
        regard.attach(tiny_llama(num_hidden_layers=1), regard.Linearized(linear_maps(model)))
    for bad in (None, {}, {"0": nn.Linear(2, 2)}):
        with pytest.raises(TypeError, match="maps: got"):
            regard.Linearized(bad)
    for change, names in (({"kind": "hedge"}, "kind"), ({"layers": [7]}, "layers"), ({"layers": "first"}, "layers")):
        with pytest.raises(ValueError, match=names):
            linear_maps(model, **change)
    with regard.attach(model, regard.Linearized(linear_maps(model)), regard.MaskHeads({0: [1]})):
        pass


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def _gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
        )
    )  # fmt: skip


def _neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, **sizes))


@pytest.mark.parametrize(("make", "converted"), [(_gpt2, 2), (_gemma2, 1), (_neox, 2)])
def test_other_families_need_no_patch(make, converted):
    torch.manual_seed(0)
    model = make().eval()
    maps = _maps(model)
    assert len(maps) == converted  # a layer with a sliding window of its own stays
    ids = _ids(2, 12)
    with regard.attach(model, regard.Linearized(maps)) as session, torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = session.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 4], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_model_of_sliding_windows_alone_has_nothing_to_convert():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = MistralConfig(vocab_size=20, sliding_window=4, **sizes)
    config.layer_types = ["sliding_attention"]
    with pytest.raises(regard.UnsupportedModelError, match="none to convert"):
        linear_maps(MistralForCausalLM(config))
