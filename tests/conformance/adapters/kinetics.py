"""Kinetics: the authors' `head_dim` in costs is head_dim times layers, which a shape of one layer says as well."""

import torch

from regard.bench.cost import ModelShape
from regard.bench.kinetics import block_topk_cost, coverage, dense_cost, expected_cost, topk_cost
from regard.ops.select import (
    apply_rule,
    grouped_block_topk,
    grouped_topk,
    oracle_sample,
    random_sample,
    random_select,
    recent_only,
    strided_block_topk,
)


def _shape(kwargs):
    return ModelShape(1, kwargs["num_attn_heads"], kwargs["num_kv_heads"], kwargs["head_dim"], kwargs["nparams"])


def costs(case):
    kwargs = case.meta["official_kwargs"]
    shape, context = _shape(kwargs), kwargs["context_length"]
    common = {"model": shape, "context": context, "intensity": kwargs["E_flops"]}
    out = {}
    for length in (5000, 20003):
        for trials in (1, 5):
            options = common | {"generated": length, "trials": trials}
            name = f"L{length}_N{trials}"
            out[f"dense_{name}"] = dense_cost(**options)
            out[f"topk_{name}"] = topk_cost(**options, budget=1500)
            out[f"block_{name}"] = block_topk_cost(**options, recent=100, block_size=16, topk=60)
    options = common | {"recent": 64, "block_size": 32, "topk": 10}
    out["expected_block"] = expected_cost(block_topk_cost, [300, 4111, 9000], 3, **options)
    out["coverage"] = coverage([1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0], [1, 2, 5, 8, 9, 12])
    return {name: torch.tensor(value) for name, value in out.items()}


def more_costs(case):
    kwargs = case.meta["official_kwargs"]
    shapes = {name: _shape(sizes) for name, sizes in kwargs["models"].items()}
    out = {}
    for name, shape in shapes.items():
        for intensity in (562.5, 100.0):
            for context in (64, 3000):
                for generated in (1000, 30001):
                    for trials in (1, 8):
                        key = f"{name}_E{intensity:g}_L{context}_D{generated}_N{trials}"
                        given = (shape, context, generated, trials)
                        out[f"dense_{key}"] = dense_cost(*given, intensity=intensity)
                        for budget in (0, 128, 5000):
                            out[f"topk{budget}_{key}"] = topk_cost(*given, budget=budget, intensity=intensity)
                        for recent, size, topk in ((64, 16, 60), (0, 8, 1), (700, 64, 100)):
                            blocks = {"recent": recent, "block_size": size, "topk": topk}
                            made = block_topk_cost(*given, **blocks, intensity=intensity)
                            out[f"block{recent}-{size}-{topk}_{key}"] = made
    for trials in (1, 4):
        options = {"model": shapes["q06"], "context": 200, "intensity": 562.5}
        out[f"expected_dense_N{trials}"] = expected_cost(dense_cost, kwargs["lengths"], trials, **options)
        out[f"expected_topk_N{trials}"] = expected_cost(topk_cost, kwargs["lengths"], trials, **options, budget=512)
    for correct in (0, 1, 5, 31, 32):
        out[f"coverage_{correct}"] = coverage([1] * correct + [0] * (32 - correct), [1, 2, 4, 8, 16, 32])
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in out.items()}


_NAMES = {"topk_block": "topk", "local": "recent", "nsample": "samples"}
_RULES = {
    "topk": grouped_topk,
    "block": grouped_block_topk,
    "strided": strided_block_topk,
    "local": recent_only,
    "random": random_select,
}


def rules(case):
    """The scores as the authors leave them."""
    scores, lengths = case.inputs["logits"], case.inputs["lengths"]
    out = {}
    for name, given in case.meta["official_kwargs"].items():
        options = {_NAMES.get(key, key): value for key, value in given.items()}
        options["lengths"] = lengths
        if name == "oracle":
            torch.manual_seed(13)
            out[name] = oracle_sample(case.inputs["probabilities"], **options)
            continue
        options["num_kv_heads"] = 2
        torch.manual_seed({"random_select": 11, "random_sample": 12}.get(name, 0))
        if name == "random_sample":
            out[name] = random_sample(scores, **options)
        else:
            rule = next(rule for prefix, rule in _RULES.items() if name.startswith(prefix))
            out[name] = apply_rule(scores, rule(scores, **options))
        beyond = torch.arange(scores.shape[-1]) >= lengths[:, None, None]
        out[name] = out[name].masked_fill(beyond, 0.0)
    return out
