"""`regard bench ops`: what is timed, how ratios are taken, what the command prints and writes. No test asserts a time."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from regard import masks
from regard.bench import ops, timing
from regard.bench.ops import Row, Setting
from regard.bench.timing import Ratio
from regard.cli import app

TINY = Setting(seq_len=256, num_heads=2, head_dim=8, window=32, density=0.25, rounds=2, flex=False)


def test_short_runs_are_called_for_as_long_as_long_ones():
    calls = {"long": 0, "short": 0}

    def run(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    said = []
    found = timing.interleaved(
        {"long": lambda: run("long", 0.04), ("short", "fwd"): lambda: run("short", 0.01)},
        2,
        calls=3,
        progress=said.append,
    )
    assert calls == {"long": 3, "short": 1 + 2 * 3}
    assert [len(values) for values in found.values()] == [2, 2] and min(found["long"]) >= 0.04
    assert said[0] == "warm-up: long" and said[-1] == "round 2 of 2: short fwd"
    with pytest.raises(ValueError, match="rounds: got 0"):
        timing.interleaved({}, 0)


def test_ratios_are_taken_round_by_round():
    ratio = Ratio.of([2.0, 6.0, 12.0], [1.0, 2.0, 3.0], 0.5)
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 1.0, 2.0) and ratio.spread == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        Ratio.of([1.0], [])


def test_peak_bytes_counts_what_lives_at_once():
    def run():
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first
        return second

    peak, kept = timing.peak_bytes(run)
    assert 16000 <= peak < 17000 and 12000 <= kept < 13000


def test_a_row_holds_only_when_all_its_targets_are_met():
    good, bad = Ratio(0.9, 0.8, 1.0), Ratio(0.5, 0.4, 0.6)
    assert Row("a", "forward", 1.0).holds is None
    assert Row("a", "forward", 1.0, share=good, target=0.85).holds is True
    assert Row("a", "forward", 1.0, share=bad, target=0.85).holds is False
    both = Row("a", "forward", 1.0, share=good, target=0.85, peers={"x": bad, "y": "not there"}, peer_target=1.1)
    assert both.holds is False
    assert Row("a", "forward", 1.0, ratio=Ratio(16.0, 15.0, 17.0), target_ratio=15.0).holds is True


def test_ideals_are_ratios_of_pairs():
    full = masks.causal.materialize(256, 256)
    window = (masks.sliding_window(32) & masks.causal).materialize(256, 256)
    rows = {row.what: row for row in ops.measure(TINY, "window") if row.pass_ == "forward"}
    assert rows["sliding window 32"].ideal == pytest.approx(float(full.sum() / window.sum()))
    assert rows["sliding window 32"].peers == {"FlexAttention": "not asked for"}
    sparse = ops.measure(TINY, "block-sparse")
    assert {row.ideal for row in sparse if row.ideal} == {4.0}
    prefill = ops.measure(TINY, "prefill")[-1]
    assert prefill.ideal == pytest.approx(16 * 256 / float(full[..., -16:, :].sum()))
    for row in [*rows.values(), *sparse]:
        if row.share is not None:
            assert row.share.median == pytest.approx(row.ratio.median / row.ideal)


def test_causal_selection_takes_its_share_of_the_past():
    selection = ops._random_blocks(Setting(seq_len=4096, density=0.1, num_heads=2), causal=True)
    counts = selection.counts[0, 0]
    assert counts.tolist() == [max(1, round(0.1 * (i + 1))) for i in range(64)]
    assert (selection.indices[0, 0].amax(-1) <= torch.arange(64)).all()


def test_the_command(tmp_path):
    path = tmp_path / "ops.json"
    done = CliRunner().invoke(
        app,
        ["bench", "ops", "--quick", "--only", "dense", "--rounds", "1", "--json", str(path)],
        env={"COLUMNS": "160"},
    )
    assert done.exit_code == 0, done.output
    assert "dense causal, attention()" in done.output and "targets met" in done.output
    kept = json.loads(path.read_text())
    assert kept["setting"]["seq_len"] == 1024 and kept["machine"]["threads"] and len(kept["rows"]) == 4
    row = kept["rows"][-1]
    assert row["ideal"] == 1.0 and row["backend"] == "sdpa" and isinstance(row["holds"], bool)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "windows"], "only: unknown name 'windows'; did you mean window"),
        (["--device", "tpu9"], "device: got 'tpu9', need cpu or cuda"),
        (["--json", "/proc/none/x.json"], "/proc/none/x.json: cannot be written"),
    ],
)
def test_bad_options(words, message):
    done = CliRunner().invoke(app, ["bench", "ops", "--quick", *words])
    assert done.exit_code != 0 and message in str(done.exception)


def test_selectors_count_the_pairs_they_read():
    from regard.bench.ops_selectors import pairs_read
    from regard.ops.select import Choice, block_topk

    q, k = torch.randn(1, 4, 96, 8), torch.randn(1, 2, 160, 8)  # the last 96 of 160 rows
    everything = Choice(block_topk(q, k, block_q=32, block_k=16, topk=99))
    assert pairs_read(everything, q, k) == pytest.approx(1, abs=1e-6)
    some = block_topk(q, k, block_q=32, block_k=32, topk=2, recent=1)
    seen = (some.materialize() & masks.causal.materialize(96, 160)).double().mean()
    whole = masks.causal.materialize(96, 160).double().mean()
    assert pairs_read(Choice(some), q, k) == pytest.approx(float(seen / whole), rel=0.01)
