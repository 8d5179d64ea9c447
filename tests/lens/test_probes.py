"""Probes on weights that are known."""

import math

import pytest
import torch

import regard
from regard.lens import probes
from tiny import tiny_llama


class FakeRecord:
    """Weights given by hand, in the form of a record of one layer."""

    def __init__(self, weights, tokens=None):
        self.layers, self._weights, self.tokens = [0], weights, tokens

    def q(self, layer):
        return self._weights

    def weights(self, layer, rows):
        return self._weights[:, :, rows]


def causal_rows(pattern):
    return torch.tensor(pattern, dtype=torch.float32)[None, None]


def test_uniform_attention():
    n = 600  # more rows than are treated at a time
    uniform = torch.ones(1, 2, n, n).tril()
    record = FakeRecord(uniform / uniform.sum(-1, keepdim=True))
    assert torch.allclose(probes.attention_entropy(record).scores, torch.ones(1, 2), atol=1e-5)
    harmonic = sum(1 / (i + 1) for i in range(1, n)) / (n - 1)
    assert abs(probes.sink_mass(record)[0, 0] - harmonic) < 1e-5
    local = sum(8 / (i + 1) for i in range(8, n)) / (n - 8)
    assert abs(probes.locality(record)[0, 1] - local) < 1e-5


def test_one_key_each():
    previous = FakeRecord(causal_rows([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    assert probes.previous_token(previous)[0, 0] == 1.0
    assert probes.attention_entropy(previous)[0, 0] == 0.0
    assert abs(probes.sink_mass(previous, sink=1)[0, 0] - 1 / 3) < 1e-6


def test_induction():
    tokens = torch.tensor([[5, 6, 7, 5, 6]])
    rows = torch.zeros(5, 5)
    rows[:3, 0] = 1
    rows[3, 1] = 0.75  # the token after the first 5
    rows[3, 0] = 0.25
    rows[4, 2] = 0.5  # the token after the first 6
    rows[4, 0] = 0.5
    assert probes.induction(FakeRecord(rows[None, None], tokens))[0, 0] == 0.625
    assert math.isnan(probes.induction(FakeRecord(rows[None, None], torch.arange(5)[None]))[0, 0])


def test_profile_of_a_model():
    model = tiny_llama()
    record = regard.record(model, torch.randint(1, 128, (2, 40)))
    tables = probes.profile(record)
    for name, one in (
        ("entropy", probes.attention_entropy),
        ("induction", probes.induction),
        ("locality", probes.locality),
    ):
        assert torch.equal(tables[name].scores.isnan(), one(record).scores.isnan())
        assert torch.allclose(tables[name].scores.nan_to_num(), one(record).scores.nan_to_num())
    assert all(((table.scores >= 0) & (table.scores <= 1)).all() for table in tables.values())


def test_bad_values():
    record = FakeRecord(torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match="sink: got 0"):
        probes.sink_mass(record, sink=0)
    with pytest.raises(ValueError, match="need a record of a language model"):
        probes.induction(record)
