"""CAB: the layers of efficient_attention, and the two scripts."""

import regard
from regard.bench.cab import PUBLISHED, compositional_index, fit_efficiency_length, task_scores

LAYERS = {
    "MultiheadAttention": ("VanillaAttention", {}),
    "LocalAttention": ("LocalAttention", {"wsize": "window"}),
    "ABC": ("BoundedMemoryAttention", {"num_landmarks": "landmarks"}),
    "NystromAttention": ("NystromAttention", {"num_landmarks": "landmarks", "conv_kernel_size": "conv_kernel"}),
    "Performer": ("PerformerAttention", {"approx_attn_dim": "features"}),
    "Lara": ("LinearRandomizedAttention", {"num_landmarks": "landmarks"}),
    "CosformerAttention": ("CosformerAttention", {"act_fun": "activation"}),
    "ProbSparse": ("ProbSparseAttention", {"mix": "mix_heads"}),
    "S4D": ("S4D", {}),
    "AttentionLS": ("LongShortAttention", {"num_landmarks": "landmarks", "window_size": "window"}),
    "CausalLS": (
        "CausalLongShortAttention",
        {"chunk_size": "chunk", "window_size": "window", "mem_len": "memory", "chunk_rank": "rank", "use_bias": "bias"},
    ),
}


def layer(case, **more):
    name, renamed = LAYERS[case.meta["source"].rpartition(":")[2]]
    given = {"embed_dim": "dim"} | renamed
    options = {given.get(key, key): value for key, value in case.meta["official_kwargs"].items()} | more
    module = getattr(regard.nn, name)(**options)
    regard.load_official(module, case.params)
    return module.eval()


def mixes(case):
    """Every in.CASE.x, with the context and keys beside it."""
    more = {}
    source = case.meta["source"]
    if source.endswith(":ABC"):
        more["variant"] = "released"
    if source.endswith(":S4D"):
        more["bidirectional"] = case.meta["official_kwargs"].get("bidirectional", False)
    out = {}
    for key in case.inputs:
        name, _, what = key.partition(".")
        if what == "x":
            context, keys = case.inputs.get(f"{name}.context"), case.inputs.get(f"{name}.keys")
            module = layer(case, **more, **({"cross": True} if context is not None else {}))
            out[name] = module(case.inputs[key], context, keys)
    return out


def local(case):
    x = case.inputs["x"]
    return {name: layer(case, causal=name == "causal")(x) for name in ("causal", "noncausal")}


def probsparse(case):
    """With the authors' own draw of keys in place of ours."""
    module, x = layer(case), case.inputs["x"]
    drawn = module.mix
    module.mix = lambda q, k, v, keys: drawn(q, k, v, keys, case.inputs["sample"])
    return {"y": module(x)}


def scripts(case):
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    out = {}
    for key, values in case.inputs.items():
        what = key.partition("_")[2]
        rows = values.tolist()
        if what in ("time", "memory"):
            found = [fit_efficiency_length(lengths, row, rows[0], what) for row in rows[1:]]
        else:
            found = [*task_scores(rows, PUBLISHED[what]).values(), compositional_index(rows, what)]
        out[key] = values.new_tensor(found)
    return out
