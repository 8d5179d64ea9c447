"""The cost of cascades on a spatial array. Its numbers are pinned by the conformance vector 079-fusemax-model."""

import pytest
import torch

from regard.bench.einsum_cost import SCHEDULES, AttentionShape, SpatialArray, einsum_cost, operation_counts
from regard.ops import CASCADES, attention_cascade


@pytest.mark.parametrize("name", sorted(CASCADES))
@pytest.mark.parametrize("m", [7, 16, 23])
def test_counted_operations_are_those_that_run(name, m):
    q, k, v = (torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((5, 4), (m, 4), (m, 6)))
    trace = attention_cascade(q, k, v, cascade=name, tile=8, return_trace=True)[1]
    expected = operation_counts(CASCADES[name], AttentionShape(5, m, 4, 6, batch=2, heads=3), tile=8)
    assert trace.operations == expected


def test_one_pass_moves_the_same_for_every_key_and_three_do_not():
    def moved(schedule, length):
        traffic = einsum_cost(AttentionShape(1024, length), schedule).traffic
        return sum(traffic.get(name, 0.0) for name in ("K", "V", "QK")) / length

    lengths = [2**power for power in range(14, 25, 2)]
    one, three = ([moved(schedule, length) for length in lengths] for schedule in ("fusemax", "flat"))
    assert set(one) == {2 * 64 * 2} and three[-1] / three[0] > 5
    shape = AttentionShape(4096, 4096)
    cost = einsum_cost(shape)
    assert cost.bytes_moved == 4 * 4096 * 64 * 2 and cost.passes == 1 and set(cost.traffic) == {"Q", "K", "V", "AV"}
    latencies = {schedule: einsum_cost(shape, schedule).latency for schedule in SCHEDULES}
    assert min(latencies, key=latencies.get) == "fusemax" and latencies["flat"] / latencies["fusemax"] > 6


def test_arrays_and_units():
    shape = AttentionShape(1024, 1024, batch=4, heads=2)
    small, large = (einsum_cost(shape, hardware=SpatialArray(side=side)) for side in (128, 256))
    assert small.seconds["QK"] == pytest.approx(4 * large.seconds["QK"])
    assert small.seconds["RM"] == pytest.approx(4 * large.seconds["RM"])  # half the elements, twice the tiles
    assert einsum_cost(shape, exp_unit=True).seconds["SLN"] == pytest.approx(large.seconds["SLN"] * 2 / 7)
    slow = einsum_cost(shape, hardware=SpatialArray(bandwidth=1e6))
    assert slow.latency == slow.memory > slow.compute and slow.array < 0.1
    assert large.latency == large.compute and 0 < large.array <= 1 and 0 < large.row <= 1 + 1e-9


def test_bad_input():
    with pytest.raises(ValueError, match="schedule: unknown name 'fusemx'; did you mean fusemax"):
        einsum_cost(AttentionShape(4, 4), "fusemx")
    with pytest.raises(ValueError, match="cascade: got '3-pass', need Einsums LM, SLN, SLD, SLNV"):
        einsum_cost(AttentionShape(4, 4), cascade=CASCADES["3-pass"])
    with pytest.raises(ValueError, match="m: got 0"):
        AttentionShape(4, 0)
    with pytest.raises(ValueError, match="bandwidth: got 0"):
        SpatialArray(bandwidth=0)
    with pytest.raises(ValueError, match="hardware: got 'buffer of 1024 bytes', need room"):
        einsum_cost(AttentionShape(512, 512), hardware=SpatialArray(buffer=1024))
