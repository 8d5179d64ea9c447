"""Routing Transformer: the authors' layer with every kind of head, and a training step; the community's layer beside it."""

import warnings

import torch

from regard.integrations.official import load_official
from regard.nn import KmeansAttention, KmeansSelfAttention, RoutingAttention

RELATIVE = {
    "sparsity_cluster_relative": "cluster",
    "sparsity_cluster_strided_relative": "cluster_strided",
    "sparsity_strided_relative": "strided",
    "local_relative": "local",
}


def _layer(options, params):
    heads = {
        name: options.get(key, 0)
        for name, key in (
            ("cluster", "sparsity_cluster_num_heads"),
            ("cluster_strided_heads", "sparsity_cluster_strided_num_heads"),
            ("strided_heads", "sparsity_strided_num_heads"),
            ("local_heads", "local_num_heads"),
        )
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = RoutingAttention(
            options["output_depth"],
            sum(heads.values()),
            **{name: count for name, count in heads.items() if name != "cluster"},
            num_clusters=options["sparsity_cluster_size"],
            window=options["sparsity_cluster_attention_window"],
            block=options["query_shape"][0],
            flange=options["memory_flange"][0],
            causal=options["masked"],
            share_qk=options["share_qk"],
            key_dim=options["total_key_depth"],
            value_dim=options["total_value_depth"],
            relative=[kind for key, kind in RELATIVE.items() if options.get(key)],
            max_relative=options.get("max_relative_position") or 64,
            commitment=options.get("beta", 1e-4),
            decay=options.get("decay", 0.99),
            ema=options["ema"],
            routing="hash" if options.get("hash_items") else "kmeans",
        )
    load_official(layer, params)
    return layer


def training_step(case):
    layer = _layer(case.meta["official_kwargs"], case.params).train()
    out, loss = layer(case.inputs["x"])
    scope = "after.mha/attention_nd/cluster_attention/cluster_attention/"
    after = {f"{scope}{name}": value for name, value in layer.clusters["cluster"].named_buffers()}
    return {"0": out, "cluster_loss": loss, **after}


def kinds(case):
    found = {}
    for name, options in case.meta["official_kwargs"].items():
        params = {key[len(name) + 1 :]: value for key, value in case.params.items() if key.startswith(f"{name}.")}
        layer = _layer(options, params).train(options["mode"] == "train")
        found[name], found[f"loss.{name}"] = layer(case.inputs[f"x.{name}"])
    return found


def community(case):
    options = case.meta["official_kwargs"]
    layer = KmeansAttention(
        options["num_heads"],
        options["head_dim"],
        num_clusters=options["num_clusters"],
        window=options["window_size"],
        causal=options["causal"],
        shared_qk=options["shared_qk"],
    ).eval()
    load_official(layer, case.params)
    with torch.no_grad():
        out, loss = layer(case.inputs["q"], case.inputs["q"], case.inputs["v"])
    return {"0": out, "loss": loss}


def community_cases(case):
    found = {}
    for name, options in case.meta["official_kwargs"].items():
        params = {key[len(name) + 1 :]: value for key, value in case.params.items() if key.startswith(f"{name}.")}
        layer = KmeansAttention(
            options["num_heads"],
            options["head_dim"],
            num_clusters=options["num_clusters"],
            window=options["window_size"],
            context_window=options.get("context_window_size"),
            causal=options.get("causal", False),
            shared_qk=options.get("shared_qk", False),
            receives_context=options.get("receives_context", False),
            num_mem_kv=options.get("num_mem_kv", 0),
            decay=options.get("ema_decay", 0.999),
            commitment=options.get("commitment", 1e-4),
            auto_update=False,
        )
        load_official(layer, params)
        layer.train(options["mode"] == "train")
        x = case.inputs
        masks = {key: x[f"{key}.{name}"] for key in ("query_mask", "key_mask") if f"{key}.{name}" in x}
        found[name], found[f"loss.{name}"] = layer(x[f"q.{name}"], x[f"k.{name}"], x[f"v.{name}"], **masks)
        if layer.training:
            layer.update()
            found[f"after.{name}"] = layer.kmeans.means
    return found


def community_layer(case):
    found = {}
    for name, options in case.meta["official_kwargs"].items():
        layer = KmeansSelfAttention(
            options["dim"],
            options["heads"],
            head_dim=options["dim_head"],
            num_clusters=options["max_seq_len"] // options["window_size"],
            window=options["window_size"],
            causal=options["causal"],
            shared_qk=options.get("shared_qk", False),
            num_mem_kv=options.get("num_mem_kv", 0),
        ).eval()
        load_official(layer, {k[len(name) + 1 :]: v for k, v in case.params.items() if k.startswith(f"{name}.")})
        with torch.no_grad():
            found[name], found[f"loss.{name}"] = layer(case.inputs[f"x.{name}"], case.inputs[f"mask.{name}"])
    return found
