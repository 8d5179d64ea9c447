"""HyperAttention: with the authors' planes, and their draws given or drawn again from the same seed."""

import torch

from regard.ops import hyper_attention


def causal(case):
    x, options = case.inputs, case.meta["official_kwargs"]
    out, lse = hyper_attention(
        x["q"],
        x["k"],
        x["v"],
        causal=True,
        scale=0.4,
        block_size=options["block_size"],
        samples=[x["sampled_set0"], x["sampled_set1"]],
        projections=case.params["lsh.proj_dir"],
        min_len=options["min_seq_len"],
        variant="released",
        return_lse=True,
    )
    return {"0": out, "lse": lse[..., None]}


def cases(case):
    found = {}
    for name, options in case.meta["official_kwargs"].items():
        torch.manual_seed(options["draw_seed"])
        drawn = [case.inputs[f"sampled{i}.{name}"] for i in range(options["draws"])]
        again = options["sample_size"]
        for samples in (drawn, again) if drawn else (again,):
            out, lse = hyper_attention(
                *(case.inputs[f"{x}.{name}"] for x in "qkv"),
                causal=options["causal"],
                scale=options["scale"],
                block_size=options["block_size"],
                samples=samples,
                projections=case.params[f"{name}.lsh.proj_dir"],
                min_len=options["min_seq_len"],
                variant="released",
                return_lse=True,
            )
            if name in found:
                assert torch.equal(found[name], out)
            found[name], found[f"lse.{name}"] = out, lse[..., None]
    return found
