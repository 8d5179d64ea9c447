"""DuoAttention and StreamingLLM: the ragged cache holds what it says, computes what it says, and frees the rest."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import regard
from regard import masks
from regard.methods.caches import kv_bytes, load_gates, streaming_heads, streaming_mask
from regard.methods.call import UnsupportedModelError

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0)
    ).eval()


@pytest.fixture(scope="module")
def prompt():
    torch.manual_seed(1)
    return torch.randint(1, 97, (2, 60))


def step_logits(model, ids, *methods, attention_mask=None, forced=None, **options):
    """Logits of every decoding step, the continuation being given, so that two runs can be compared."""
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    with regard.attach(model, *methods), torch.no_grad():
        out = model(ids, attention_mask=attention_mask, use_cache=True)
        logits = [out.logits[:, -1]]
        for token in forced.unbind(1):
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
            out = model(
                token[:, None], attention_mask=attention_mask, past_key_values=out.past_key_values, use_cache=True
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits), out.past_key_values


FORCED = torch.tensor([[5, 9, 2, 44, 7], [1, 8, 30, 31, 90]])


def gates(streams_layers=(0, 2)):
    """Heads 1 and 3 stream, in the given layers."""
    table = torch.ones(4, 4)
    for layer in streams_layers:
        table[layer, [1, 3]] = 0.0
    return table


@pytest.mark.parametrize(
    "method",
    [
        regard.DuoAttention(budget=1.0, sink=4, recent=8),
        regard.DuoAttention(budget=0.25, sink=4, recent=100),
        regard.DuoAttention(budget=0.25, sink=4, recent=100, variant="paper"),
        regard.StreamingLLM(sink=4, window=200),
    ],
)
def test_nothing_evicted_is_dense(model, prompt, method):
    want, _ = step_logits(model, prompt, forced=FORCED)
    got, _ = step_logits(model, prompt, method, forced=FORCED)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def reference_logits(model, ids, forced, streams, sink, recent):
    """One forward over prompt and continuation with the streaming mask on the given heads: what the ragged cache must amount to."""
    tokens = torch.cat([ids, forced], 1)

    class Reference(regard.Method):
        def mask(self, call):
            small = (masks.sliding_window(recent) | masks.sink(sink)) & masks.causal
            group = call.num_heads // call.num_kv_heads
            return masks.per_head([small if s else masks.everything for s in streams[call.layer] for _ in range(group)])

    with regard.attach(model, Reference()), torch.no_grad():
        return model(tokens).logits[:, ids.shape[1] - 1 :].transpose(0, 1)


def test_paper_variant_equals_the_masked_model(model, prompt):
    table = gates((0, 1, 2, 3))
    method = regard.DuoAttention(budget=0.5, gates=table, sink=4, recent=8, variant="paper")
    want = reference_logits(model, prompt, FORCED, table == 0, 4, 8)
    got, _ = step_logits(model, prompt, method, forced=FORCED)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_streaming_llm_kept_positions_equals_the_masked_model(model, prompt):
    want = reference_logits(model, prompt, FORCED, torch.ones(4, 4, dtype=torch.bool), 3, 9)
    got, _ = step_logits(model, prompt, regard.StreamingLLM(3, 9, positions="kept"), forced=FORCED)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with regard.attach(model, regard.StreamingLLM(3, 9)), torch.no_grad():  # without a cache the same rule is a mask
        scored = model(torch.cat([prompt, FORCED], 1), use_cache=False).logits[:, prompt.shape[1] - 1 :].transpose(0, 1)
    torch.testing.assert_close(scored, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        regard.DuoAttention(budget=0.5, sink=4, recent=8),
        regard.DuoAttention(budget=0.5, sink=4, recent=8, variant="paper"),
        regard.StreamingLLM(4, 8),
        regard.StreamingLLM(4, 8, positions="kept"),
    ],
)
def test_left_padding_does_not_matter(model, prompt, method):
    want, _ = step_logits(model, prompt[:, :11], method, forced=FORCED)
    padded = torch.nn.functional.pad(prompt[:, :11], (7, 0))
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    got, _ = step_logits(model, padded, method, attention_mask=mask, forced=FORCED)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_rows_shorter_than_the_sink_fill_it_while_decoding(model, prompt):
    short = prompt[:1, :2]
    method = regard.StreamingLLM(4, 3, positions="kept")
    want, _ = step_logits(model, short, method, forced=FORCED[:1])
    both = torch.stack([torch.nn.functional.pad(short[0], (9, 0)), prompt[1, :11]])
    mask = torch.ones_like(both)
    mask[0, :9] = 0
    got, _ = step_logits(model, both, method, attention_mask=mask, forced=FORCED)
    torch.testing.assert_close(got[:, :1], want, rtol=1e-5, atol=1e-6)


def test_chunked_prefill(model, prompt):
    method = regard.DuoAttention(budget=0.5, gates=gates((0, 1, 2, 3)), sink=4, recent=8, variant="paper")
    want, _ = step_logits(model, prompt, method, forced=FORCED)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        for chunk in prompt.split(17, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], want[0], rtol=1e-5, atol=1e-5)


def test_memory_is_what_is_kept(model):
    torch.manual_seed(0)
    ids = torch.randint(1, 97, (1, 400))
    _, dense = step_logits(model, ids, forced=FORCED[:1])
    _, cache = step_logits(
        model, ids, regard.DuoAttention(budget=0.5, gates=gates((0, 1, 2, 3)), sink=4, recent=8), forced=FORCED[:1]
    )
    page, row = 128, 2 * 8 * 4  # keys and values, head_dim 8, float32
    full_heads, stream_heads = 8, 8
    slack = 4 * 8 * 15  # `start` of each layer, head flags and head numbers
    at_most = row * (full_heads * -(-405 // page) * page + stream_heads * (4 + 8)) + slack
    assert kv_bytes(cache) <= at_most < 0.7 * kv_bytes(dense)


def test_budget_in_tokens_is_met_on_average(model, prompt):
    _, cache = step_logits(model, prompt, regard.DuoAttention(budget=36, sink=4, recent=8), forced=FORCED[:, :0])
    kept = [torch.where(layer.streaming, 12, 60).float().mean() for layer in cache.layers]
    assert abs(torch.stack(kept).mean() - 36) <= 3


def test_generate_beam_and_sampling(model, prompt):
    with regard.attach(model, regard.DuoAttention(budget=1.0, sink=4, recent=8)):
        beams = model.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False)
        torch.manual_seed(3)
        sampled = model.generate(prompt, max_new_tokens=6, do_sample=True)
    assert torch.equal(beams, model.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False))
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(prompt, max_new_tokens=6, do_sample=True))


def test_beams_follow_their_rows_in_the_ragged_cache(model, prompt):
    """With 2 beams the cache is reordered while it streams; one beam kept twice must decode like one beam."""
    method = regard.DuoAttention(budget=0.5, gates=gates(), sink=4, recent=8)
    with regard.attach(model, method) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt, past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(FORCED[:, :1].flip(0), past_key_values=cache, use_cache=True).logits[:, -1]
    want, _ = step_logits(model, prompt, method, forced=FORCED[:, :1])
    torch.testing.assert_close(swapped.flip(0), want[1], rtol=1e-5, atol=1e-6)


def test_sinks_moved_by_the_model_s_own_rotary(model):
    """positions='cache': a sink key moved forward by d is the key that the model would make d positions later."""
    from regard.methods.caches.decoder import find_rotary

    attention, rotary = model.model.layers[0].self_attn, model.model.rotary_emb
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    keys = torch.randn(2, 4, 3, 8)
    at = [rotary(keys, torch.tensor([[0, 1, 2]]) + by) for by in (0, 17)]
    early, late = (apply_rotary_pos_emb(keys, keys, *cos_sin)[1] for cos_sin in at)
    moved = find_rotary(model)(early, torch.tensor([17, 17]))
    torch.testing.assert_close(moved, late, rtol=1e-5, atol=1e-5)
    assert attention.layer_idx == 0


def test_cache_positions_bound_the_distance(model, prompt):
    """Evicting more tokens must not change what the sinks look like: two prompts that end alike decode alike in one layer."""
    one = LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, num_key_value_heads=4, max_position_embeddings=512)
    ).eval()
    long = torch.cat([prompt[:, :3], prompt[:, 20:]], 1)
    longer = torch.cat([prompt[:, :3], prompt[:, 5:20], prompt[:, 20:]], 1)
    method = regard.StreamingLLM(sink=3, window=8)
    a, _ = step_logits(one, long, method, forced=FORCED)
    b, _ = step_logits(one, longer, method, forced=FORCED)
    torch.testing.assert_close(a[1:], b[1:], rtol=1e-5, atol=1e-5)
    kept, _ = step_logits(one, longer, regard.StreamingLLM(sink=3, window=8, positions="kept"), forced=FORCED)
    assert (kept[1:] - b[1:]).abs().max() > 1e-4


def test_gqa_to_mha_and_sliding_layers():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    ids = torch.randint(0, 97, (2, 20))
    want, _ = step_logits(gpt2, ids, forced=FORCED)
    got, _ = step_logits(gpt2, ids, regard.DuoAttention(budget=0.5, sink=4, recent=40), forced=FORCED)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="positions='kept'"):
        regard.attach(gpt2, regard.StreamingLLM())
    mistral = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=16)).eval()
    with pytest.raises(UnsupportedModelError, match="sliding window already"):
        regard.attach(mistral, regard.DuoAttention())
    config = Qwen2Config(
        **SIZES, num_key_value_heads=4, use_sliding_window=True, sliding_window=16, max_window_layers=2
    )
    qwen = Qwen2ForCausalLM(config).eval()
    want, _ = step_logits(qwen, ids, forced=FORCED)
    got, cache = step_logits(qwen, ids, regard.DuoAttention(budget=0.5, sink=4, recent=40), forced=FORCED)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert [type(layer).__name__ for layer in cache.layers] == ["RaggedLayer"] * 2 + ["DynamicSlidingWindowLayer"] * 2


def test_models_without_a_past_are_refused():
    bert = BertModel(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    for method in (regard.DuoAttention(), regard.StreamingLLM(positions="kept")):
        with pytest.raises(ValueError, match="Bert"):
            regard.attach(bert, method)


def test_crop_takes_back_only_what_is_there(model, prompt):
    with regard.attach(model, regard.DuoAttention(budget=1.0, sink=4, recent=8)) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.crop(-5)
        again = model(prompt[:, -5:], past_key_values=cache, use_cache=True).logits[:, -1]
        want = model(prompt, use_cache=False).logits[:, -1]
    torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-5)
    with regard.attach(model, regard.DuoAttention(budget=0.5, sink=4, recent=8)) as session, torch.no_grad():
        cache = session.new_cache()
        model(prompt, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="evicted"):
            cache.layers[0].crop(-5)


def test_cache_outlives_its_method_with_a_clear_error(model, prompt):
    with regard.attach(model, regard.DuoAttention()), torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(RuntimeError, match="no longer attached"):
        model(prompt[:, :1], past_key_values=cache)
        model(prompt[:, :1], past_key_values=cache)


def test_gates_files(tmp_path):
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text("0.1\t1.2\n-0.3\t0.5\n")
    assert torch.equal(load_gates(tmp_path), torch.tensor([[0.1, 1.0], [0.0, 0.5]]))
    assert regard.DuoAttention.from_tsv(file, budget=0.5).gates.shape == (2, 2)
    file.write_text("0.1\tx\n")
    with pytest.raises(ValueError, match="tab-separated"):
        load_gates(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_gates(tmp_path / "nowhere.tsv")


def test_streaming_heads():
    table = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert torch.equal(streaming_heads(table, 0.5), torch.tensor([[True, False], [False, True]]))
    assert not streaming_heads(table, 0.0).any() and streaming_heads(table, 1.0).all()


def test_streaming_mask():
    mask = streaming_mask(6, sink=1, recent=2)
    want = [[int(k <= q and (k < 1 or q - k < 2)) for k in range(6)] for q in range(6)]
    assert mask.int().tolist() == want


@pytest.mark.parametrize(
    "options,message",
    [
        ({"budget": 0.0}, "budget: got 0.0"),
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"budget": 100}, "budget: got 100, need more tokens than sink"),
        ({"budget": "half"}, "budget: got str"),
        ({"sink": -1}, "sink: got -1"),
        ({"recent": 0}, "recent: got 0"),
        ({"variant": "release"}, "variant: unknown name 'release'; did you mean released"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        regard.DuoAttention(**options)


def test_gates_of_another_model(model):
    with pytest.raises(ValueError, match=r"gates: got 'shape \(2, 4\)', need .*\(4, 4\)"):
        regard.attach(model, regard.DuoAttention(gates=torch.ones(2, 4)))
