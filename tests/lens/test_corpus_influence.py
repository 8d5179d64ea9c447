"""AttentionInfluence: what documents lose without some heads, by its definition; and over files."""

import gzip
import json
import math

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from regard.lens import (
    CorpusReport,
    HeadScores,
    KeyValueProbes,
    corpus_documents,
    corpus_influence,
    document_losses,
    influence_heads,
    rank_corpus,
    score_files,
    select_top,
)
from tiny import CharTokenizer, tiny_llama
from tiny_chat import SIZE, chat_tokenizer

TEXTS = ["the cat sat on the mat", "a", "", "zx qv zx qv zx qv zx", "one two three four five six seven"]
HEADS = [(0, 1), (2, 3)]


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(2)
    with torch.no_grad():  # sharper heads than a fresh model has
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(30)
            layer.self_attn.v_proj.weight.mul_(5)
        model.lm_head.weight.mul_(20)
    return model


def scores(model, texts, heads=HEADS, **options):
    return list(corpus_influence(model, CharTokenizer(), texts, heads, **options))


def eager_loss(model, text, heads, literal=False):
    """The definition, in transformers' own attention function with weights replaced."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        weights = (query @ key.mT * scaling + attention_mask[..., : key.shape[2]]).softmax(-1)
        length = weights.shape[-1]
        rows = torch.ones(length, length).tril()
        uniform = rows / (length if literal else rows.sum(-1, keepdim=True))
        for layer, head in heads:
            if layer == module.layer_idx:
                weights[:, head] = uniform
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("test_uniform", forward)
    AttentionMaskInterface.register("test_uniform", eager_mask)
    ids = torch.tensor([CharTokenizer()(text)["input_ids"]])
    model.set_attn_implementation("test_uniform")
    with torch.no_grad():
        logits = model(ids).logits
    model.set_attn_implementation("sdpa")
    return float(F.cross_entropy(logits[0, :-1], ids[0, 1:]))


@pytest.mark.parametrize("literal", [False, True])
def test_is_the_definition_whatever_the_batch(model, literal):
    found = scores(model, TEXTS, batch_size=2, literal=literal)
    for text, got in zip(TEXTS, found):
        if len(text) < 2:
            assert math.isnan(got.score) and got.tokens == len(text)
            continue
        base, ref = eager_loss(model, text, []), eager_loss(model, text, HEADS, literal)
        assert got.base == pytest.approx(base, rel=1e-4) and got.ref == pytest.approx(ref, rel=1e-4)
        assert got.score == pytest.approx((ref - base) / base, abs=1e-3)
    assert max(abs(got.score) for got in found if got.score == got.score) > 1e-3


def test_no_heads_no_influence(model):
    assert [got.score for got in scores(model, TEXTS, heads=[]) if got.tokens > 1] == [0.0, 0.0, 0.0]


def test_documents_are_cut(model):
    [cut] = scores(model, [TEXTS[4]], max_tokens=9)
    [alone] = scores(model, [TEXTS[4][:9]])
    assert cut == alone and cut.tokens == 9


def test_uniform_heads_of_a_one_head_model_average():
    """With its only head masked, a layer mixes by the running mean of what its tokens say."""
    model = tiny_llama(4, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    text = "hello there"
    ids = torch.tensor([CharTokenizer()(text)["input_ids"]])
    block = model.model.layers[0]
    x = model.model.embed_tokens(ids)
    values = block.self_attn.v_proj(block.input_layernorm(x))
    mean = values.cumsum(1) / torch.arange(1, len(text) + 1)[:, None]
    x = x + block.self_attn.o_proj(mean)
    x = x + block.mlp(block.post_attention_layernorm(x))
    logits = model.lm_head(model.model.norm(x))
    wanted = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    got = document_losses(model, [ids[0].tolist()], [(0, 0)])
    assert float(got) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_key_value_prompts_hold_their_answer():
    tokenizer = chat_tokenizer()
    probes = KeyValueProbes(count=3, max_tokens=1600, shots=2, key_len=8, value_tokens=60)
    seen = set()
    for sample in probes.samples(tokenizer):
        assert len(tokenizer(sample.text + " " + sample.needle.answer)["input_ids"]) <= 1600
        assert tokenizer.decode(sample.answer_ids) == json.dumps(sample.needle.answer)[1:-1]
        pairs = json.loads(sample.text[sample.text.index("{") : sample.text.index("}") + 1])
        assert pairs[sample.needle.question] == sample.needle.answer and len(pairs) > 3
        assert sample.text.endswith(f"key: {sample.needle.question}\nanswer:")
        assert sample.text.count("key: ") == 3
        seen.add(sample.text)
    assert len(seen) == 3 and [s.text for s in probes.samples(tokenizer)] == [s.text for s in probes.samples(tokenizer)]
    with pytest.raises(ValueError, match="max_tokens"):
        list(KeyValueProbes(max_tokens=100).samples(tokenizer))


def test_heads_are_the_best_of_the_probes():
    probes = KeyValueProbes(count=1, max_tokens=700, shots=1, key_len=6, value_tokens=40)
    heads, table = influence_heads(tiny_llama(1, vocab_size=SIZE), chat_tokenizer(), probes, top=3)
    assert heads == table.top(3) and table.info["count"] == "set"


def test_selection_is_by_domain():
    values, domains = [1.0, 5.0, 3.0, float("nan"), 9.0, 8.0], ["a", "b", "a", "a", "b", "b"]
    assert select_top(values, domains, 0.5) == [2, 4, 5]
    assert select_top(values, None, 0.2) == [4]
    assert select_top({"x": 1.0, "y": 2.0}, {"x": 0, "y": 1}) == ["x", "y"]


@pytest.fixture
def corpus(tmp_path):
    lines = [
        json.dumps({"text": "the cat sat on the mat", "domain": "cats"}),
        "{not json",
        json.dumps({"words": "no text"}),
        json.dumps({"text": 3}),
        json.dumps(["text"]),
        "",
        json.dumps({"text": "  "}),
        json.dumps({"text": "dogs do not sit on mats"}),
    ]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{}\n")
    (folder / "b.txt").write_text("a whole file\nis one document")
    (folder / "c.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "a packed one"}).encode()))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut off"}' * 50)[:30])
    (folder / "f.txt").write_text("")
    (folder / "notes.md").write_text("not of a kind that is read")
    return folder


def test_what_cannot_be_read_is_counted(corpus):
    report = CorpusReport()
    found = list(corpus_documents([corpus], report=report))
    assert [(d.text[:7], d.domain) for d in found] == [
        ("the cat", "cats"), ("dogs do", "a.jsonl"), ("a whole", "b.txt"), ("a packe", "d.jsonl.gz"),
    ]  # fmt: skip
    assert report.unreadable == {
        "not JSON": 1, "no text in 'text'": 3, "empty text": 1, "not UTF-8": 2, "file cannot be read (EOFError)": 1, "empty file": 1,
    }  # fmt: skip
    assert report.examples["not JSON"][0].endswith("a.jsonl:2") and "not UTF-8" in str(report)
    by_line = list(corpus_documents([corpus / "b.txt"], txt="line"))
    assert [d.text.strip() for d in by_line] == ["a whole file", "is one document"]


def test_a_stopped_run_goes_on(model, corpus, tmp_path):
    tokenizer, out = CharTokenizer(), tmp_path / "scores.jsonl"
    whole = score_files(model, tokenizer, [corpus], HEADS, out)
    assert whole.scored == 4 and whole.resumed == 0 and sum(whole.unreadable.values()) == 9
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    out.write_text("".join(lines[:3]) + lines[3][:20])  # killed while writing
    again = score_files(model, tokenizer, [corpus], HEADS, out)
    assert (again.scored, again.resumed) == (2, 2)
    rows, wanted = [json.loads(x) for x in out.read_text().splitlines()[1:]], [json.loads(x) for x in lines[1:]]
    for row, want in zip(rows, wanted):
        assert row["file"] == want["file"] and row["score"] == pytest.approx(want["score"], abs=1e-6)
    with pytest.raises(ValueError, match="out: got .*heads"):
        score_files(model, tokenizer, [corpus], [(0, 0)], out)
    anew = score_files(model, tokenizer, [corpus], [(0, 0)], out, resume=False)
    assert anew.scored == 4


def test_shards_together_are_the_whole(model, corpus, tmp_path):
    tokenizer = CharTokenizer()
    score_files(model, tokenizer, [corpus], HEADS, tmp_path / "all.jsonl")
    outs = [tmp_path / f"{i}.jsonl" for i in range(3)]
    reports = [score_files(model, tokenizer, [corpus], HEADS, out, shard=(i, 3)) for i, out in enumerate(outs)]
    assert [r.scored for r in reports] == [2, 1, 1] and all(r.scored + r.elsewhere == 4 for r in reports)
    one, several = rank_corpus([tmp_path / "all.jsonl"]), rank_corpus(outs)
    assert [row["file"] for row in one] == [row["file"] for row in several]
    assert [row["score"] for row in several] == pytest.approx([row["score"] for row in one], abs=1e-5)
    assert all(row["keep"] for row in several)  # one document a domain


def test_the_command(model, corpus, tmp_path, monkeypatch):
    import regard
    from regard.cli import app

    monkeypatch.setattr(regard, "load", lambda name: (model, CharTokenizer()))
    out = tmp_path / "out"
    out.mkdir()
    table = tmp_path / "heads.safetensors"
    HeadScores(torch.rand(3, 4)).save(table)
    call = ["lens", "influence", str(corpus), "--out", str(out), "--heads", str(table), "--top", "0.2"]
    got = CliRunner().invoke(app, [*call, "--shard", "0/2"])
    assert got.exit_code == 0, got.output
    assert "2 scored" in got.output and "not ranked yet" in got.output
    got = CliRunner().invoke(app, [*call, "--shard", "1/2"])
    assert "not UTF-8" in got.output and len((out / "ranked.jsonl").read_text().splitlines()) == 4
    got = CliRunner().invoke(app, [*call, "--shard", "2/2"])
    assert isinstance(got.exception, ValueError) and "shard" in str(got.exception)


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="corpus: got .*no such"):
        list(corpus_documents([tmp_path / "no such"]))
    with pytest.raises(ValueError, match="corpus"):
        list(corpus_documents([tmp_path]))
    with pytest.raises(TypeError, match="texts"):
        scores(model, "one text")
    with pytest.raises(ValueError, match="heads"):
        scores(model, ["some text"], heads=[(9, 0)])
    with pytest.raises(ValueError, match="shard"):
        score_files(model, CharTokenizer(), [tmp_path], HEADS, tmp_path / "x.jsonl", shard=(2, 2))
    (tmp_path / "y.jsonl").write_text("something else\n")
    (tmp_path / "z.txt").write_text("some text")
    with pytest.raises(ValueError, match="a file that score_files wrote"):
        score_files(model, CharTokenizer(), [tmp_path / "z.txt"], HEADS, tmp_path / "y.jsonl")
