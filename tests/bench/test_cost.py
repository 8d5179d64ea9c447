"""The cost model: limit cases, methods, devices, and the command that holds it against the clock."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.bench.cost import (
    DEVICES,
    MODELS,
    Cost,
    Device,
    ModelShape,
    attention_prefill_cost,
    decode_cost,
    prefill_cost,
)
from regard.bench.cost_methods import DENSE, density_reach, reaches, window_reach
from regard.bench.roster import ROSTER, parse_method
from regard.cli import app
from regard.methods import Method
from regard.methods.plans import Full, Window
from tiny import tiny_llama

SHAPE = ModelShape(4, 8, 2, 16, 1000.0)


def test_dense_costs_are_the_formulas():
    n, batch = 100, 3
    pairs = batch * n * (n + 1) / 2
    one = attention_prefill_cost(SHAPE, DENSE, n, batch=batch)
    assert one.attention_flops == 4 * pairs * 8 * 16 and one.exponentials == pairs * 8
    assert one.held_bytes == batch * n * 2 * 2 * 16 * 2
    full = attention_prefill_cost(SHAPE, DENSE, n, causal=False)
    assert full.attention_flops == 4 * n * n * 8 * 16
    whole = prefill_cost(SHAPE, None, n, batch=batch)
    assert whole.attention_flops == 4 * one.attention_flops and whole.linear_flops == 2 * 1000 * n * batch
    step = decode_cost(SHAPE, None, n, tokens=2, batch=batch)
    assert step.kv_bytes == batch * 4 * (101 + 102) * 2 * 2 * 16 * 2
    assert step.weight_bytes == 2 * 2 * 1000 and step.linear_flops == 2 * 2 * 1000 * batch
    assert step.held_bytes == batch * 102 * SHAPE.kv_bytes_per_token


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_budgets_of_the_whole_context_cost_what_dense_costs(phase):
    price = prefill_cost if phase == "prefill" else decode_cost
    dense = price(SHAPE, None, 256)
    for method in (
        regard.SlidingWindow(300),
        regard.StreamingLLM(window=300),
        regard.HiP(budget=300, dense_layers=0),
        regard.DHSA(budget=1.0),
        regard.GroupedTopK(budget=300),
        regard.S2Attention(local_blocks=8),
        regard.DuoAttention(budget=1.0),
        regard.Dense(),
    ):
        cost = price(SHAPE, method, 256)
        assert math.isclose(cost.attention_flops, dense.attention_flops), method
        assert math.isclose(cost.held_bytes, dense.held_bytes), method


def test_a_window_is_counted_exactly():
    n, w = 200, 30
    wanted = sum(min(t, w) for t in range(1, n + 1))
    found = attention_prefill_cost(SHAPE, window_reach(w), n).attention_flops / (4 * 8 * 16)
    assert found == wanted
    assert decode_cost(SHAPE, regard.StreamingLLM(window=26, sink=4), n).held_bytes == 30 * SHAPE.kv_bytes_per_token
    assert decode_cost(SHAPE, regard.SlidingWindow(30), n).held_bytes == 201 * SHAPE.kv_bytes_per_token


def test_masks_are_asked():
    """A mask of unknown kind: keys counted as the mask itself keeps them, at the rows in between interpolated."""
    method = regard.S2Attention(block_size=8, local_blocks=2, stride=2)
    _, reach = reaches(method, SHAPE, 64, "prefill")[0]
    from regard import masks

    pattern = masks.head_sharded(2, 8, 2, 2, group=4).materialize(64, 64, num_heads=8)[0]
    counts = (pattern & torch.ones(64, 64).tril().bool()).sum(-1).double().mean(0)
    assert np.allclose(reach.read(np.arange(1.0, 65.0)), counts)


def test_dense_layers_are_dense():
    all_sparse = decode_cost(SHAPE, regard.GroupedTopK(budget=100, dense_layers=0), 1000)
    half = decode_cost(SHAPE, regard.GroupedTopK(budget=100, dense_layers=2), 1000)
    dense = decode_cost(SHAPE, None, 1000)
    assert math.isclose(half.kv_bytes, (all_sparse.kv_bytes + dense.kv_bytes) / 2)
    assert 0 < half.search_bytes < all_sparse.search_bytes
    window = decode_cost(SHAPE, regard.SlidingWindow(100, layers=[0, -1]), 1000)
    assert math.isclose(window.kv_bytes, (dense.kv_bytes + dense.kv_bytes * 100 / 1001) / 2)


def test_retrieval_heads_share():
    cost = decode_cost(SHAPE, regard.DuoAttention(budget=0.25, sink=4, recent=16), 999)
    assert math.isclose(cost.held_bytes, SHAPE.kv_bytes_per_token * (0.25 * 1000 + 0.75 * 20))


@pytest.mark.parametrize("name", ROSTER)
def test_every_method_of_the_roster_has_a_cost_or_says_that_it_has_none(name):
    _, method = parse_method(name, budget=0.25, context=2048)
    dense = decode_cost(SHAPE, None, 2048)
    try:
        cost = decode_cost(SHAPE, method, 2048)
    except ValueError as error:
        assert f"the cost of {type(method).__name__} is not known" in str(error)
        return
    assert 0 < cost.kv_bytes <= dense.kv_bytes and 0 < cost.held_bytes <= dense.held_bytes * 1.2501
    assert 0 < prefill_cost(SHAPE, method, 2048).attention_flops <= prefill_cost(SHAPE, None, 2048).attention_flops


def test_caches_and_estimates():
    def keys(method):
        """Keys read and kept when the thousandth token is decoded."""
        cost = decode_cost(SHAPE, method, 999)
        return cost.kv_bytes / SHAPE.kv_bytes_per_token, cost.held_bytes / SHAPE.kv_bytes_per_token

    assert keys(regard.H2O(budget=100)) == (100, 100)
    prompt = prefill_cost(SHAPE, regard.H2O(budget=100), 500)
    assert prompt.attention_flops == prefill_cost(SHAPE, None, 500).attention_flops
    assert prompt.held_bytes == 100 * SHAPE.kv_bytes_per_token
    assert keys(regard.RecycledAttention(budget=100, stride=4)) == pytest.approx((325, 1100))
    assert keys(regard.StaircaseQuantCache()) == (128 + 64 + 32 + 616 / 8,) * 2
    assert keys(regard.LongHeads(chunk=32, budget=256)) == (256, 1000)
    assert keys(regard.RetrievalAttention(sink=10, recent=20, top_k=30)) == (60, 1000)
    assert keys(regard.MASFormer(full_layers=1, block=100)) == pytest.approx((0.25 * 1000 + 0.75 * 200,) * 2)
    assert keys(regard.MoA(budget=0.25, new_tokens=0)) == (256, 256)
    mixed = regard.HeadPlan(((Window(4, 60), Full()),) * SHAPE.num_layers)
    assert keys(regard.PlannedAttention(mixed)) == pytest.approx((0.5 * 64 + 0.5 * 1000,) * 2)
    uneven = regard.HeadPlan(((*[Window(4, 60), Window(4, 96)] * 4,),) * SHAPE.num_layers)  # kv heads keep their widest
    assert keys(regard.PlannedAttention(uneven)) == pytest.approx((82, 100))
    assert keys(regard.S2Attention(50, 2, 2, free_cache=True)) == pytest.approx((550, 550))
    assert keys(regard.CCAAttention(group=10, window=200)) == (280, 280)
    hyper = regard.HyperAttention(block_size=16, samples=16, min_len=256)
    assert keys(hyper) == (1000, 1000)
    pairs = prefill_cost(SHAPE, hyper, 1024).attention_flops / prefill_cost(SHAPE, None, 1024).attention_flops
    assert pairs == pytest.approx((4 * 256 * 257 / 2 + 1024 * 32) / (1024 * 1025 / 2))
    flops = decode_cost(SHAPE, regard.StaircaseQuantCache(), 999).attention_flops
    assert flops == decode_cost(SHAPE, None, 999).attention_flops
    assert keys(regard.BlockTopK(budget=128, decode=False)) == (1000, 1000)
    blocks = decode_cost(SHAPE, regard.BlockTopK(budget=128, block_size=50, summary="mean"), 999)
    assert (
        blocks.kv_bytes == 128 * SHAPE.kv_bytes_per_token and blocks.search_bytes == 20 * SHAPE.kv_bytes_per_token / 2
    )


def test_other_methods():
    class Own(Method):
        def attend(self, call):
            return None

    with pytest.raises(ValueError, match="method: the cost of Own is not known"):
        reaches(Own(), SHAPE, 10, "decode")

    class Says(Own):
        def reaches(self, shape, context, phase):
            return [(0.5, DENSE), (0.5, window_reach(1))]

    assert decode_cost(SHAPE, Says(), 99).kv_bytes == decode_cost(SHAPE, None, 99).kv_bytes * 0.505

    class Edit(Method):
        def edit(self, call):
            pass

    assert reaches(Edit(), SHAPE, 10, "decode") == [(1.0, DENSE)]
    with pytest.raises(ValueError, match="phase"):
        reaches(None, SHAPE, 10, "training")


def test_shapes_from_models_and_configurations():
    model = tiny_llama()
    shape = ModelShape.from_model(model, "tiny")
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (3, 4, 2, 8)
    assert shape.params == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert ModelShape.from_config(model.config).params == shape.params
    with pytest.raises(ValueError, match="num_kv_heads: got 3"):
        ModelShape(1, 4, 3, 8, 0.0)
    with pytest.raises(ValueError, match="config: got"):
        ModelShape.from_config(object())


def test_seconds_are_a_roofline():
    slow_memory = Device("a", flops=1e12, bandwidth=1.0)
    slow_compute = Device("b", flops=1.0, bandwidth=1e12)
    cost = decode_cost(SHAPE, None, 100)
    assert math.isclose(cost.seconds(slow_memory), cost.bytes, rel_tol=1e-6)
    assert math.isclose(cost.seconds(slow_compute), cost.flops, rel_tol=1e-6)
    assert Cost(calls=3).seconds(Device("c", 1.0, 1.0, overhead=2.0)) == 6.0
    assert DEVICES["b200"].intensity == 562.5
    small, large = Device("d", 1.0, 1.0, capacity=1000.0), Device("d", 1.0, 1.0, capacity=1e9)
    assert not cost.fits(small, SHAPE) and cost.fits(large, SHAPE)
    both = cost + cost
    assert both.flops == 2 * cost.flops and both.held_bytes == cost.held_bytes
    assert cost.eflops(2.0) == cost.flops + 2 * cost.bytes


def test_sparsity_pays():
    for name in ("qwen3-8b", "smollm2-135m"):
        sparse = decode_cost(MODELS[name], regard.GroupedTopK(budget=2048), 32768)
        dense = decode_cost(MODELS[name], None, 32768)
        assert sparse.kv_bytes + sparse.search_bytes < 0.2 * dense.kv_bytes
    half = attention_prefill_cost(SHAPE, density_reach(0.5), 4096)
    assert half.attention_flops < 0.51 * attention_prefill_cost(SHAPE, DENSE, 4096).attention_flops


def test_this_machine_is_measured():
    device = Device.measure(rounds=1)
    assert device.flops > 1e8 and device.bandwidth > 1e7 and device.exp_rate > 1e6 and device.capacity > 1e8
    with pytest.raises(ValueError, match="rounds"):
        Device.measure(rounds=0)


def test_the_commands(tmp_path):
    run = CliRunner().invoke
    kept = tmp_path / "cost.json"
    done = run(app, ["bench", "cost", "--quick", "--rounds", "1", "--json", str(kept)])
    assert done.exit_code == 0, done.output
    rows = json.loads(kept.read_text())["rows"]
    assert len(rows) == 7 and all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
    done = run(app, ["bench", "cost", "--model", "qwen3-8b", "--context", "8192", "--json", str(kept)])
    assert done.exit_code == 0 and "streaming-llm" in done.output
    assert {row["method"] for row in json.loads(kept.read_text())["rows"]} >= {"dense", "hip", "grouped-topk"}
    assert isinstance(run(app, ["bench", "cost", "--model", "gpt9"]).exception, ValueError)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (regard.Dense, 1.001),
        (lambda: regard.StreamingLLM(window=96), 1.001),
        (lambda: regard.DuoAttention(budget=0.5, sink=4, recent=60), 1.06),
        (lambda: regard.MoA(budget=128, new_tokens=8, sink=16, block=16), 1.06),
        (lambda: regard.MASFormer(full_layers=1, block=64), 1.06),
        (lambda: regard.GroupedTopK(budget=100, recent=16), 1.06),  # what selection remembers comes on top
        (lambda: regard.H2O(budget=100), 1.3),  # room for tokens to come before the next eviction
        (lambda: regard.RecycledAttention(budget=100, stride=4), 1.1),
    ],
)
def test_bytes_held_are_those_of_a_real_cache(make, most):
    from regard.methods.caches import kv_bytes

    model, method = tiny_llama(), make()
    shape = ModelShape.from_model(model)
    ids = torch.randint(1, 128, (1, 600), generator=torch.Generator().manual_seed(0))
    with regard.attach(model, method):
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        held = kv_bytes(model.generate(ids, **options, return_dict_in_generate=True).past_key_values)
    predicted = decode_cost(shape, method, 600, tokens=8, element_bytes=4).held_bytes
    assert 0.97 * predicted <= held <= most * predicted
