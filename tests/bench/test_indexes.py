"""The table of indexes: same questions, figures in range, one's own indexes."""

import pytest
import torch

from regard.bench.indexes import BLIND, CELLS, GRAPH, compare_indexes
from regard.ops.index import ExactIP


def test_compare_indexes():
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 2000, 16, generator=g)
    queries = torch.randn(1, 4, 500, 3, generator=g) @ torch.randn(1, 4, 3, 16, generator=g) + 2.0
    rows = {row.label: row for row in compare_indexes(keys, queries[:, :, :-20], queries[:, :, -20:], top=10)}
    assert list(rows) == [GRAPH, BLIND, CELLS]
    for row in rows.values():
        assert 0 <= row.worst <= row.mass <= 1 + 1e-9 and 0 < row.read < 0.2
    assert rows[GRAPH].mass > rows[BLIND].mass
    own = compare_indexes(keys, queries, queries[:, :, :3], top=5, indexes={"all": (ExactIP(), False)})
    assert own[0].mass == pytest.approx(1.0) and own[0].read == 1.0
    with pytest.raises(ValueError, match="top: got 0"):
        compare_indexes(keys, queries, queries, top=0)
