"""Block Transformer: logits and losses of all strategies, greedy generation, and the model made from a GPT-NeoX model."""

import torch

import regard
from regard.models import BlockTransformer


def build(o):
    cross = o["strategy"] == "cross_attention"
    t5 = None
    if cross:
        t5 = {"head_dim": o["d_kv"], "feed_forward": o["ff"], "tied": o["tied"]}
        t5 |= {"buckets": o.get("buckets", 32), "max_distance": o.get("max_distance", 128)}
    return BlockTransformer(
        o["vocab_size"],
        o["hidden_size"],
        o["block_layers"],
        o["token_layers"],
        o["heads"],
        block=o["block_length"],
        prefix=o.get("expansion_ratio", 1),
        strategy="cross" if cross else o["strategy"],
        token_dim=o["token_dim"],
        token_heads=o.get("token_heads", o["heads"]),
        hidden=o["intermediate_size"],
        token_hidden=o.get("token_ff", o["intermediate_size"]),
        embedder="projection" if o.get("projection") == "projection_layer" else "lookup",
        embed_dim=o.get("embed_dim"),
        rotary=o["rotary_pct"],
        parallel=o["parallel"],
        block_loss=o.get("block_loss"),
        block_loss_weight=o.get("block_loss_weight", 1.0),
        auto_encoding=o.get("auto", False),
        auto_encoding_weight=o.get("auto_weight", 1.0),
        t5=t5,
    ).eval()


def run(case):
    model = build(case.meta["official_kwargs"])
    regard.load_official(model, case.params)
    given = case.inputs
    ids, mask = (given.get("ids", given.get("input_ids")), given.get("mask", given.get("attention_mask")))
    made = model(ids, given["labels"], mask)
    out = {"logits": model(ids, mask=mask).logits, "loss": made.loss}
    if made.block_loss is not None:
        out |= {"block_decoding_loss": made.block_loss, "token_decoding_loss": made.token_loss}
    if made.auto_encoding_loss is not None:
        out["auto_encoding_loss"] = made.auto_encoding_loss
    for name, prompt in given.items():
        if name.startswith("prompt"):
            out[name.replace("prompt", "generated")] = model.generate(prompt, 11, variant="released")
    return out


def uptraining(case):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    o = case.meta["official_kwargs"]
    config = GPTNeoXConfig(
        vocab_size=o["vocab_size"],
        hidden_size=o["hidden_size"],
        num_hidden_layers=o["layers"],
        num_attention_heads=o["heads"],
        intermediate_size=o["intermediate_size"],
        use_parallel_residual=True,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": o["rotary_pct"]},
    )
    vanilla = GPTNeoXForCausalLM(config)
    head = next(name for name in ("lm_head.weight", "embed_out.weight") if name in vanilla.state_dict())
    vanilla.load_state_dict({head if name == "embed_out.weight" else name: t for name, t in case.params.items()})
    out = {}
    for method in ("partition", "skip"):
        model = BlockTransformer.from_vanilla(vanilla, o["block_length"], method, o["expansion_ratio"]).eval()
        with torch.no_grad():
            out[f"logits_{method}"] = model(case.inputs["ids"]).logits
    return out
