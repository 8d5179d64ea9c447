"""`regard bench claims`: every claim runs in its quick form; verdict, table and catalog line follow from the numbers alone."""

import json
import tomllib

import pytest
import torch
from typer.testing import CliRunner

from regard.bench.claims import MODULES, get_claim, language
from regard.bench.claims import c011_hip as hip
from regard.bench.claims import c068_duo_attention as duo
from regard.bench.claims import c080_adl as adl
from regard.bench.claims.claim import Claim, Outcome, Scale, measured_line, number, run, save
from regard.bench.claims.memory import peak_bytes
from regard.bench.claims.timing import slope, times
from regard.bench.claims_command import note, write_table
from regard.bench.text import needle_prompt, token_windows
from regard.cli import app
from regard.integrations.transformers import _USED, attach, session_of
from regard.lens.record import record
from regard.methods.caches import DuoAttention, kv_bytes
from regard.papers import load_catalog
from tiny import CharTokenizer, tiny_llama

KEYS = {
    "paper",
    "claim",
    "setting",
    "verdict",
    "checks",
    "repeats",
    "rows",
    "note",
    "quick",
    "command",
    "date",
    "seconds",
    "machine",
}


@pytest.fixture(scope="module")
def scale():
    return Scale(quick=True, loaded=(tiny_llama(), CharTokenizer()))


@pytest.mark.parametrize("paper", MODULES)
def test_every_claim_runs_in_its_quick_form(paper, scale, tmp_path):
    claim = get_claim(paper)
    assert claim.paper == paper and any(row.id == paper for row in load_catalog())
    record = run(claim, scale, "regard bench claims --quick")
    assert set(record) == KEYS | {"measured"}
    assert record["rows"] and record["checks"]
    for row in record["rows"]:
        assert row["values"] and all(value == value for value in row["values"]), row
        assert row["against"] is None or any(other["label"] == row["against"] for other in record["rows"])
    assert any(row["against"] for row in record["rows"]) or len({row["label"] for row in record["rows"]}) > 1
    assert record["verdict"] in ("holds", "does not hold", "holds in part")
    assert {"device", "threads", "torch", "python"} <= set(record["machine"])
    path = save(record, claim, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == [f"{paper}-{claim.slug}.quick.json"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))


def test_models_are_left_as_they_were(scale):
    model, _ = scale.language_model()
    ids = torch.arange(40)[None]
    assert torch.equal(tiny_llama()(ids).logits, model(ids).logits)
    assert session_of(model) is None and not _USED
    assert not any(module._forward_pre_hooks for module in model.modules())


def outcome(value, other=1.0):
    made = Outcome("a test", "a round")
    made.add("dense", "time", "s", [2.0, 4.0])
    made.add("sparse", "time", "s", [value, 2 * value], against="dense")
    made.check("time, of dense", made.row("sparse", "time").ratio, at_most=0.65, spread=0.1)
    made.check("another", other, at_least=1.0)
    return made


def test_verdict_follows_from_the_checks():
    assert outcome(1.0).verdict == "holds"
    assert outcome(1.9).verdict == "holds in part"
    assert outcome(1.9, 0.5).verdict == "does not hold"
    assert outcome(1.0, float("nan")).verdict == "holds in part"  # what could not be measured does not hold
    with pytest.raises(ValueError, match="checks"):
        _ = Outcome("nothing").verdict


def test_ratios_are_taken_repeat_by_repeat():
    made = Outcome("a test")
    made.add("dense", "time", "s", [2.0, 4.0])
    row = made.add("sparse", "time", "s", [1.0, 3.0], against="dense")
    assert row.ratios == [0.5, 0.75] and row.ratio == 0.625 and row.spread == 0.125 and row.mean == 2.0
    with pytest.raises(ValueError, match="3 values"):
        made.add("other", "time", "s", [1.0, 2.0, 3.0], against="dense")
    with pytest.raises(ValueError, match="label"):
        made.row("nobody", "time")
    with pytest.raises(ValueError, match="exactly one"):
        made.check("both", 1.0, at_most=1.0, at_least=0.0)


def claim_of(made):
    return Claim("068", "a-test", "Sparse is faster.", lambda scale: made)


def test_catalog_line_says_what_came_out(tmp_path):
    record = run(claim_of(outcome(1.9)), Scale(), "regard bench claims 068")
    assert record["measured"] == measured_line(record)
    assert (
        "Sparse is faster. Measured on a test: time, of dense 0.95 ± 0.10 (NOT ≤ 0.65); another 1.00 (≥ 1.00)."
        in record["measured"]
    )
    assert "1 of 2 checks hold at this scale." in record["measured"] and record["date"] in record["measured"]
    record = run(claim_of(outcome(1.0)), Scale(), "regard bench claims 068")
    assert "The claim holds at this scale." in measured_line(record)
    path = save(record, claim_of(None), tmp_path)
    fields = tomllib.loads(note(path, record))
    assert fields == {
        "id": "068",
        "measured": record["measured"],
        "results": ["results/068-a-test.json"],
        "command": "regard bench claims 068",
    }


def test_busy_machines_are_named():
    record = run(claim_of(outcome(1.0)), Scale(), "regard bench claims 068")
    record["machine"] |= {"load average before": "0.3", "cores": "2"}
    assert "times are rough" not in measured_line(record)
    record["machine"]["load average before"] = "9.5"
    assert measured_line(record).endswith("; others at work, load 9.5 on 2 cores: times are rough)")


def test_number():
    assert [number(x) for x in (0.5, 0.0, 0.00123, -3.456, 12.0)] == ["0.50", "0.00", "0.0012", "-3.46", "12.00"]


def test_times_and_slope():
    calls = []
    found = times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, inner=2, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 4
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert slope([10, 100, 1000], [3.0, 300.0, 30000.0]) == pytest.approx(2.0, abs=1e-4)


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.randn(250_000)  # 1 MB
    assert peak_bytes(lambda: x + 1) == pytest.approx(1e6, rel=0.01)
    assert peak_bytes(lambda: (x + 1) + (x + 2)) == pytest.approx(3e6, rel=0.01)
    assert peak_bytes(lambda: [x + i for i in range(3)]) == pytest.approx(3e6, rel=0.01)


# What the measurements rest on


def test_one_forward_and_decoding_give_the_same_log_probability(scale):
    model, tokenizer = scale.language_model()
    prompt, answer = needle_prompt(tokenizer, 160, 0.5)
    cache = language.filled_cache(model, prompt[:-1])
    length = cache.get_seq_length()
    decoded = language.decoded_log_prob(model, cache, prompt[-1], answer)
    assert decoded == pytest.approx(language.answer_log_prob(model, prompt, answer), abs=1e-4)
    assert cache.get_seq_length() == length  # decoding works on a copy
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    want = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
    assert decoded == pytest.approx(want, abs=1e-4)


def test_caches_filled_from_a_dense_one_decode_alike(scale):
    """068: a full ragged cache gives the dense numbers, half of it streaming is half of the storage, and neither touches the model."""
    model, tokenizer = scale.language_model()
    ids = token_windows(tokenizer, 300, 1)[0]
    dense = language.filled_cache(model, ids[:-1])
    sizes = []
    for share in (1.0, 0.5):
        method = DuoAttention(share, duo._every_other(model.config, share), 4, 16)
        twin = duo._twin(model)
        assert all(mine is its for mine, its in zip(model.parameters(), twin.parameters()))
        with attach(twin, method) as session, torch.no_grad():
            cache = session.new_cache()
            duo._fill(twin, method, cache, dense)
            sizes.append(kv_bytes(cache))
            assert sum(int(layer.streaming.sum()) for layer in cache.layers) == round((1 - share) * 6)
            logits = twin(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True).logits
        if share == 1.0:
            torch.testing.assert_close(logits[0, -1], model(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-5)
    assert sizes[1] < 0.6 * sizes[0]


def test_attention_mass_is_a_share_and_the_best_keys_read_most(scale):
    model, tokenizer = scale.language_model()
    seen = record(model, torch.tensor([token_windows(tokenizer, 256, 1)[0]]), layers=[1])
    found = hip._masses(seen, 1, 64, 16)
    assert len(found) == 4
    for share, rest in found.values():
        assert 0 < share <= found["best keys"][0] <= 1 and 0 < rest <= 1 + 1e-6


def test_drawn_shapes_differ_by_class():
    images, kinds = adl.shapes(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 1, 32, 32) and set(kinds.tolist()) == {0, 1, 2, 3}
    bright = (images > 0.5).float().mean((1, 2, 3))
    ring, disc = bright[kinds == 1].mean(), bright[kinds == 0].mean()
    assert ring < disc


def test_row_cosine():
    alike = torch.full((1, 2, 4, 4), 0.25)
    assert adl.row_cosine([alike]) == pytest.approx(1.0)
    assert adl.row_cosine([torch.eye(4).expand(1, 2, 4, 4)]) == pytest.approx(0.0)


# The command


def cli(*words):
    return CliRunner().invoke(app, ["bench", "claims", *map(str, words)])


def test_list_and_names():
    result = cli("--list", "DuoAttention", "16")
    assert result.exit_code == 0 and "068" in result.output and "016" in result.output and "124" not in result.output
    assert isinstance(cli("001").exception, ValueError) and "measured claim" in str(cli("001").exception)
    assert "unknown name" in str(cli("nonsense-attention").exception)


def test_command_writes_figures_table_and_notes(tmp_path, monkeypatch):
    monkeypatch.setattr("regard.bench.claims.c115_agent_attention.measure", lambda scale: outcome(1.0))
    result = cli("115", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["115-agent-attention.json", "README.md"]
    assert "holds" in result.output
    text = (tmp_path / "README.md").read_text()
    assert "[115](115-agent-attention.json)" in text and "**holds**" in text and "`regard bench claims 115`" in text
    assert write_table(tmp_path).read_text() == text
    notes = cli("--notes", "--out", tmp_path).output
    assert tomllib.loads(notes)["id"] == "115"
    cli("--notes-to", tmp_path / "n", "--out", tmp_path)
    assert tomllib.loads((tmp_path / "n" / "115.measured.toml").read_text()) == tomllib.loads(notes)


def test_quick_runs_leave_kept_figures_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("regard.bench.claims.c115_agent_attention.measure", lambda scale: outcome(1.0))
    assert cli("115", "--quick", "--out", tmp_path).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["115-agent-attention.quick.json"]
    assert not cli("--notes", "--out", tmp_path).output.strip()


def test_a_claim_that_cannot_be_measured_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(scale):
        raise ValueError("heads: got 3, need 4")

    monkeypatch.setattr("regard.bench.claims.c115_agent_attention.measure", broken)
    monkeypatch.setattr("regard.bench.claims.c129_ela.measure", lambda scale: outcome(1.0))
    result = cli("115", "129", "--out", tmp_path)
    assert result.exit_code == 1 and "heads: got 3, need 4" in result.output and "not measured: 115" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["129-ela.json", "README.md"]


def test_bad_places(tmp_path):
    (tmp_path / "file").write_text("")
    assert isinstance(cli("115", "--out", tmp_path / "file").exception, OSError)
    (tmp_path / "115-agent-attention.json").write_text('{"verdict": ')
    assert "115-agent-attention.json" in str(cli("--table", "--out", tmp_path).exception)
