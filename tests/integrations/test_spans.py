"""Token spans: from text and chat templates to tokens, and what goes wrong in words."""

import pytest
import torch

import regard
from regard.integrations import find_text
from tiny import CharTokenizer, tiny_llama
from tiny_chat import SIZE, chat_tokenizer

SYSTEM, USER, ANSWER = "Be brief.", "The user said: keep the keys. Where are the keys?", "In the user drawer."
TALK = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": USER},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "user"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return regard.chat_spans(tokenizer, TALK, parts={"question": "Where are the keys?", "keys": ("keys", 1)})


def test_roles_hold_exactly_what_was_said(prompt, tokenizer):
    assert prompt.text_of("system") == SYSTEM
    assert prompt.text_of("assistant") == ANSWER
    assert prompt.text_of("user") == USER + "user"  # also where the message is the name of the role
    assert prompt.text_of("question") == "Where are the keys?"
    assert prompt.where("keys")[0] > prompt.where("question")[0]  # the second of the two
    assert [turn.role for turn in prompt.turns[0]] == ["system", "user", "assistant", "user"]
    for turn in prompt.turns[0]:
        assert tokenizer.decode(prompt.input_ids[0, slice(*turn.tokens)]) == turn.text


def test_every_token_is_said_or_template(prompt):
    spans = prompt.spans
    said = spans["system"].int() + spans["user"].int() + spans["assistant"].int() + spans["template"].int()
    assert (said == 1).all()


def test_several_conversations_are_padded_and_padding_is_nothing(tokenizer, prompt):
    short = [{"role": "user", "content": "Hi"}]
    for side in ("left", "right"):
        both = regard.chat_spans(tokenizer, [short, TALK], padding_side=side)
        assert both.text_of("user", 0) == "Hi" and both.text_of("user", 1) == USER + "user"
        padding = both.inputs["attention_mask"] == 0
        assert padding[0].any() and not torch.stack(list(both.spans.values()))[:, padding].any()
        assert not both.spans["assistant"][0].any()
        with pytest.raises(ValueError, match="a span with tokens in row 0"):
            both.where("assistant", 0)


def test_templates_that_strip_and_messages_of_parts():
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template)
    talk = [
        {"role": "system", "content": "  calm  "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    prompt = regard.chat_spans(tokenizer, talk, image_token="<image>")
    assert prompt.text_of("system") == "calm" and prompt.text_of("user") == "What is it?"
    assert prompt.spans["image"].sum() == 1 and not (prompt.spans["image"] & prompt.spans["template"]).any()
    with pytest.raises(ValueError, match="image_token"):
        regard.chat_spans(tokenizer, talk, image_token="<no such token>")


def test_plain_text_and_a_slow_tokenizer():
    prompt = regard.text_spans(
        CharTokenizer(), "abc def abc", {"last": ("abc", 1), "both": ["abc", ("abc", 1)], "mid": (4, 7)}
    )
    assert prompt.where("last") == (8, 11) and prompt.where("mid") == (4, 7)
    assert prompt.spans["both"].sum() == 6 and prompt.text_of("both") == "abcabc"


def test_a_token_of_several_characters_belongs_to_what_it_touches(tokenizer):
    prompt = regard.text_spans(tokenizer, "a\U0001f389b", {"b": "b", "party": "\U0001f389"})
    assert prompt.spans["party"].sum() == 4 and prompt.spans["b"].sum() == 1  # four bytes of one character


def test_a_span_that_is_not_there_shows_what_is_near(tokenizer):
    with pytest.raises(ValueError, match="question: got 'Where are his keys.*nearest is .*Where are the keys"):
        regard.chat_spans(tokenizer, TALK, parts={"question": "Where are his keys?"})
    with pytest.raises(ValueError, match="no character of it"):
        find_text("abc", "xyz")
    with pytest.raises(ValueError, match="number 2', need a number below 2"):
        find_text("abab", "ab", 2)
    with pytest.raises(ValueError, match="context"):  # markers of the template are not looked at
        regard.chat_spans(tokenizer, TALK, parts={"context": "<|im_start|>"})


def test_bad_input():
    with pytest.raises(ValueError, match="chat template"):
        regard.chat_spans(chat_tokenizer(None), TALK)
    with pytest.raises(ValueError, match="chat template"):
        regard.chat_spans(CharTokenizer(), TALK)
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match="messages"):
        regard.chat_spans(tokenizer, [{"content": "no role"}])
    with pytest.raises(TypeError, match="messages"):
        regard.chat_spans(tokenizer, "hello")
    with pytest.raises(ValueError, match="texts"):
        regard.text_spans(tokenizer, "")
    with pytest.raises(ValueError, match="0 <= begin < end"):
        regard.text_spans(tokenizer, "abc", {"x": (2, 9)})
    with pytest.raises(TypeError, match="x: got int"):
        regard.text_spans(tokenizer, "abc", {"x": 3})
    silent = chat_tokenizer(
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves this one"):
        regard.chat_spans(silent, TALK)


def test_spans_reach_a_method(prompt):
    seen = []

    class Look(regard.Method):
        def edit(self, call):
            seen.append(call.spans)

    model = tiny_llama(vocab_size=SIZE)
    with torch.no_grad(), regard.attach(model, Look(), spans=prompt.spans):
        model.generate(**prompt.inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    length = prompt.input_ids.shape[1]
    assert torch.equal(seen[0]["user"], prompt.spans["user"])
    assert seen[-1]["user"].shape[1] == length + 1 and not seen[-1]["user"][:, length:].any()
