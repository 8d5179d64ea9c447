"""The recall testbed: its sequences can be known, and its training goes on where it stopped."""

import pytest
import torch

from regard.testbeds import recall, train_recall

SHORT = (((12,), 4, 3, 1e-3), ((12, 24), 2, 3, 1e-3))


def test_every_answer_follows_from_what_stands_before():
    generator = torch.Generator().manual_seed(0)
    for seq_len, pairs, queries in ((64, 8, 5), (200, 60, 30), (8, 1, 2)):
        sample = recall.recall_sample(seq_len, pairs, queries, generator)
        ids, body = sample.ids.tolist(), seq_len - 1 - 2 * queries
        assert len(ids) == seq_len and ids[0] == recall.BOS and ids[body] == recall.ASK
        assert sample.answers.nonzero().flatten().tolist() == list(range(body + 2, seq_len, 2))
        for place in sample.answers.nonzero().flatten().tolist():
            key = ids[place - 1]
            assert ids[:body].count(key) == 1 and ids[ids.index(key) + 1] == ids[place]
    sample = recall.copy_sample(50, 10, generator)
    ids = sample.ids.tolist()
    assert ids[-10:] == ids[-21:-11] and ids[-11] == recall.COPY and len(set(ids[-10:])) == 10
    assert sample.answers.sum() == 9


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: recall.recall_sample(20, 8, 2), "seq_len: got 20, need at least 22"),
        (lambda: recall.recall_sample(2000, 300, 2), "pairs: got 300, need at most 256"),
        (lambda: recall.copy_sample(20, 10), r"length: got 10, need words in \[2, 9\]"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_training_goes_on_where_it_stopped(tmp_path):
    said = []
    whole = train_recall.train(tmp_path / "whole", stages=SHORT, say=said.append)
    train_recall.train(tmp_path / "parts", stages=SHORT[:1], say=said.append)
    before = len(said)
    parts = train_recall.train(tmp_path / "parts", stages=SHORT, say=said.append)
    assert sum("step" in line for line in said[before:]) == 1  # the first stage is not trained again
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
