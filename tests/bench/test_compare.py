"""`regard compare`: what it measures, what it keeps when stopped, and what it says when asked for nonsense."""

import json

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.bench import compare as module
from regard.bench.compare import Comparison, Settings, compare
from regard.bench.report import front, page, png, table
from regard.bench.roster import canonical, parse_method, split_methods
from regard.bench.tasks import divergence, read
from regard.bench.text import needle_prompt, token_windows
from regard.methods.call import UnsupportedModelError
from tiny import CharTokenizer, tiny_llama

SETTINGS = Settings("tiny", context=160, decode=6, repeats=2, depths=(0.2, 0.8))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def roster():
    return [
        parse_method(text, budget=0.25, context=160)
        for text in ("sliding-window", "duo-attention(budget=1.0,sink=2,recent=4)", "streaming-llm")
    ]


@pytest.fixture(scope="module")
def result(model, roster):
    return compare(model, CharTokenizer(), roster, SETTINGS)


def test_reading_is_teacher_forcing(model):
    ids = token_windows(CharTokenizer(), 90, 1)[0]
    reading = read(model, ids[:80], ids[80:])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = logits[79:89]
    torch.testing.assert_close(reading.log_probs, want, rtol=1e-5, atol=1e-5)
    picked = want.gather(1, torch.tensor(ids[80:])[:, None])
    assert abs(reading.decode_nll + float(picked.mean())) < 1e-5
    second_half = logits[39:79].gather(1, torch.tensor(ids[40:80])[:, None])
    assert abs(reading.prompt_nll + float(second_half.mean())) < 1e-5
    cached = 89 * 2 * 2 * 8 * 4 * 3  # tokens x (k, v) x kv heads x head_dim x float32 x layers
    assert reading.kv_bytes == cached


def test_divergence():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert divergence(p, p) == 0 and abs(divergence(p, q) - 0.5108) < 1e-3


def test_needle_stands_where_it_should():
    prompt, answer = needle_prompt(CharTokenizer(), 400, 0.25)
    text = CharTokenizer().decode(prompt)
    assert len(prompt) == 400 and text.endswith("famous cake is") and CharTokenizer().decode(answer) == " cardamom"
    assert abs(text.index("The secret") - 0.25 * (400 - 74 - 53)) < 15
    with pytest.raises(ValueError, match="context: got 60"):
        needle_prompt(CharTokenizer(), 60, 0.5)


def test_what_comes_out(result):
    assert result.finished and result.labels[0] == "dense" and not result.skipped
    assert result.mean("dense", "kl") == 0.0
    assert result.mean("sliding-window", "kl") > 0
    ratio, spread = result.ratio("streaming-llm", "kv_bytes")
    assert ratio < 0.5 and spread < 0.01
    full = "duo-attention(budget=1.0, sink=2, recent=4)"
    assert result.mean(full, "kl") < 1e-9  # everything kept is dense
    assert result.values(full, "decode_ppl") == pytest.approx(result.values("dense", "decode_ppl"), rel=1e-4)
    assert result.mean("dense", "needle") == pytest.approx(
        (result.mean("dense", "needle@0.2") + result.mean("dense", "needle@0.8")) / 2
    )


def test_reports(result):
    from rich.console import Console

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(result))
    text = console.export_text()
    assert text.index("dense") < text.index("sliding-window") and "×" in text
    assert png(result)[:8] == b"\x89PNG\r\n\x1a\n"
    html = page(result, "regard compare")
    assert "data:image/png;base64," in html and "streaming-llm" in html
    assert "http://" not in html and "https://" not in html and "<script" not in html


def test_front():
    points = [(1.0, 0.0), (0.5, 0.3), (0.5, 0.2), (0.7, 0.5), (0.2, 0.9)]
    assert front(points) == [4, 2, 0]


def test_stopped_runs_keep_what_was_measured_and_go_on(model, roster, tmp_path, monkeypatch):
    path, calls = tmp_path / "c.json", []
    measure = module._measure

    def stop_after_four(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(args)
        return measure(*args)

    monkeypatch.setattr(module, "_measure", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        compare(model, CharTokenizer(), roster, SETTINGS, path=path)
    kept = Comparison.load(path)
    assert len(kept.units) == 4 and not kept.finished
    again = []
    monkeypatch.setattr(module, "_measure", lambda *args: again.append(args[4:]) or measure(*args))
    done = compare(model, CharTokenizer(), roster, SETTINGS, path=path, resume=True)
    assert done.finished and len(done.units) == 4 * 2 * 2
    assert len(again) == 16 - 4 + 1  # dense is read once more for its distribution
    assert {key: done.units[key] for key in kept.units} == kept.units
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    assert json.loads(path.read_text())["table"]["dense"]["kv_bytes"]["ratio"] == 1.0


def test_resume_refuses_other_settings_and_other_files(model, roster, tmp_path):
    path = tmp_path / "c.json"
    Comparison({**json.loads(json.dumps(vars(SETTINGS))), "context": 99}, {}, ["dense"]).save(path)
    with pytest.raises(ValueError, match="context=99, this run has 160"):
        compare(model, CharTokenizer(), roster, SETTINGS, path=path, resume=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a comparison"):
        compare(model, CharTokenizer(), roster, SETTINGS, path=path, resume=True)


def test_methods_that_cannot_serve_say_why_and_the_rest_goes_on(model):
    class Picky(regard.Method):
        def check(self, model):
            raise UnsupportedModelError("Picky: needs a model with 17 heads")

    few = Settings("tiny", context=80, decode=3, repeats=1, tasks=("ppl", "agreement"))
    result = compare(model, CharTokenizer(), [("picky", Picky()), ("streaming-llm", regard.StreamingLLM(2, 10))], few)
    assert "17 heads" in result.skipped["picky"] and result.mean("streaming-llm", "kl") > 0
    assert "17 heads" in page(result)


def test_names():
    assert canonical("DuoAttention") == canonical("duo_attention") == "duo-attention"
    with pytest.raises(ValueError, match="unknown name 'duoatention'; did you mean duo-attention"):
        canonical("duoatention")
    assert split_methods("a,b(c=1,d=(2,3)), e") == ["a", "b(c=1,d=(2,3))", "e"]
    with pytest.raises(ValueError, match="closing"):
        split_methods("a(b=1")
    label, method = parse_method("streaming-llm(sink=2)", budget=50, context=200)
    assert (label, method.sink, method.window) == ("streaming-llm(sink=2)", 2, 46)
    with pytest.raises(ValueError, match="unknown name 'sinks'; did you mean sink"):
        parse_method("streaming-llm(sinks=2)", budget=0.5, context=200)
    with pytest.raises(ValueError, match="plain values"):
        parse_method("streaming-llm(sink=print())", budget=0.5, context=200)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"context": 10}, "context: got 10"),
        ({"tasks": ("pppl",)}, "task: unknown name 'pppl'; did you mean ppl"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"budget": 0}, "budget: got 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Settings("tiny", **options)


def test_context_beyond_the_model(model, roster):
    with pytest.raises(ValueError, match="1024, the model's positions"):
        compare(model, CharTokenizer(), roster, Settings("tiny", context=1020, decode=32))


def test_command_line(monkeypatch, tmp_path, model):
    from regard.cli import app

    monkeypatch.setattr(regard, "load", lambda name: (model, CharTokenizer()))
    files = [tmp_path / name for name in ("c.json", "c.html", "c.png")]
    options = [
        "--context",
        "96",
        "--decode",
        "3",
        "--repeats",
        "1",
        "--task",
        "ppl,agreement",
        "--methods",
        "streaming-llm",
    ]
    paths = [part for flag, path in zip(("--json", "--html", "--png"), files) for part in (flag, str(path))]
    result = CliRunner().invoke(app, ["compare", *options, *paths])
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_size > 500 for path in files) and str(files[2]) in result.output.replace("\n", "")
    bad = CliRunner().invoke(app, ["compare", *options[:-1], "streeming"])
    assert "did you mean streaming-llm" in str(bad.exception)
    bad = CliRunner().invoke(app, ["compare", "--json", str(tmp_path)])
    assert isinstance(bad.exception, OSError)
