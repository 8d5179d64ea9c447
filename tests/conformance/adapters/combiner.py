"""Combiner: the authors' JAX layers (causal) and TensorFlow functions (both directions)."""

import torch

from regard.integrations.official import load_official
from regard.nn import CombinerAttention, CombinerBlock

CLASSES = {"_SelfAttSqrtn": "fixed", "_SelfAttLogn": "logsparse", "_AxialMixtureAtt": "axial_mixture"}
CLASSES |= {"_SelfAttAxialRowmajor": "axial_rowmajor", "SelfAttSqrtnLayer": "fixed"}
FUNCTIONS = {
    "axial_mixture_unidir": "axial_mixture",
    "axial_mixture_bidir": "axial_mixture",
    "sqrt_fixed_full": "fixed",
    "axial_rowmajor": "axial_rowmajor",
}


def _run(layer, params, x):
    load_official(layer, params)
    with torch.no_grad():
        return layer.eval()(x)


def _of(case, name):
    return {key[len(name) + 1 :]: value for key, value in case.params.items() if key.startswith(f"{name}.")}


def one(case):
    options = case.meta["official_kwargs"]
    layer = CombinerAttention(
        case.inputs["x"].shape[-1],
        options["num_heads"],
        qkv_dim=options["qkv_dim"],
        segment=options["max_seg_len"],
        pattern=CLASSES[case.meta["source"].rpartition(":")[2]],
    )
    return {"0": _run(layer, case.params, case.inputs["x"])}


def jax(case):
    found = {}
    for name, options in case.meta["official_kwargs"].items():
        shared = {
            "qkv_dim": options["qkv_dim"],
            "segment": options["max_seg_len"],
            "pattern": CLASSES[options["class"]],
        }
        if "mlp_dim" in options:
            layer = CombinerBlock(options["dim"], options["num_heads"], mlp_dim=options["mlp_dim"], **shared)
        else:
            layer = CombinerAttention(options["dim"], options["num_heads"], **shared)
        found[name] = _run(layer, _of(case, name), case.inputs[f"x.{name}"])
    return found


def tf(case):
    found = {}
    for name, options in case.meta["official_kwargs"].items():
        layer = CombinerAttention(
            options["model_size"],
            options["num_heads"],
            segment=options["max_seg_len"],
            pattern=FUNCTIONS[options["function"]],
            causal=options["causal"],
            bias=options["dense_use_bias"],
            summary=options.get("local_summary", "identity-max").partition("-")[2],
            running="sum",
            row_summary=options.get("row_summary", "proj"),
            norm_eps=1e-5,
        )
        found[name] = _run(layer, _of(case, name), case.inputs[f"x.{name}"])
    return found
