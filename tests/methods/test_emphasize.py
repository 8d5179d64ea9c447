"""Emphasis on a span of the prompt, on small random models."""

from itertools import pairwise

import pytest
import torch

import regard
from regard.lens import span_mass
from regard.methods.edits import Emphasize, emphasis_exponent
from regard.ops import scale_weights
from tiny import tiny_llama
from tiny_chat import SIZE, chat_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "The key is red."},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Which?"},
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=SIZE)


@pytest.fixture(scope="module")
def prompt():
    return regard.chat_spans(chat_tokenizer(), TALK)


def weights(model, prompt, *methods, layer=2):
    with regard.attach(model, *methods, spans=prompt.spans):
        return regard.record(model, prompt.inputs).weights(layer)


@torch.no_grad()
def logits(model, prompt, *methods):
    with regard.attach(model, *methods, spans=prompt.spans):
        return model(**prompt.inputs).logits


def test_alpha_one_changes_nothing(model, prompt):
    for variant in ("paper", "released"):
        assert torch.equal(logits(model, prompt, Emphasize(alpha=1.0, variant=variant)), logits(model, prompt))


def test_is_scaling_the_other_weights_and_renormalising(model, prompt):
    edited = weights(model, prompt, Emphasize("user", alpha=0.4), layer=0)
    wanted = scale_weights(weights(model, prompt, layer=0), ~prompt.spans["user"], 0.4)
    torch.testing.assert_close(edited, wanted)


def test_include_with_the_inverse_is_exclude(model, prompt):
    exclude = logits(model, prompt, Emphasize(alpha=0.5))
    include = logits(model, prompt, Emphasize(alpha=2.0, form="include"))
    torch.testing.assert_close(include, exclude, atol=1e-5, rtol=1e-5)


def test_the_whole_prompt_evenly_changes_the_prompt_nothing(model, prompt):
    torch.testing.assert_close(logits(model, prompt, Emphasize(alpha=0.5, form="generation")), logits(model, prompt))


def test_exponents_of_the_two_variants():
    span = torch.tensor([[False, True, True, False, True, False]])
    assert emphasis_exponent(span).tolist() == [[1, 0, 0, 1, 0, 1]]
    assert emphasis_exponent(span, variant="released").tolist() == [[2, 1, 1, 2, 1, 2]]
    assert emphasis_exponent(span, "include").tolist() == [[-1, 0, 0, -1, 0, -1]]
    assert emphasis_exponent(span, "generation", "released").tolist() == [[2] * 6]


def test_released_accumulates_over_layers_and_stays(model):
    talk = regard.chat_spans(chat_tokenizer(), TALK[1:2])  # one run, so that only the layers count
    unit = torch.tensor(0.8).log().item()
    for layers, times in ((None, [1, 2, 3]), ([0, 1], [1, 2, 2]), ([2], [0, 0, 1])):
        seen = []
        method = Emphasize(alpha=0.8, layers=layers, variant="released")
        with torch.no_grad(), regard.attach(model, method, spans=talk.spans) as session:
            session.observers.append(
                lambda call, seen=seen: seen.append(sum(float(bias.min()) for bias in call.biases))
            )
            model(**talk.inputs)
        assert seen == pytest.approx([time * unit for time in times])


def test_mass_on_the_span_grows_as_alpha_falls(model, prompt):
    found = []
    for alpha in (1.0, 0.7, 0.4, 0.1):
        with regard.attach(model, Emphasize(alpha=alpha, layers=[0]), spans=prompt.spans):
            found.append(span_mass(model, prompt, queries=["last"], keys=["user"], layers=[0]).mass)
    assert all((after > before).all() for before, after in pairwise(found))


def test_decoding_steers_prompt_keys_alone(model, prompt):
    method = Emphasize("user", alpha=0.3)
    ids, step = prompt.input_ids, torch.tensor([[70], [80]]).T
    with torch.no_grad(), regard.attach(model, method, spans=prompt.spans):
        whole = model(torch.cat([ids, step], 1), use_cache=False).logits[:, -2:]
        out = model(ids, use_cache=True)
        parts = []
        for i in range(2):
            out = model(step[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    made = weights(model, prompt, method)
    assert made.shape[-1] == ids.shape[1]


def test_heads_and_layers_alone(model, prompt):
    only = weights(model, prompt, Emphasize(alpha=0.3, heads=[(0, 1)]), layer=0)
    plain, every = weights(model, prompt, layer=0), weights(model, prompt, Emphasize(alpha=0.3), layer=0)
    torch.testing.assert_close(only[:, 1], every[:, 1])
    assert torch.equal(only[:, [0, 2, 3]], plain[:, [0, 2, 3]])


def test_batch_mates_padding_and_beams(model, prompt):
    both = regard.chat_spans(chat_tokenizer(), [TALK[1:2], TALK])
    alone = regard.chat_spans(chat_tokenizer(), TALK[1:2])
    method = Emphasize(alpha=0.3, variant="released")
    torch.testing.assert_close(
        logits(model, both, method)[0, -1], logits(model, alone, method)[0, -1], atol=1e-4, rtol=1e-4
    )
    with torch.no_grad(), regard.attach(model, method, spans=both.spans):
        out = model.generate(**both.inputs, num_beams=2, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2


def test_a_span_without_tokens_and_a_tensor(model, prompt):
    nothing = {"user": torch.zeros_like(prompt.spans["user"])}
    plain = logits(model, prompt)
    with torch.no_grad(), regard.attach(model, Emphasize(alpha=0.1), spans=nothing):
        torch.testing.assert_close(model(**prompt.inputs).logits, plain)
    torch.testing.assert_close(
        logits(model, prompt, Emphasize(prompt.spans["user"], alpha=0.5)), logits(model, prompt, Emphasize(alpha=0.5))
    )
    union = logits(model, prompt, Emphasize(("user", "system"), alpha=0.5))
    torch.testing.assert_close(
        union, logits(model, prompt, Emphasize(prompt.spans["user"] | prompt.spans["system"], alpha=0.5))
    )


def test_bad_input(model, prompt):
    with pytest.raises(ValueError, match="alpha"):
        Emphasize(alpha=0.0)
    with pytest.raises(ValueError, match="form"):
        Emphasize(form="excluded")
    with pytest.raises(TypeError, match="span"):
        Emphasize(span=3)
    with pytest.raises(ValueError, match="span: got 'context'.*user"):
        regard.attach(model, Emphasize("context"), spans=prompt.spans)
    with pytest.raises(ValueError, match="heads"):
        regard.attach(model, Emphasize(heads=[(9, 0)]), spans=prompt.spans)
    with (
        pytest.raises(ValueError, match="heads"),
        torch.no_grad(),
        regard.attach(model, Emphasize(heads=[4]), spans=prompt.spans),
    ):
        model(**prompt.inputs)
