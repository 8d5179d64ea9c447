"""ZeroTuning: one factor on the first token, on small random models."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import regard
from regard.methods.edits import ZeroTuning
from regard.ops import scale_weights


def small(seed=0, config=LlamaConfig, model=LlamaForCausalLM, **options):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    return model(config(**{**settings, **options})).eval()


@pytest.fixture(scope="module")
def llama():
    return small()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def eager_with(model, edit):
    """The same model with its weights edited by plain PyTorch: an attention function of transformers' own kind."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if attention_mask is None else scores + attention_mask[..., : key.shape[2]]
        weights = edit(module.layer_idx, scores.softmax(-1))
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("test_edited", forward)
    AttentionMaskInterface.register("test_edited", eager_mask)
    model = copy.deepcopy(model)
    model.set_attn_implementation("test_edited")
    return model


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0, 50.0])
def test_equals_editing_the_weights(llama, ids, gamma):
    method = ZeroTuning(gamma, heads=[0, 3], layers=[0, 2])

    def edit(layer, weights):
        if layer == 1:
            return weights
        edited = weights.clone()
        edited[:, [0, 3], :, 0] *= gamma
        return edited / edited.sum(-1, keepdim=True).clamp(min=1e-30)

    with torch.no_grad(), regard.attach(llama, method):
        ours = llama(ids).logits
    with torch.no_grad():
        theirs = eager_with(llama, edit)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_holds_in_prefill_and_in_every_decode_step(llama, ids):
    method = ZeroTuning(3.0)
    with torch.no_grad(), regard.attach(llama, method):
        whole = llama(ids, use_cache=False).logits
        out = llama(ids[:, :5], use_cache=True)
        steps, past = [out.logits], out.past_key_values
        for i in range(5, ids.shape[1]):
            out = llama(ids[:, i : i + 1], past_key_values=past, use_cache=True)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"gamma": 1.0}, {"heads": []}, {"heads": {}}, {"layers": []}, {"span": (3, 3)}])
def test_nothing_to_change_changes_nothing(llama, ids, options):
    with torch.no_grad():
        with regard.attach(llama):
            plain = llama(ids).logits
        with regard.attach(llama, ZeroTuning(**{"gamma": 2.0, **options})):
            edited = llama(ids).logits
    torch.testing.assert_close(edited, plain, rtol=0, atol=1e-6)


def test_left_padding_does_not_matter(llama, ids):
    """The first real token is meant, not the padding; and rows do not depend on their batch mates."""
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :8]], 1)
    batch = torch.cat([padded, ids[1:]])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    for method in (ZeroTuning(8.0), ZeroTuning(5.0, span=(1, 4))):
        with regard.attach(llama, method):
            alone = llama.generate(ids[:1, :8], **settings)
            mates = llama.generate(batch, attention_mask=mask, **settings)
        for a, b in zip(alone.logits, mates.logits, strict=True):
            torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
        assert alone.sequences[0, 8:].tolist() == mates.sequences[0, 12:].tolist()


def test_more_weight_on_the_key_with_larger_gamma(llama, ids):
    got = []
    for gamma in (0.0, 0.5, 1.0, 2.0, 8.0):
        with torch.no_grad(), regard.attach(llama, ZeroTuning(gamma, key=2, heads=[1])) as session:
            seen = []
            session.observers.append(lambda call, seen=seen: seen.append(call.weights([1], [9])[:, 0, 0, 2].mean()))
            llama(ids)
        got.append(float(seen[0]))
    assert got == sorted(got)
    assert got[0] == 0.0 < got[1]


def test_tables_of_heads_say_the_same_as_lists(llama, ids):
    ways = [
        ZeroTuning(2.0, heads=[1, 2], layers=[1]),
        ZeroTuning(2.0, heads={1: [1, 2]}),
        ZeroTuning(2.0, heads=[(1, 1), (1, 2)]),
        ZeroTuning(2.0, heads=[(-2, 2), (-2, 1)]),
        ZeroTuning(2.0, heads=(1, 2), layers=[-2]),
    ]
    outs = []
    for method in ways:
        with torch.no_grad(), regard.attach(llama, method):
            outs.append(llama(ids).logits)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_a_window_that_dropped_the_key_is_left_alone():
    """A sliding-window cache forgets token 0: from then on there is nothing to scale."""
    model = small(config=MistralConfig, model=MistralForCausalLM, sliding_window=6, num_hidden_layers=1)
    ids = torch.randint(3, 97, (1, 14), generator=torch.Generator().manual_seed(2))
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids, **settings)
    with regard.attach(model, ZeroTuning(40.0)):
        tuned = model.generate(ids, **settings)
    for a, b in zip(plain.logits, tuned.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        before = model(ids[:, :4]).logits
        with regard.attach(model, ZeroTuning(40.0)):
            after = model(ids[:, :4]).logits
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(ids, dtype):
    model = small().to(dtype)
    with torch.no_grad(), regard.attach(model, ZeroTuning(2.5)) as session:
        rows = []
        session.observers.append(lambda call: rows.append((call.weights(), call)))
        logits = model(ids).logits
    weights, call = rows[0]
    call.biases.clear()
    torch.testing.assert_close(weights, scale_weights(call.weights(), 0, 2.5), rtol=1e-5, atol=1e-6)
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gamma": -1.0}, ValueError, "gamma"),
        ({"gamma": "2"}, TypeError, "gamma"),
        ({"gamma": float("nan")}, ValueError, "gamma"),
        ({"key": -1}, ValueError, "key"),
        ({"span": (5, 2)}, ValueError, "span"),
        ({"span": (1, 2), "key": 3}, ValueError, "key"),
        ({"heads": "all"}, TypeError, "heads"),
        ({"heads": [(1, 2, 3)]}, ValueError, "heads"),
    ],
)
def test_bad_settings(options, error, words):
    with pytest.raises(error, match=words):
        ZeroTuning(**options)


def test_layers_and_heads_that_the_model_has_not(llama, ids):
    with pytest.raises(ValueError, match="layer 3"):
        regard.attach(llama, ZeroTuning(heads={3: [0]}))
    with pytest.raises(ValueError, match="layer -4"):
        regard.attach(llama, ZeroTuning(layers=[-4]))
    with regard.attach(llama, ZeroTuning(heads=[4])), pytest.raises(ValueError, match="heads"):
        llama(ids)
    with torch.no_grad():
        llama(ids)  # nothing stayed attached
