"""`regard bench ops`: it runs, keeps its figures, and says no to nonsense. What it prints as times is not tested."""

import json

import torch
from typer.testing import CliRunner

from regard.bench.timing import Ratio, interleaved
from regard.cli import app


def test_quick_run_of_a_part(tmp_path):
    path = tmp_path / "ops.json"
    result = CliRunner().invoke(
        app, ["bench", "ops", "--quick", "--only", "dense", "--rounds", "1", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    assert "dense causal SDPA" in result.output and "targets met" in result.output
    data = json.loads(path.read_text())
    assert data["machine"]["torch"] == torch.__version__ and len(data["rows"]) >= 2


def test_bad_options(tmp_path):
    for options, words in (
        (["--only", "dens"], "did you mean dense"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--json", str(tmp_path)], "is a folder"),
    ):
        result = CliRunner().invoke(app, ["bench", "ops", "--quick", *options])
        assert words in str(result.exception), result.output


def test_ratios_are_taken_round_by_round():
    ratio = Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)
    order = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert {"a", "b"} == set(order) and order.count("a") >= 3
