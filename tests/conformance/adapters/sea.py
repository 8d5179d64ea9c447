"""SEA: the whole layer on given q, k, v, with its losses."""

import regard
from regard.losses import sea_distillation


def layer(case):
    options, x = case.meta["official_kwargs"], case.inputs
    config, own = options["config"], options["perlin_config"]
    heads = config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    module = regard.nn.EstimatedSparseAttention(
        heads, dim, k=own["k"], width=own["attention_predictor_length"], causal=own["causal"],
        max_len=config["max_position_embeddings"], competition=own.get("k_flatten_dim", "causal_batch"),
        oversample=own.get("k_oversample", 1.0),
    ).eval()  # fmt: skip
    regard.load_official(module, case.params)
    causal = own["causal"]
    padding = None if causal else x["attention_mask"][:, 0, 0] > -1
    q = x["q"] * dim**0.5 if causal else x["q"]  # theirs comes scaled
    out, record = module(q, x["k"], x["v"], padding, return_record=True)
    teacher = x["context_teacher"].unflatten(-1, (heads, dim)).transpose(1, 2)
    return {
        "context": out.transpose(1, 2).flatten(2),
        "loss": sea_distillation(record, x["scores_teacher"], teacher),
        "estimated_probs_m": record.probs_m,
        "kept": record.kept() & _rows(record),
        "partial_probs": record.weights(),
    }


def _rows(record):
    return True if record.keys is None else record.keys[:, None, :, None]
