"""MaskHeads: heads switched off, on small random models."""

import pytest
import torch
import transformers as hf
from transformers import BloomConfig, LlamaConfig, LlamaForCausalLM

import regard
from regard.methods import AttentionCall
from regard.methods.edits import MaskHeads

GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(1))


def calls_of(model, method, run):
    """What every call of a run ended with: (call, head outputs before any method's output edit is lost)."""
    seen = []
    with torch.no_grad(), regard.attach(model, method) as session:
        session.observers.append(seen.append)
        out = run(model)
    return seen, out


@pytest.mark.parametrize("phase", ["decode", "all"])
def test_a_uniform_head_reads_the_mean_of_what_it_sees(llama, ids, phase):
    seen, _ = calls_of(llama, MaskHeads([(1, 3), (0, 0)], phase=phase), lambda m: m.generate(ids, **GREEDY))
    treated = 0
    for call in seen:
        weights = call.weights()
        for head in range(4):
            visible = torch.arange(call.kv_len)[None] <= torch.arange(call.q_len)[:, None] + call.kv_len - call.q_len
            uniform = (visible / visible.sum(-1, keepdim=True)).expand(2, -1, -1)
            masked = (call.layer, head) in {(1, 3), (0, 0)} and (phase == "all" or call.phase == "decode")
            treated += masked
            assert torch.allclose(weights[:, head], uniform, atol=1e-6) == (masked or call.kv_len == 1)
        out = call.attention()
        if call.phase == "decode" and call.layer == 1:
            torch.testing.assert_close(out[:, 3, 0], call.v[:, 1].mean(1), rtol=1e-5, atol=1e-6)
    assert treated == 2 * (4 if phase == "all" else 3)


def test_prefill_is_untouched_while_decoding_alone_is_masked(llama, ids):
    plain = llama.generate(ids, **GREEDY)
    with regard.attach(llama, MaskHeads([(0, 0), (0, 1), (2, 2)])):
        masked = llama.generate(ids, **GREEDY)
    torch.testing.assert_close(masked.logits[0], plain.logits[0], rtol=1e-5, atol=1e-6)
    assert (masked.logits[1] - plain.logits[1]).abs().max() > 1e-4


def test_padding_is_not_read_by_a_uniform_head(llama, ids):
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :6]], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    with regard.attach(llama, MaskHeads({0: [0, 2], 2: [1]}, phase="all")):
        alone = llama.generate(ids[:1, :6], **GREEDY)
        mates = llama.generate(
            torch.cat([padded, ids[1:]]), attention_mask=torch.cat([mask, torch.ones_like(mask)]), **GREEDY
        )
    for a, b in zip(alone.logits, mates.logits, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)


def test_zero_is_removing_the_heads_part_of_the_output_projection(llama, ids):
    import copy

    ablated = copy.deepcopy(llama)
    with torch.no_grad():
        ablated.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0  # head 1, head_dim 8
        wanted = ablated(ids).logits
        with regard.attach(llama, MaskHeads([(1, 1)], mode="zero", phase="all")):
            torch.testing.assert_close(llama(ids).logits, wanted, rtol=1e-5, atol=1e-6)


def test_mean_puts_the_given_output_in_place(llama, ids):
    zeros = torch.zeros(3, 4, 8)
    with torch.no_grad():
        with regard.attach(llama, MaskHeads([(-2, 1)], mode="zero", phase="all")):
            zero = llama(ids).logits
        with regard.attach(llama, MaskHeads([(1, 1)], mode="mean", phase="all", means=zeros)):
            torch.testing.assert_close(llama(ids).logits, zero)
        means = torch.randn(3, 4, 8)
        with regard.attach(llama, MaskHeads([(1, 1), (1, 3)], mode="mean", phase="all", means=means)) as session:
            outputs = []
            session.observers.append(lambda call: outputs.append(call))
            other = llama(ids).logits
    call = next(call for call in outputs if call.layer == 1)
    edited = call.output_edits[0](torch.randn(2, 4, 10, 8))
    assert torch.equal(edited[:, 1], means[1, 1].expand(2, 10, 8)) and torch.equal(
        edited[:, 3], means[1, 3].expand(2, 10, 8)
    )
    assert (other - zero).abs().max() > 1e-4


def test_no_heads_changes_nothing(llama, ids):
    with torch.no_grad():
        with regard.attach(llama):
            plain = llama(ids).logits
        for heads in ([], {}, {1: []}):
            with regard.attach(llama, MaskHeads(heads, phase="all")):
                assert torch.equal(llama(ids).logits, plain)


def test_a_models_own_bias_goes_but_what_it_forbids_stays():
    """Scores with a position bias and a float mask: uniform means uniform over what that mask allows."""
    bias = torch.randn(1, 2, 3, 5)
    forbidden = torch.zeros(1, 1, 3, 5)
    forbidden[..., 3:] = torch.finfo(torch.float32).min
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    call = AttentionCall(module=None, layer=0, q=q, k=k, v=v, num_layers=1, biases=[bias, forbidden])
    call.run([MaskHeads([(0, 1)], phase="all")])
    weights = call.weights()
    torch.testing.assert_close(weights[:, 1], torch.tensor([1, 1, 1, 0, 0]).div(3).expand(1, 3, 5))
    untouched = AttentionCall(module=None, layer=0, q=q, k=k, v=v, num_layers=1, biases=[bias, forbidden]).weights()
    torch.testing.assert_close(weights[:, 0], untouched[:, 0])


def test_input_tensors_are_not_modified():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    kept = q.clone()
    AttentionCall(module=None, layer=0, q=q, k=k, v=k, num_layers=1).run([MaskHeads([(0, 1)], phase="all")])
    assert torch.equal(q, kept)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"heads": [(0, 1)], "mode": "unifrom"}, ValueError, "uniform"),
        ({"heads": [(0, 1)], "phase": "always"}, ValueError, "phase"),
        ({"heads": [0, 1]}, ValueError, "heads"),
        ({"heads": None}, ValueError, "heads"),
        ({"heads": [(0, 1)], "mode": "mean"}, TypeError, "means"),
        ({"heads": [(0, 1)], "means": torch.zeros(1, 2, 3)}, TypeError, "means"),
        ({"heads": [(0, 1)], "mode": "mean", "means": torch.zeros(2, 3)}, ValueError, "means"),
    ],
)
def test_bad_settings(options, error, words):
    with pytest.raises(error, match=words):
        MaskHeads(**options)


def test_heads_that_the_model_has_not(llama, ids):
    with pytest.raises(ValueError, match="layer 7"):
        regard.attach(llama, MaskHeads([(7, 0)]))
    with regard.attach(llama, MaskHeads([(0, 4)], phase="all")), pytest.raises(ValueError, match="heads"):
        llama(ids)
    with (
        regard.attach(llama, MaskHeads([(0, 1)], mode="mean", phase="all", means=torch.zeros(3, 4, 9))),
        pytest.raises(ValueError, match="means"),
    ):
        llama(ids)


def test_a_model_that_joining_does_not_serve_says_so():
    from transformers import BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="AttentionInterface"):
        regard.attach(model, MaskHeads([(0, 1)]))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_decode_steps_are_recognised_in_other_families(family, ids):
    """Where the cache is handed on under another name, a decode step must still be known for one."""
    common = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    sizes = {**common, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if family == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, **common))
    elif family == "gpt_neox":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes))
    else:
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=6))
    model.eval()
    every = [(layer, head) for layer in range(2) for head in range(4)]
    with regard.attach(model):
        plain = model.generate(ids, **GREEDY).logits
    seen, masked = calls_of(model, MaskHeads(every), lambda m: m.generate(ids, **GREEDY).logits)
    assert [call.phase for call in seen] == ["prefill"] * 2 + ["decode"] * 6
    torch.testing.assert_close(masked[0], plain[0], rtol=1e-5, atol=1e-6)
    assert (masked[1] - plain[1]).abs().max() > 1e-6
    for call in seen[2:]:
        weights = call.weights()
        visible = weights > 0
        torch.testing.assert_close(weights, visible / visible.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
