"""`regard compare` under a chat template, and the rows that steer by spans or by given heads."""

import pytest
import torch

from regard.bench.compare import Settings, compare
from regard.bench.prompts import English
from regard.bench.report import markdown
from regard.bench.roster import ON_REQUEST, ROSTER, canonical, parse_method
from tiny import tiny_llama
from tiny_chat import SIZE, chat_tokenizer


def test_a_chat_prompt_holds_needle_question_and_the_beginning_of_the_answer():
    tokenizer = chat_tokenizer()
    for depth in (0.0, 0.5, 1.0):
        talk = English(tokenizer).chat(800, depth, 1)
        text = tokenizer.decode(talk.prompt)
        said = tokenizer.decode(talk.answer)
        assert 700 < len(talk.prompt) <= 800 and text.startswith("<|im_start|>user")
        lead = text[text.rindex("assistant\n") + len("assistant\n") :]
        assert f"{lead}{said}." in text  # the needle, word for word
        assert tokenizer.decode(torch.tensor(talk.prompt)[talk.spans["question"][0]]).startswith(
            "What does the text say"
        )
        assert all(span.shape == (1, len(talk.prompt)) for span in talk.spans.values())
        user = tokenizer.decode(torch.tensor(talk.prompt)[talk.spans["user"][0]])
        assert said in user and "<|im_start|>" not in user
    with pytest.raises(ValueError, match="context"):
        English(tokenizer).chat(100, 0.5, 0)
    with pytest.raises(ValueError, match="chat template"):
        English(chat_tokenizer(None)).chat(800, 0.5, 0)


def test_steering_acts_on_the_chat_and_on_nothing_else():
    model = tiny_llama(vocab_size=SIZE)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.o_proj.weight.mul_(20)
    settings = Settings("tiny", 512, 4, 1, ("ppl", "needle", "chat"), depths=(0.5,))
    rows = [
        parse_method(text, budget=0.25, context=512) for text in ("emphasize(alpha=0.3)", "mask-heads(heads=[(1, 2)])")
    ]
    result = compare(model, chat_tokenizer(), rows, settings)
    dense, steered, masked = result.labels
    assert not result.skipped
    for figure in ("prompt_ppl", "needle"):
        assert result.mean(steered, figure) == pytest.approx(result.mean(dense, figure), rel=1e-5)
    assert abs(result.mean(steered, "chat") - result.mean(dense, "chat")) > 1e-3
    assert result.mean(masked, "chat") != result.mean(dense, "chat")
    assert "chat" in markdown(result)


def test_rows_that_need_heads_say_so():
    assert canonical("ACT") == "act" and not set(ON_REQUEST) & set(ROSTER)
    label, method = parse_method("act(heads=[(3, 1)], beta=0.5)", budget=0.25, context=512)
    assert method.beta == 0.5 and "heads" in label
    with pytest.raises(ValueError, match=r"methods: got 'act', need act\(heads=...\)"):
        parse_method("act", budget=0.25, context=512)
