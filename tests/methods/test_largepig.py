"""LargePiG: copying from the source, inside generate and in scoring, on small random models."""

import math

import pytest
import torch

import regard
from regard.bench.answers import answer_scores
from regard.methods import StreamingLLM
from regard.methods.decoders import (
    LargePiG,
    attended_source,
    contrast,
    copy_gate,
    early_exit_logits,
    js_divergence,
    mix_in_pointer,
    pointer_distribution,
    trusted_source,
)
from tiny import tiny_llama

SETTINGS = {"max_new_tokens": 6, "pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(3, bos_token_id=1, eos_token_id=None)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(5))


# The parts


def test_divergences():
    p, q = torch.randn(4, 3, 50, dtype=torch.float64), torch.randn(4, 3, 50, dtype=torch.float64)
    paper = js_divergence(p[0], q, "paper")
    a, b = p[0].softmax(-1), q.softmax(-1)
    m = (a + b) / 2
    torch.testing.assert_close(paper, 0.5 * ((a * (a / m).log()).sum(-1) + (b * (b / m).log()).sum(-1)))
    released = js_divergence(p[0], q)
    torch.testing.assert_close(released, 0.5 * ((m * (m / a).log()).mean(-1) + (m * (m / b).log()).mean(-1)))
    assert (released > 0).all() and (paper <= math.log(2)).all()
    assert js_divergence(p[0], p[:1]).abs().max() < 1e-15
    far = torch.full((8,), -1e4).index_fill(0, torch.tensor([0]), 0.0)
    assert js_divergence(far, far.flip(0)[None], "paper").isfinite().all()


def test_gate_stays_within_its_bounds():
    mature, early = torch.randn(5, 40), torch.randn(3, 5, 40) * 9
    assert copy_gate(mature, early, 1e9).tolist() == [0.5] * 5
    assert copy_gate(mature, early, 0.0).tolist() == [0.0] * 5
    assert copy_gate(mature, early, 1e9, max_gate=0.2).max() == pytest.approx(0.2)


@pytest.mark.parametrize("normalize", [True, "first", False])
def test_pointer_gathers_attention_by_token(normalize):
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.15]])
    tokens, special = torch.tensor([[5, 7, 5, 1]]), torch.tensor([[False, False, False, True]])
    out = pointer_distribution(attention, tokens, 9, special=special, normalize=normalize)[0]
    total = {True: 0.6, "first": 0.75, False: 1.0}[normalize]
    assert out[5] == pytest.approx(0.4 / total, abs=1e-5) and out[7] == pytest.approx(0.2 / total, abs=1e-5)
    assert out.sum() == pytest.approx({True: 1.0, "first": 0.8, False: 0.6}[normalize], abs=1e-5)
    many = pointer_distribution(attention[:, None].expand(-1, 3, -1), tokens, 9, special=special, normalize=normalize)
    torch.testing.assert_close(many[0, 2], out)


def test_an_empty_source_points_nowhere():
    out = pointer_distribution(
        torch.rand(2, 4), torch.ones(2, 4, dtype=torch.long), 9, source=torch.zeros(2, 4, dtype=torch.bool)
    )
    assert torch.equal(out, torch.zeros(2, 9))


def test_mixture():
    scores = torch.randn(3, 20)
    pointer = torch.zeros(3, 20).index_fill(1, torch.tensor([4]), 1.0)
    gate = torch.tensor([0.0, 0.5, 0.25])
    mixed = mix_in_pointer(scores, pointer, gate)
    assert torch.equal(mixed[0], scores[0])
    torch.testing.assert_close(mixed[1:].exp().sum(-1), torch.ones(2))
    assert mixed[1, 4].exp() >= 0.5
    banned = scores.index_fill(1, torch.tensor([4]), -torch.inf)
    assert mix_in_pointer(banned, pointer, gate)[1, 4].exp() == pytest.approx(0.5)


def test_contrast_takes_the_layer_that_differs_most_row_by_row():
    mature, early = torch.randn(2, 30), torch.stack([torch.randn(2, 30), torch.randn(2, 30)])
    scores = contrast(mature, early, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), relative_top=0.0)
    for row in range(2):
        torch.testing.assert_close(scores[row], mature[row].log_softmax(-1) - early[row, row].log_softmax(-1))
    kept = contrast(mature, early, torch.ones(2, 2), relative_top=0.5).isfinite()
    probs = mature.softmax(-1)
    assert torch.equal(kept, probs >= 0.5 * probs.amax(-1, keepdim=True))


def test_early_exit_logits(llama, ids):
    with torch.no_grad():
        out = llama(ids, output_hidden_states=True)
    exits = early_exit_logits(llama, out.hidden_states, [0, 2, 3, -1])
    torch.testing.assert_close(exits[2], out.logits)
    assert torch.equal(exits[2], exits[3])
    torch.testing.assert_close(exits[1], llama.lm_head(out.hidden_states[2]))
    normed = early_exit_logits(llama, out.hidden_states, [2, 3], norm=True)
    torch.testing.assert_close(normed[0], llama.lm_head(llama.model.norm(out.hidden_states[2])))
    torch.testing.assert_close(normed[1], out.logits)


def test_source_masks_keep_what_is_expected_and_seen():
    ids = torch.arange(20)[None] % 7
    sure = torch.nn.functional.one_hot(ids.roll(-1, 1), 7).float() * 30
    attention = torch.full((1, 20, 20), 0.05).tril()
    assert trusted_source(sure, ids, attention, share=None, skip=0).all()
    wrong = sure.clone()
    wrong[0, 11] = -wrong[0, 11]  # predicts token 12 to be anything else
    kept = trusted_source(wrong, ids, attention, share=None, skip=0, history=0.0)
    assert (~kept).nonzero().tolist() == [[0, 12]]
    assert trusted_source(wrong[:, :5], ids[:, :5], attention[:, :5, :5]).all()
    attention = attention * (1.0 + torch.arange(20))
    attention[:, 10:, 3] = 0.0
    assert (~attended_source(attention)).nonzero()[:, 1].tolist() == [
        0,
        3,
    ]  # the least looked at, and the one at the cut


# In generate


def test_scale_zero_is_ordinary_decoding_bit_for_bit(llama, ids):
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
    ):
        torch.manual_seed(1)
        with regard.attach(llama):
            plain = llama.generate(ids, **SETTINGS, **options)
        torch.manual_seed(1)
        with regard.attach(llama, LargePiG(scale=0)):
            ours = llama.generate(ids, **SETTINGS, **options)
        assert torch.equal(plain.sequences, ours.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, ours.scores, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
def test_steps_are_the_definition(llama, ids, use_cache):
    """Each step's distribution, recomputed from whole forwards with eager attention."""
    method = LargePiG(source=(2, 9), candidates=[1, 2], scale=2000.0)
    with regard.attach(llama, method):
        out = llama.generate(ids, **SETTINGS, do_sample=False, use_cache=use_cache)
    llama.set_attn_implementation("eager")
    for step, scores in enumerate(out.scores):
        with torch.no_grad():
            past = llama(out.sequences[:, : 11 + step], output_attentions=True, output_hidden_states=True)
        final = past.logits[:, -1]
        early = torch.stack([llama.lm_head(past.hidden_states[c][:, -1]) for c in (1, 2)])
        gate = copy_gate(final, early, 2000.0)
        pointer = pointer_distribution(past.attentions[-1].mean(1)[:, -1, 2:9], ids[:, 2:9], 128)
        wanted = (1 - gate[:, None]) * final.softmax(-1) + gate[:, None] * pointer
        torch.testing.assert_close(scores.exp(), wanted, rtol=1e-4, atol=1e-6)
        assert gate.min() > 0 and gate.max() <= 0.5
    llama.set_attn_implementation("sdpa")


def test_top_k_comes_before_the_mixture(llama, ids):
    """Sampling shapes the model's own part; what the pointer points to is never cut off."""
    method = LargePiG(source=(0, 4), scale=1e9)
    with regard.attach(llama, method):
        out = llama.generate(ids, **SETTINGS, do_sample=True, top_k=2, temperature=0.5)
    for scores in out.scores:
        probs = scores.exp()
        for row in range(2):
            source = sorted(set(ids[row, :4].tolist()))
            assert probs[row, source].sum() >= 0.5 - 1e-5
            assert (probs[row] > 0).sum() <= 2 + len(source)
            assert probs[row].sum() == pytest.approx(1.0, abs=1e-5)


def test_rows_do_not_depend_on_left_padding_or_mates(llama, ids):
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :7]], 1)
    batch = torch.cat([padded, ids[1:]])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    for source in ((1, 5), (-3, None), None):
        with regard.attach(llama, LargePiG(source=source, scale=3000.0)):
            alone = llama.generate(ids[:1, :7], **SETTINGS, do_sample=False)
            mates = llama.generate(batch, attention_mask=mask, **SETTINGS, do_sample=False)
        for a, b in zip(alone.scores, mates.scores, strict=True):
            torch.testing.assert_close(a[0].exp(), b[0].exp(), rtol=1e-4, atol=1e-6)


def test_a_source_can_be_a_span_or_a_mask(llama, ids):
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, 2:9] = True
    with regard.attach(llama, LargePiG(source=(2, 9), scale=900.0)):
        wanted = llama.generate(ids, **SETTINGS, do_sample=False).scores
    for source, spans in ((mask, None), ("document", {"document": mask[:1, :9]})):
        with regard.attach(llama, LargePiG(source=source, scale=900.0), spans=spans):
            got = llama.generate(ids, **SETTINGS, do_sample=False).scores
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    with regard.attach(llama, LargePiG(source="dokument")), pytest.raises(ValueError, match="dokument"):
        llama.generate(ids, **SETTINGS, do_sample=False)


def test_one_session_generates_several_times_and_leaves_no_trace(llama, ids):
    before = [dict(module._forward_pre_hooks) for module in llama.modules()]
    with regard.attach(llama, LargePiG(source=(2, 9), scale=900.0)) as session:
        first = llama.generate(ids, **SETTINGS, do_sample=False).scores
        hooks, observers = sum(len(m._forward_pre_hooks) for m in llama.modules()), len(session.observers)
        longer = llama.generate(torch.cat([ids, ids], 1), **SETTINGS, do_sample=False).sequences
        again = llama.generate(ids, **SETTINGS, do_sample=False).scores
        assert (hooks, observers) == (sum(len(m._forward_pre_hooks) for m in llama.modules()), len(session.observers))
    assert longer.shape == (2, 28)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [dict(module._forward_pre_hooks) for module in llama.modules()] == before


def test_beams_and_return_sequences(llama, ids):
    with regard.attach(llama, LargePiG(source=(2, 9), scale=900.0)):
        beams = llama.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
        several = llama.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=2, pad_token_id=0)
    assert beams.shape == (2, 16) and several.shape == (4, 16)


def test_beside_an_edit(llama, ids):
    """A decoder and an edit claim different seams; the pointer sees the edited attention."""
    with regard.attach(llama, LargePiG(source=(0, 1), scale=1e9, normalize=False), regard.ZeroTuning(0.0, layers=[-1])):
        scores = llama.generate(ids, **SETTINGS, do_sample=False).scores
    assert scores[0].exp().sum(-1).tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_where_the_past_is_not_whole_it_says_so(llama, ids):
    with regard.attach(llama, LargePiG(), StreamingLLM()), pytest.raises(ValueError, match="StreamingLLM"):
        llama.generate(ids, **SETTINGS, do_sample=False)
    embeds = llama.get_input_embeddings()(ids)
    with regard.attach(llama, LargePiG()), pytest.raises(ValueError, match="input_ids"):
        llama.generate(inputs_embeds=embeds, **SETTINGS, do_sample=False)


# Scoring


def test_scoring_agrees_with_generation(llama, ids):
    """What scoring gives to the greedy answer is what generation saw."""
    for options in (
        {"source": (2, 9)},
        {"normalize": False},
        {"contrast": True, "relative_top": 0.0, "pointer": False},
        {"attention_layers": [0, 1]},
    ):
        method = LargePiG(scale=700.0, **options)
        with regard.attach(llama, method):
            out = llama.generate(ids[:1], **SETTINGS, do_sample=False)
        answer = out.sequences[0, 11:]
        log_probs = torch.cat(
            out.scores
        )  # with the pointer log P already, which sums below 1 where it is not normalised
        log_probs = log_probs.log_softmax(-1) if method.contrast else log_probs
        said = float(log_probs.gather(1, answer[:, None]).sum())
        [score] = answer_scores(llama, ids[0], [answer], method)
        assert float(score) == pytest.approx(said, rel=1e-4)


def test_plain_scoring_and_scoring_with_other_methods(llama, ids):
    answers = [ids[1, :3], ids[1, 4:5].tolist()]
    scores = answer_scores(llama, ids[0], answers)
    with torch.no_grad():
        logits = llama(torch.cat([ids[0], ids[1, :3]])[None]).logits[0, 10:-1].log_softmax(-1)
    assert float(scores[0]) == pytest.approx(float(logits.gather(1, ids[1, :3, None]).sum()), rel=1e-5)
    torch.testing.assert_close(answer_scores(llama, ids[0], answers, LargePiG(scale=0)), scores, rtol=1e-6, atol=0)
    assert (answer_scores(llama, ids[0], answers, regard.ZeroTuning(9.0)) - scores).abs().max() > 1e-4


def test_which_variant_is_the_default():
    assert (LargePiG().variant, LargePiG().scale) == ("released", 100.0)
    assert (LargePiG(contrast=True, pointer=False).variant, LargePiG(variant="paper").scale) == ("released", 1.0)
    assert (LargePiG(contrast=True).variant, LargePiG(contrast=True).scale) == ("paper", 1.0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"source": 5}, TypeError, "source"),
        ({"source": (1, 2, 3)}, ValueError, "keys|source"),
        ({"source": torch.ones(3, 4)}, ValueError, "source"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"max_gate": 2.0}, ValueError, "max_gate"),
        ({"relative_top": -0.1}, ValueError, "relative_top"),
        ({"normalize": "last"}, ValueError, "normalize"),
        ({"variant": "official"}, ValueError, "released"),
        ({"pointer": False}, ValueError, "pointer"),
    ],
)
def test_bad_settings(options, error, words):
    with pytest.raises(error, match=words):
        LargePiG(**options)


def test_layers_and_models_that_do_not_fit(llama, ids):
    for options in ({"candidates": [4]}, {"candidates": []}, {"mature": 9}):
        with pytest.raises(ValueError, match="candidates|layer numbers"):
            regard.attach(llama, LargePiG(**options))
    with pytest.raises(ValueError, match="attention_layers"):
        regard.attach(llama, LargePiG(attention_layers=[3]))
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4))
    with pytest.raises(ValueError, match="encoder-decoder"):
        regard.attach(t5, LargePiG())
    with pytest.raises(ValueError, match="answers"):
        answer_scores(llama, ids[0], [])
