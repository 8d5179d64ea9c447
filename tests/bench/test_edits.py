"""The cost of edits: the command runs on a small model and judges what it should."""

import json

from tests.tiny import CharTokenizer, tiny_llama

from regard.bench import edits
from regard.bench.timing import Ratio


def test_measures_every_edit_beside_the_plain_model():
    said = []
    rows = edits.measure(tiny_llama(), CharTokenizer(), 64, 1, said.append)
    assert rows[0].what == edits.PLAIN and rows[0].ratio.median == 1 and rows[0].holds is None
    assert {row.stage for row in rows} == {"", "scores", "head outputs", "weights"}
    assert all(row.seconds > 0 and row.extra_bytes > 0 for row in rows) and said
    assert json.loads(json.dumps([row.as_dict() for row in rows]))[0]["holds"] is None


def test_weights_are_not_judged_by_time():
    cheap, dear = Ratio(1.1, 1.0, 1.2), Ratio(1.3, 1.2, 1.4)
    assert edits.Row("a", "scores", 1.0, cheap, 0).holds and not edits.Row("a", "head outputs", 1.0, dear, 0).holds
    assert edits.Row("a", "weights", 1.0, dear, 0).holds is None
