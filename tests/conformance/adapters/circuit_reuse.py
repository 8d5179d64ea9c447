"""Path patching of circuit_reuse: their TransformerLens model as a GPT-2 of transformers, their receivers as ours."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from regard.lens import LogitDifference, path_effects


def model_of(case):
    kwargs, params = case.kwargs, case.params
    config = GPT2Config(
        vocab_size=kwargs["d_vocab"],
        n_positions=kwargs["n_ctx"],
        n_embd=kwargs["d_model"],
        n_layer=kwargs["n_layers"],
        n_head=kwargs["n_heads"],
        n_inner=kwargs["d_mlp"],
        activation_function=kwargs["act_fn"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    state = {
        "transformer.wte.weight": params["embed.W_E"],
        "transformer.wpe.weight": params["pos_embed.W_pos"],
        "transformer.ln_f.weight": params["ln_final.w"],
        "transformer.ln_f.bias": params["ln_final.b"],
        "lm_head.weight": params["unembed.W_U"].T,
    }
    for i in range(kwargs["n_layers"]):
        ours, theirs = f"transformer.h.{i}", f"blocks.{i}"
        joined = [params[f"{theirs}.attn.W_{n}"].transpose(0, 1).flatten(1) for n in "QKV"]
        state |= {
            f"{ours}.attn.c_attn.weight": torch.cat(joined, 1),
            f"{ours}.attn.c_attn.bias": torch.cat([params[f"{theirs}.attn.b_{n}"].flatten() for n in "QKV"]),
            f"{ours}.attn.c_proj.weight": params[f"{theirs}.attn.W_O"].flatten(0, 1),
            f"{ours}.attn.c_proj.bias": params[f"{theirs}.attn.b_O"],
            f"{ours}.mlp.c_fc.weight": params[f"{theirs}.mlp.W_in"],
            f"{ours}.mlp.c_fc.bias": params[f"{theirs}.mlp.b_in"],
            f"{ours}.mlp.c_proj.weight": params[f"{theirs}.mlp.W_out"],
            f"{ours}.mlp.c_proj.bias": params[f"{theirs}.mlp.b_out"],
        }
        for n in (1, 2):
            state |= {f"{ours}.ln_{n}.weight": params[f"{theirs}.ln{n}.w"]}
            state |= {f"{ours}.ln_{n}.bias": params[f"{theirs}.ln{n}.b"]}
    model.load_state_dict(state)
    return model


def receiver(entry):
    name, head = entry
    return (name, head) if head is not None else int(name.split(".")[1]) + 1  # what leaves a block enters the next


def path_patching(case):
    model, (source, patch) = model_of(case), (case.inputs["source"], case.inputs["patch"])
    metric = LogitDifference(*case.inputs["ans"].T)
    out = {}
    for name, args in case.args.items():
        found = path_effects(
            model,
            source,
            patch,
            metric,
            [receiver(entry) for entry in args["receiver_nodes"]],
            component=args["component"],
            position=args["position"],
            freeze_mlps=args["freeze_mlps"],
        )
        out[name] = found.scores
    with torch.no_grad():
        logits = model(source).logits[:, -1]
    out["logit_diff"] = metric(
        logits + case.params["unembed.b_U"], torch.arange(len(source))
    )  # GPT-2's head has no bias
    return out
