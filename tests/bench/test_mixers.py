"""`regard bench mixers`: equal sizes, a run that goes on where it was, a frontier, a table and a picture."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from regard.bench import mixers
from regard.bench.mixers import ROSTER, Settings, build, frontier, measure, picture
from regard.bench.mixers_command import as_markdown
from regard.cli import app

QUICK = Settings.quick()


@pytest.mark.parametrize("label", ROSTER)
def test_rows_are_of_equal_size(label):
    settings = Settings(num_layers=2)
    base = sum(p.numel() for p in build(ROSTER["softmax"], settings, 256).parameters())
    ours = sum(p.numel() for p in build(ROSTER[label], settings, 256).parameters())
    assert abs(ours - base) <= 0.01 * base


def test_goes_on_where_it_was(tmp_path, monkeypatch):
    path, names = tmp_path / "r.json", ["softmax", "linear", "combiner"]
    trained = []
    original = mixers._train_row

    def counted(row, entry, way, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((entry.mixer[0], way))
        original(row, entry, way, *rest)

    monkeypatch.setattr(mixers, "_train_row", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(names, QUICK, path=path)
    kept = json.loads(path.read_text())
    assert len(kept["results"]["softmax"]["text"]) == 1 and "text" not in kept["results"]["linear"]
    monkeypatch.setattr(mixers, "_train_row", original)
    report = measure(names, QUICK, path=path)
    whole = measure(names, QUICK)
    for name in names:
        for key in ("recall", "text", "state_bytes", "parameters"):
            assert report["results"][name][key] == whole["results"][name][key], (name, key)
    assert not list((tmp_path / "r.json.work").iterdir())
    rows = report["results"]
    assert rows["combiner"]["holds_all"] and not rows["linear"]["holds_all"]
    assert all(0 <= v[0] <= 1 for row in rows.values() for v in row["recall"].values())
    assert all(3 < row["text"][0] < 12 for row in rows.values())
    with pytest.raises(ValueError, match="same settings"):
        measure(names, Settings(), path=path)
    path.write_text("{")
    with pytest.raises(ValueError, match="path"):
        measure(names, QUICK, path=path)


def test_a_row_that_fails_says_so_and_the_others_go_on(monkeypatch):
    original = mixers._train_row

    def broken(row, entry, way, *rest):
        if entry.mixer == ("linear",):
            raise RuntimeError("step 7: the loss is nan")
        original(row, entry, way, *rest)

    monkeypatch.setattr(mixers, "_train_row", broken)
    report = measure(["linear", "softmax"], QUICK)
    assert "the loss is nan" in report["results"]["linear"]["error"] and report["results"]["softmax"]["text"]
    assert as_markdown(report).splitlines()[-1].startswith("| linear |")


def test_frontier_and_picture():
    def row(size, found):
        return {"state_bytes": size, "recall": {"4": [found]}, "holds_all": False}

    rows = {"a": row(100, 0.5), "b": row(100, 0.6), "c": row(200, 0.6), "d": row(300, 0.9), "e": row(50, math.nan)}
    report = {"settings": {"length": 8}, "results": rows}
    assert frontier(report) == ["b", "d"]
    assert picture(report).startswith(b"\x89PNG")


def test_command(tmp_path):
    run = CliRunner().invoke
    listed = run(app, ["bench", "mixers", "--list"])
    assert listed.exit_code == 0 and "linear + window" in listed.output
    out, table = tmp_path / "m.json", tmp_path / "m.md"
    done = run(app, ["bench", "mixers", "softmax", "lightning", "--quick", "--out", str(out), "--markdown", str(table)])
    assert done.exit_code == 0, done.output
    assert set(json.loads(out.read_text())["results"]) == {"softmax", "lightning"}
    assert table.read_text().count("\n| ") == 3 and "bits/byte" in done.output
    with pytest.raises(ValueError, match="did you mean softmax"):
        measure(["softmaxx"], QUICK)
