"""A plan over torch.distributed with gloo: outputs and gradients of every rank are those of dense attention, also two plans at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regard
from regard.scale import plan_tasks
from regard.scale.distributed import Route


@pytest.mark.parametrize("ranks", [3])
def test_ranks_together_are_dense_attention(tmp_path, ranks):
    source = str(Path(regard.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(Path(__file__).with_name("gloo_ranks.py")), str(ranks), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_routes_fit_together():
    """What one rank sends is what the other expects, and every row of a task's prefix arrives once, in order."""
    plan = plan_tasks([64, 7, 30, 1, 12, 40], 4, tolerance=0.0, num_heads=4, num_kv_heads=2, head_dim=8)
    routes = [Route.of(plan, rank) for rank in range(4)]
    for a in range(4):
        for b in range(4):
            assert routes[a].q_send_counts[b] == routes[b].q_receive_counts[a]
            assert routes[a].kv_send_counts[b] == routes[b].kv_receive_counts[a]
    row, kv_row = 4 * 8, 2 * 2 * 8
    travels = torch.zeros(4, 4, dtype=torch.long)
    for a in range(4):
        for b in range(4):
            if a != b:
                travels[a, b] += routes[a].q_send_counts[b] * row + routes[a].kv_send_counts[b] * kv_row
                travels[b, a] += routes[a].q_send_counts[b] * row
    assert torch.equal(travels, plan.traffic)
    for rank, route in enumerate(routes):
        sent = [plan.tokens[a][r.kv_send] for a, r in enumerate(routes)]
        arrived = torch.cat([x.split(r.kv_send_counts)[rank] for x, r in zip(sent, routes)])
        for doc, index in route.kv_rows.items():
            assert torch.equal(arrived[index], torch.arange(len(index)) + plan.starts[doc])
