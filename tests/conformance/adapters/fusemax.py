"""FuseMax: the cost model beside the results that the artifact ships."""

import torch

from regard.bench.einsum_cost import AttentionShape, einsum_cost

SCHEDULES = {
    "fusemax": "fusemax",
    "not_pipelined": "fusemax, not pipelined",
    "cascade_on_flat": "cascade on flat",
    "unfused": "unfused",
    "flat": "flat",
}


def run(case):
    found = {}
    for name, schedule in SCHEDULES.items():
        shapes = case.inputs["shapes_short" if name in ("unfused", "flat") else "shapes"]
        costs = [
            einsum_cost(AttentionShape(n, n, d, d, batch, heads), schedule) for batch, heads, d, n in shapes.tolist()
        ]
        columns = {"latency": "latency", "util_2d": "array", "util_1d": "row"}
        if name != "flat":
            columns["traffic"] = "bytes_moved"
        for theirs, ours in columns.items():
            found[f"{name}.{theirs}"] = torch.tensor([getattr(cost, ours) for cost in costs], dtype=torch.float64)
    return found
