"""Query generation: prompts with their source, and MC metrics over a file."""

import json
from collections import Counter

import pytest
import torch

import regard
from regard.bench.metrics_mc import mc_scores
from regard.bench.query_generation import QueryItem, load_queries, query_prompt, score_queries
from tiny import CharTokenizer, tiny_llama
from tiny_chat import SIZE, chat_tokenizer

ITEM = QueryItem(
    "Write a query for this text.", "Bees live in hives. Bees", ("bees in hives", "hives"), ("bees in caves",)
)
ENTRY = {"instruction": "Write.", "input": "Bees live in hives.", "good_query": ["hives"], "bad_query": ["caves"]}
ENTRY |= {"human_query": "bees?", "photo_id": 7}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=SIZE)


def test_the_source_is_the_text():
    for tokenizer in (
        chat_tokenizer(),
        CharTokenizer(),
        chat_tokenizer("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"),
    ):
        assert query_prompt(tokenizer, ITEM, examples=["Bees: a query"]).text_of("source") == ITEM.text
        assert query_prompt(tokenizer, ITEM, limit=9).text_of("source") == "Bees live"
        spaced = QueryItem("Write.", " Bees ", ("a",), ("b",))
        assert query_prompt(tokenizer, spaced).text_of("source").strip() == "Bees"


def test_metrics_are_those_of_the_scores(model):
    tokenizer = chat_tokenizer()
    prompt = query_prompt(tokenizer, ITEM)

    def log_prob(query):
        ids = torch.cat([prompt.input_ids[0], torch.tensor(tokenizer(" " + query)["input_ids"])])
        with torch.no_grad():
            steps = model(ids[None]).logits[0].log_softmax(-1)
        return float(sum(steps[i - 1, ids[i]] for i in range(prompt.input_ids.shape[1], len(ids))))

    wanted = mc_scores([log_prob(query) for query in ITEM.good], [log_prob(query) for query in ITEM.bad])
    got = score_queries(model, tokenizer, [ITEM]).mean
    assert (got.mc1, got.mc3) == (wanted.mc1, wanted.mc3)
    assert got.mc2 == pytest.approx(wanted.mc2, rel=1e-3) and got.margin == pytest.approx(wanted.margin, abs=1e-3)


def test_the_pointer_copies_from_the_text_alone(model):
    tokenizer = chat_tokenizer()
    source = query_prompt(tokenizer, ITEM).where("source")
    pointed = score_queries(model, tokenizer, [ITEM], regard.LargePiG(scale=1e6, max_gate=1.0)).mean
    named = score_queries(model, tokenizer, [ITEM], regard.LargePiG(source=source, scale=1e6, max_gate=1.0)).mean
    assert pointed == named != score_queries(model, tokenizer, [ITEM]).mean


def test_a_file_is_read_and_what_is_unusable_counted(model, tmp_path):
    path = tmp_path / "video_query.json"
    path.write_text(json.dumps([ENTRY, {"input": "x", "good_query": ["a"]}, "text", {**ENTRY, "input": ""}]))
    skipped = Counter()
    [item] = load_queries(path, skipped)
    assert item == QueryItem("Write.", "Bees live in hives.", ("hives",), ("caves",), "bees?", "7")
    assert skipped == {"bad missing": 1, "no object": 1, "text missing": 1}
    report = score_queries(model, chat_tokenizer(), path)
    assert len(report.items) == 1 and "3 left out" not in str(report) and "1 left out: no object" in str(report)


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="path"):
        load_queries(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="a JSON list"):
        load_queries(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="at least one entry"):
        load_queries(tmp_path / "b.json")
    with pytest.raises(TypeError, match="items"):
        score_queries(model, chat_tokenizer(), [ENTRY])
    with pytest.raises(ValueError, match="good"):
        QueryItem("", "text", (), ("b",))
