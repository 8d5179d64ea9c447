"""PGI prompts, error rates, and the proposal by attention."""

import pytest
import torch

import regard
from regard.bench.pgi import PGIPrompt, error_report, wilson_interval
from regard.lens import blame, misdirection
from tiny import CharTokenizer, tiny_llama
from tiny_chat import SIZE, chat_tokenizer

FRAME = PGIPrompt(
    "You advise clerks.",
    {"Ann": "Ann pays on Friday.", "Bob": "Bob pays on Monday.", "Cy": "Cy never pays."},
    ["Name the day.", "If unsure, say so."],
)


def test_all_parts_are_there_and_the_group_asked_about_is_last():
    text = FRAME.render("When does Ann pay?", about="Ann")
    assert text == FRAME.render("When does Ann pay?", about="Ann")
    order = [
        "You advise clerks.",
        "Name the day.",
        "If unsure",
        "[Bob]",
        "[Cy]",
        "[Ann]\nAnn pays on Friday.",
        "When does Ann pay?",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert FRAME.render("When?").index("[Ann]") < FRAME.render("When?").index("[Bob]")
    messages = FRAME.messages("When does Ann pay?", about="Ann")
    assert messages[0] == {"role": "system", "content": "You advise clerks."} and text.endswith(messages[1]["content"])


def test_empty_parts_are_refused():
    with pytest.raises(ValueError, match="persona"):
        PGIPrompt(" ", {"a": "b"}, "c")
    with pytest.raises(ValueError, match="groups"):
        PGIPrompt("p", {}, "c")
    with pytest.raises(ValueError, match=r"groups\['a'\]"):
        PGIPrompt("p", {"a": " "}, "c")
    with pytest.raises(ValueError, match="intelligence"):
        PGIPrompt("p", {"a": "b"}, [])
    with pytest.raises(ValueError, match="about"):
        FRAME.render("When?", about="Dan")
    with pytest.raises(ValueError, match="question"):
        FRAME.render("")


def test_the_paper_s_rate():
    report = error_report({"ok": 3874, "misdirection": 100, "hallucination": 26})
    assert report.rate == pytest.approx(0.0315) and (report.errors, report.total) == (126, 4000)
    assert report.interval == pytest.approx((0.0265, 0.0374), abs=1e-4)
    assert error_report(["ok", "misdirection", "ok", "ok"]).rate == 0.25
    assert "126 errors in 4000" in str(report)


def test_wilson_interval_solves_its_equation():
    for hits, total in ((0, 5), (3, 10), (10, 10), (126, 4000)):
        for bound in wilson_interval(hits, total):
            if 1e-9 < bound < 1 - 1e-9:  # |rate - p| = z sqrt(p (1 - p) / n)
                assert abs(hits / total - bound) == pytest.approx(
                    1.959964 * (bound * (1 - bound) / total) ** 0.5, rel=1e-5
                )
    assert wilson_interval(0, 5)[0] == pytest.approx(0.0) and wilson_interval(5, 5)[1] == pytest.approx(1.0)


def test_bad_labels():
    with pytest.raises(ValueError, match="labels"):
        error_report(["fine"])
    with pytest.raises(ValueError, match="labels"):
        error_report([])
    with pytest.raises(ValueError, match="hits"):
        wilson_interval(3, 2)


def test_blame():
    assert blame(True, 0.0, 0.9) == "ok"
    assert blame(False, 1.0, 0.0) == "hallucination"  # all on the evidence: never misdirection
    assert blame(False, 0.2, 0.5) == "misdirection"
    assert blame(False, 0.3, 0.3) == "hallucination"
    assert blame(False, 0.01, 0.05) == "hallucination"  # it looked at neither


def test_masses_are_sums_of_recorded_weights():
    tokenizer, model = chat_tokenizer(), tiny_llama(vocab_size=SIZE)
    prompt = regard.chat_spans(tokenizer, FRAME.messages("When does Ann pay?", about="Ann"))
    heads = [(0, 1), (2, 3)]
    found = misdirection(
        model, tokenizer, prompt, "Ann pays on Friday.", {"Bob": "Bob pays on Monday."}, heads, answer="Friday"
    )
    span = regard.chat_spans(
        tokenizer, FRAME.messages("When does Ann pay?", about="Ann"), {"i": "Ann pays on Friday."}
    ).spans["i"][0]
    ids = torch.cat([prompt.input_ids, torch.tensor([tokenizer("Friday")["input_ids"]])], 1)
    made = regard.record(model, ids)
    length = prompt.input_ids.shape[1]
    rows = slice(length - 1, ids.shape[1] - 1)
    wanted = (
        sum(float(made.weights(layer, head)[0, 0, rows, :length][:, span].sum(-1).mean()) for layer, head in heads) / 2
    )
    assert found.intended == pytest.approx(wanted, rel=1e-4)
    assert 0 < found.intended + found.distracted < 1 and 0 < found.share < 1
    assert found.verdict(True) == "ok" and "intended" not in prompt.spans


def test_generated_answers_and_plain_prompts():
    model, tokenizer = tiny_llama(), CharTokenizer()
    found = misdirection(model, tokenizer, "Ann: 5. Bob: 7. Ann?", "Ann: 5", ["Bob: 7"], [(1, 0)], max_new_tokens=4)
    assert found.answer is not None and set(found.distractors) == {"Bob: 7"}
    with pytest.raises(ValueError, match="not Cy: got 'Cy: 9'.*nearest"):
        misdirection(model, tokenizer, "Ann: 5. Bob: 7.", "Ann: 5", {"Cy": "Cy: 9"}, [(1, 0)])
    with pytest.raises(ValueError, match="heads"):
        misdirection(model, tokenizer, "Ann: 5.", "Ann", [], [])
